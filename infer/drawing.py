"""`Drawing`: requests in, files out: drawn, finished, filtered, written, and put on a contact sheet."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
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
from infer.request import Request
from infer.writing import Writer, Written
from lorabooth.families.flux1 import VAE_SCALE

FULL_SIZE_ON_SHEET = 16
SMALL_PX = 320


def say(line: str) -> None:
    """A line on standard error, above a progress bar where there is one."""
    tqdm.write(line, file=sys.stderr)


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

    def draw(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Write out-0, out-1 ... (after those the folder has) and a contact sheet; the files and their seeds, as plain JSON.

        A picture that the filter keeps back has its number and its seed, and no file.
        """
        engine = self.engine
        engine.read([*requests, *self.finishing.later(requests, self.choices, engine.family.model == "mini")], self.choices)
        self.out.mkdir(parents=True, exist_ok=True)
        taken = [int(match.group(1)) for file in self.out.glob(f"out-*.{self.form}") if (match := re.fullmatch(r"out-(\d+)", file.stem))]
        number = max(taken, default=-1)
        with Writer(self.quality, self.content_filter.score if self.content_filter else None) as writer:
            for finished in self.finishing.finish(engine, self._drawn(requests), self.choices, say):
                number += 1
                making = picture.Making(finished.request, finished.output.seed, engine.family.model, self.choices, self._computed() | finished.more)
                writer.put(self.out / f"out-{number}.{self.form}", finished.output.image, making)
            written = writer.results()
        rows = [self._row(one) for one in written]
        shown = [one for one in written if not one.filtered]
        return rows + ([self._sheet(requests[0], shown)] if len(shown) > 1 else [])

    def _computed(self) -> dict[str, Any]:
        """What the making says beside the request."""
        return self.engine.record() | ({} if self.form == "png" else {"output_quality": self.quality})

    def _row(self, one: Written) -> dict[str, Any]:
        seed = one.making.seed
        if one.score is None:
            finished = {key: value for key, value in one.making.more.items() if key not in self._computed()}
            return {"file": str(one.file), "seed": seed, **finished}
        say(notice(seed, one.score))
        return {"file": None, "seed": seed, "filtered": True, "score": round(one.score, 3)}

    def _sheet(self, first: Request, shown: list[Written]) -> dict[str, Any]:
        # Hundreds of full pictures on one sheet nobody can open.
        whole = len(shown) <= FULL_SIZE_ON_SHEET
        tiles = [(one.image if whole else ImageOps.contain(one.image, (SMALL_PX, SMALL_PX)), f"seed {one.making.seed}") for one in shown]
        sheet = self.out / "contact-sheet.png"
        picture.write(sheet, picture.contact_sheet(tiles), picture.Making(first, first.seed, self.engine.family.model, self.choices))
        return {"file": str(sheet), "seed": first.seed}

    def _drawn(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Output]]:
        """The pictures of all requests, with a progress bar over their steps."""
        live = Live(self.engine, self.out / "live.png") if self.live else None
        with tqdm(total=sum(request.num_outputs * steps_of(request) for request in requests), desc="generate", unit="step") as bar:
            for request in requests:
                before = bar.n

                def advance(done: int, _: int, before: float = before) -> None:
                    bar.update(before + done - bar.n)

                for output in self.engine.generate(request, self.choices, advance, live.show if live else None):
                    yield request, output
        if live:
            live.file.unlink(missing_ok=True)


class Live:
    """A file that shows the picture that is coming, in rough; the last step of it goes when the pictures are there."""

    def __init__(self, engine: Engine, file: Path):
        self.file, self.glimpse = file, Glimpse(engine.family, engine.base.vae())

    def show(self, latents: Tensor) -> None:
        """Replace what the file shows, in one go, so that no viewer meets half a picture."""
        [first, *_] = self.glimpse.pictures(latents)
        part = self.file.with_suffix(".part.png")
        first.resize((first.width * VAE_SCALE, first.height * VAE_SCALE), Image.Resampling.BICUBIC).save(part)
        os.replace(part, self.file)
