"""`Drawing`: requests in, files out: drawn, finished, filtered, written, and put on a contact sheet."""

import os
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from infer import picture
from infer.engine import Engine, Output, steps_of
from infer.filter import ContentFilter, notice
from infer.finish import Finishing
from infer.glimpse import Glimpse
from infer.loras import LoraChoice
from infer.progress import advancing
from infer.request import Request
from infer.writing import Numbers, Writer, Written, numbered, write_first_free
from lorabooth.families.flux1 import VAE_SCALE
from lorabooth.notes import note, say
from lorabooth.parts import naming, part_of

FULL_SIZE_ON_SHEET = 16
SMALL_PX = 320


@dataclass
class Drawing:
    """Into a folder `out`, as files of one form; `content_filter` keeps pictures back, `live` shows the one that is coming."""

    engine: Engine
    choices: tuple[LoraChoice, ...]
    out: Path
    form: str
    quality: int = 80
    finishing: Finishing = field(default_factory=Finishing)
    content_filter: ContentFilter | None = None
    live: bool = False
    unwritten: OSError | None = field(default=None, init=False)
    """What kept a picture or the contact sheet from being written, where others are."""

    def draw(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Write out-0, out-1 ... (after those the folder has) and a contact sheet; the files and their seeds, as plain JSON.

        A picture that the filter keeps back has its number and its seed, and no file. Ctrl-C keeps what is finished, and so does a full disk (`unwritten`).
        """
        engine = self.engine
        engine.read([*requests, *self.finishing.later(requests, self.choices, engine.family.model == "mini")], self.choices)
        lossy = {} if self.form == "png" else {"output_quality": self.quality}
        numbers = Numbers(self.out, self.form)
        with Writer(self.quality, self.content_filter.score if self.content_filter else None) as writer, closing(self._drawn(requests)) as drawn:
            try:
                for finished in self.finishing.finish(engine, drawn, self.choices):
                    making = picture.Making(
                        finished.request, finished.output.seed, engine.family.model, self.choices, finished.output.computed | lossy | finished.more
                    )
                    writer.put(numbers, finished.output.image, making)
                written = writer.results()
            except OSError as error:
                written, self.unwritten = writer.finished(), error
                if not written:
                    raise
        rows = [_row(one, engine.record() | lossy) for one in written]
        shown = [one for one in written if not one.filtered]
        if len(shown) > 1 and not self.unwritten:
            try:
                rows.append(self._sheet(requests[0], shown))
            except OSError as error:
                self.unwritten = error
        return rows

    def _sheet(self, first: Request, shown: list[Written]) -> dict[str, Any]:
        # Hundreds of full pictures on one sheet nobody can open.
        whole = len(shown) <= FULL_SIZE_ON_SHEET
        tiles = [(one.image if whole else ImageOps.contain(one.image, (SMALL_PX, SMALL_PX)), f"seed {one.making.seed}") for one in shown]
        making = picture.Making(first, first.seed, self.engine.family.model, self.choices, {"contact_sheet": True})
        names = numbered(self.out / "contact-sheet.png")
        sheet = write_first_free(names.__next__, picture.encode(picture.contact_sheet(tiles), making, "png"))
        return {"file": str(sheet), "seed": first.seed, "contact_sheet": True}

    def _drawn(self, requests: Sequence[Request]) -> Generator[tuple[Request, Output], None, None]:
        """The pictures of all requests, with a progress bar over their steps."""
        live = Live(self.engine, _free(self.out / "live.png")) if self.live else None
        total = sum(request.num_outputs * steps_of(request) for request in requests)
        with live or nullcontext(), tqdm(total=total, desc="generate", unit="step") as bar:
            for request in requests:
                for output in self.engine.generate(request, self.choices, advancing(bar), live.show if live else None):
                    yield request, output


def _row(one: Written, computed: dict[str, Any]) -> dict[str, Any]:
    """What the user is told of a picture, without what is true of all."""
    seed = one.making.seed
    if one.score is None:
        return {"file": str(one.file), "seed": seed, **{key: value for key, value in one.making.more.items() if key not in computed}}
    say(notice(seed, one.score))
    return {"file": None, "seed": seed, "filtered": True, "score": round(one.score, 3)}


def _free(file: Path) -> Path:
    """The file's name, or one like it that is free."""
    free = next(name for name in numbered(file) if not name.exists())
    if free != file:
        note(f"{file} is there already; the picture that is coming is shown in {free}")
    return free


class Live:
    """A file that shows the picture that is coming, in rough; to be used in a `with`, at whose end it goes."""

    def __init__(self, engine: Engine, file: Path):
        self.file, self.glimpse = file, Glimpse(engine.family, engine.base.vae())
        self.part = part_of(file)

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_: object) -> None:
        self.part.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)

    def show(self, latents: Tensor) -> None:
        """Replace what the file shows, in one go, so that no viewer meets half a picture."""
        [first, *_] = self.glimpse.pictures(latents)
        with naming(self.file, self.part):
            first.resize((first.width * VAE_SCALE, first.height * VAE_SCALE), Image.Resampling.BICUBIC).save(self.part, "PNG")
            os.replace(self.part, self.file)
