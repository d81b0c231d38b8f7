"""What is done with pictures after they are drawn: the ones most like the person are chosen, and small faces redrawn."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from infer import best
from infer.album import Album
from infer.detail import Detail, face_prompt, redraw_faces
from infer.engine import Engine, Output
from infer.finish_options import FinishOptions
from infer.likeness import Likeness, likeness_for
from infer.loras import LoraChoice
from infer.progress import Progress
from infer.request import Request
from lorabooth.errors import UserError
from lorabooth.notes import note, say


@dataclass(frozen=True)
class Finished:
    """A picture that is done, and what its record says of that."""

    request: Request
    output: Output
    more: dict[str, Any]


@dataclass(frozen=True)
class Finishing:
    """The work itself; with nothing asked for, pictures go through as they are."""

    num_outputs: int = 1
    best_of: int | None = None
    detail: Detail | None = None
    likeness: Likeness | None = None

    @classmethod
    def read(cls, options: FinishOptions, native_px: int, choices: Sequence[LoraChoice], num_outputs: int) -> "Finishing":
        """What options ask for of a base of that native size; a UserError where it cannot be done, before a picture is drawn."""
        faces = 1 if options.detail_faces is None else options.detail_faces
        detail = Detail.parse(options.detail, options.detail_prompt, faces) if options.detail is not None else None
        if options.detail_prompt is not None and (not detail or not options.detail_prompt.strip()):
            raise UserError("--detail-prompt needs --detail face, and words", hint='such as: --detail face --detail-prompt "a close-up of TOK in a helmet"')
        if options.detail_faces is not None and not detail:
            raise UserError("--detail-faces needs --detail face")
        if options.best_of is not None:
            best.check(options.best_of, num_outputs)
        if not detail and options.best_of is None:
            if options.like:
                raise UserError("--like does nothing by itself", hint="it goes with --best-of N or --detail face")
            return cls(num_outputs)
        album = Album.for_request(options.like, choices)
        if options.best_of is not None and not album:
            raise best.NOTHING_TO_COMPARE
        return cls(num_outputs, options.best_of, detail, _measure(native_px, album, needed=options.best_of is not None or options.like is not None))

    @property
    def to_draw(self) -> int:
        """Pictures to draw for each prompt."""
        return self.best_of or self.num_outputs

    def later(self, requests: Sequence[Request], loras: Sequence[LoraChoice], mini: bool = False) -> list[Request]:
        """Requests with the prompts that finishing will ask for: the text encoders are to be loaded once."""
        if not self.detail:
            return []
        return [replace(request, prompt=self.detail.prompt or face_prompt(request.prompt, loras, mini)) for request in requests]

    def finish(self, engine: Engine, drawn: Iterable[tuple[Request, Output]], loras: tuple[LoraChoice, ...]) -> Iterator[Finished]:
        """Pictures in the order they were drawn, or for each prompt those that were chosen, the best first."""
        for request, output, more in self._chosen(drawn):
            if not self.detail:
                yield Finished(request, output, more)
                continue
            with face_bar() as progress:
                done = redraw_faces(engine, request, output.seed, output.image, loras, self.detail, self.likeness, progress=progress)
            say(f"seed {output.seed}: {_told(len(done.faces), sum(face.kept for face in done.faces), done.large)}")
            yield Finished(request, replace(output, image=done.image), more | {"detail": done.record(self.detail)})

    def _chosen(self, drawn: Iterable[tuple[Request, Output]]) -> Iterator[tuple[Request, Output, dict[str, Any]]]:
        if self.best_of is None or self.likeness is None:
            yield from ((request, output, {}) for request, output in drawn)
            return
        for rows in best.ranked(drawn, self.best_of, self.likeness):
            say(best.table(rows, self.num_outputs, self.likeness.name))
            for row in rows[: self.num_outputs]:
                yield row.request, row.output, {"likeness": {"score": row.score, "by": self.likeness.name, "best_of": self.best_of}}


@contextmanager
def face_bar() -> Iterator[Progress]:
    """A progress bar over the steps of redrawn faces; it goes when they are there."""
    with tqdm(desc="faces", unit="step", leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def _measure(native_px: int, album: Album | None, needed: bool) -> Likeness | None:
    """The measure of likeness, where it can be had; where it is only a help and cannot, a note."""
    if album is None:
        return None
    try:
        return likeness_for(native_px, album)
    except UserError as error:
        if needed:
            raise
        note(f"redrawn faces are kept without comparison: {error.message}")
        return None


def _told(redrawn: int, kept: int, large: int) -> str:
    if not redrawn:
        return "the face is large enough as it is" if large else "no face found"
    what = f"{redrawn} face{'s' * (redrawn > 1)} redrawn"
    return what + (f", of which {kept} stayed as before, since that was liker" if kept else "")
