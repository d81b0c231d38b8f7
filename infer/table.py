"""Tables for a terminal: aligned columns, narrowed to the window; what files of strangers say can be in them."""

import shutil
import sys
from collections.abc import Sequence

from lorabooth.errors import one_line

CELL_CHARACTERS = 100
NARROWEST = 8
GAP = "  "


def cut(text: str, limit: int = CELL_CHARACTERS) -> str:
    """A text on one line, without control characters and no longer than the limit."""
    clean = one_line(text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Lines of aligned columns; those whose heads are in `right` end at the right. A row of two cells is a name and a remark across all other columns."""
    whole = [[cut(cell, CELL_CHARACTERS * (1 + (len(row) < len(head)))) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in whole if i == 0 or len(row) == len(head)) for i in range(len(head))]
    room = (shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else CELL_CHARACTERS * len(head)) - len(GAP) * (len(head) - 1)
    while sum(widths) > room and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in whole:
        if len(row) < len(head):
            lines.append(f"{cut(row[0], widths[0]):<{widths[0]}}{GAP}{cut(row[1], room + len(GAP) * (len(head) - 2) - widths[0])}")
            continue
        cells = [cut(cell, width) for cell, width in zip(row, widths, strict=True)]
        lines.append(GAP.join(f"{cell:>{width}}" if name in right else f"{cell:<{width}}" for cell, width, name in zip(cells, widths, head, strict=True)))
    return "\n".join(line.rstrip() for line in lines)
