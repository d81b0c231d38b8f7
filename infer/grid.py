"""`Grid`: prompts as rows, LoRAs as columns, one seed; what is made already is not made again."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from infer import picture
from infer.columns import Column
from infer.engine import Engine, steps_of
from infer.filter import ContentFilter, notice
from infer.progress import advancing
from infer.prompts import PICTURES_LIMIT
from infer.request import Request
from infer.writing import Writer
from lorabooth.errors import UserError
from lorabooth.runs import write_durable

FULL_QUALITY = 92


@dataclass(frozen=True)
class Cell:
    """One picture of a grid: where it stands, how it is made, its file."""

    row: int
    column: int
    making: picture.Making
    file: Path

    @cached_property
    def is_made(self) -> bool:
        """Whether the file is there, whole, and made in this way; a program of another version makes it again."""
        try:
            with Image.open(self.file) as image:
                image.load()
            return picture.making_of(self.file) == _plain(self.making.record())
        except (OSError, ValueError, SyntaxError):  # what pillow raises on a file that is missing, cut short or another thing
            return False


class Grid:
    """A grid in a folder: pictures/, and beside it what shows them."""

    def __init__(self, rows: Sequence[Request], columns: Sequence[Column], model: str, folder: Path, computed: dict[str, Any] | None = None):
        """computed: how the engine computes (`Engine.record`)."""
        if len(rows) * len(columns) > PICTURES_LIMIT:
            raise UserError(
                f"{len(rows)} prompts x {len(columns)} columns make {len(rows) * len(columns)} pictures; the limit is {PICTURES_LIMIT}",
                hint="take fewer prompts, weights or checkpoints",
            )
        self.rows, self.columns, self.model, self.folder = rows, columns, model, folder
        self.more = {**(computed or {}), "output_quality": FULL_QUALITY}
        # Column by column: LoRAs are changed as seldom as can be.
        self.cells = [self._cell(r, c) for c in range(len(columns)) for r in range(len(rows))]

    def _cell(self, row: int, column: int) -> Cell:
        request, chosen = self.rows[row], self.columns[column]
        making = picture.Making(request, request.seed, self.model, chosen.loras, self.more)
        # By its making, not its place: a row or a column more leaves the pictures of the others as they are.
        digest = hashlib.sha256(json.dumps(making.record(), sort_keys=True).encode()).hexdigest()
        return Cell(row, column, making, self.folder / "pictures" / f"{chosen.label.replace(' ', '-')}-{digest[:12]}.webp")

    def make(self, engine: Engine, content_filter: ContentFilter | None = None) -> int:
        """Make the pictures that are missing; how many those were (two equal rows share theirs). What the filter keeps back leaves a grey field."""
        missing = list({cell.file: cell for cell in self.cells if not cell.is_made}.values())
        for loras, cells in groupby(missing, key=lambda cell: cell.making.loras):
            engine.read([cell.making.request for cell in cells], loras)
        bar = tqdm(total=sum(steps_of(cell.making.request) for cell in missing), desc="grid", unit="step", disable=not missing)
        with bar, Writer(FULL_QUALITY, content_filter.score if content_filter else None) as writer:
            for cell in missing:
                output = next(iter(engine.generate(cell.making.request, cell.making.loras, advancing(bar))))
                writer.put(cell.file, output.image, cell.making)
            written = writer.results()
        for one in written:
            if one.score is not None:
                tqdm.write(notice(one.making.seed, one.score), file=sys.stderr)
                # Marked, so that another run draws it again and the filter looks again.
                marked = replace(one.making, more={**one.making.more, "filtered": True})
                picture.write(one.file, Image.new("RGB", one.image.size, "grey"), marked, FULL_QUALITY)
        return len(missing)

    def pictures(self, px: int) -> Iterator[tuple[Cell, Image.Image]]:
        """Each cell with its picture, row by row, the longer side `px` long."""
        for cell in sorted(self.cells, key=lambda cell: (cell.row, cell.column)):
            with Image.open(cell.file) as image:
                scale = px / max(image.size)
                yield cell, image.convert("RGB").resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)

    def record(self) -> dict[str, Any]:
        """Plain JSON of all that the grid shows; files relative to its folder."""
        cells = sorted(self.cells, key=lambda cell: (cell.row, cell.column))
        return {
            "prompts": [request.prompt for request in self.rows],
            "columns": [column.label for column in self.columns],
            "pictures": [
                {"row": cell.row, "column": cell.column, "file": cell.file.relative_to(self.folder).as_posix(), "making": cell.making.record()}
                for cell in cells
            ],
        }

    def write_record(self) -> Path:
        """Write grid.json."""
        file = self.folder / "grid.json"
        write_durable(file, json.dumps(self.record(), indent=1).encode())
        return file


def _plain(record: dict[str, Any]) -> Any:
    return json.loads(json.dumps(record))
