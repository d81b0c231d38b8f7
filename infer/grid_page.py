"""A grid to look at: one PNG with labels, and one HTML page that asks no network for anything."""

import base64
import io
import unicodedata
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from infer import picture
from infer.grid import Grid
from lorabooth.pages import page, write_page

CELL_PX = 256
SIDE_PX = 16_000
"""Longest side of the PNG; larger ones many viewers refuse."""
GAP_PX = 6
LABEL_PX = 280
FONT_PX = 16
LINE_PX = 20
INK, SOFT = "#1d1d1f", "#66666b"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")
"""What machines have; the font inside pillow has the letters of English only."""


def write_png(grid: Grid, title: str) -> Path:
    """Write grid.png: prompts to the left, columns' names above."""
    file = grid.folder / "grid.png"
    first, best = grid.cells[0].making, grid.cells[-1].making
    picture.write(file, sheet(grid, title), picture.Making(first.request, first.seed, first.model, best.loras, {"contact_sheet": True}))
    return file


def sheet(grid: Grid, title: str) -> Image.Image:
    """The grid as one picture."""
    px = min(CELL_PX, SIDE_PX // max(len(grid.rows), len(grid.columns)) - GAP_PX)
    cells = list(grid.pictures(px))
    width, height = (max(image.size[side] for _, image in cells) + GAP_PX for side in (0, 1))
    font, readable = label_font()
    heads = [wrapped(readable(column.label), font, width - GAP_PX, 3) for column in grid.columns]
    corner = wrapped(readable(title), font, LABEL_PX - 2 * GAP_PX, 3)
    top = max(len(lines) for lines in (*heads, corner)) * LINE_PX + 2 * GAP_PX
    image = Image.new("RGB", (LABEL_PX + len(grid.columns) * width, top + len(grid.rows) * height), "white")
    draw = ImageDraw.Draw(image)
    _write(draw, corner, GAP_PX, GAP_PX, font, SOFT)
    for i, lines in enumerate(heads):
        _write(draw, lines, LABEL_PX + i * width, GAP_PX, font, INK)
    for i, request in enumerate(grid.rows):
        _write(draw, wrapped(readable(request.prompt), font, LABEL_PX - 2 * GAP_PX, max(1, (height - GAP_PX) // LINE_PX)), GAP_PX, top + i * height, font, INK)
    for cell, small in cells:
        image.paste(small, (LABEL_PX + cell.column * width, top + cell.row * height))
    return image


def label_font() -> tuple[Font, Callable[[str], str]]:
    """A font for labels, and what makes a text of letters it has: é becomes e where it must, what is not Latin a question mark."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, FONT_PX), str
        except OSError:
            continue
    return ImageFont.load_default(size=FONT_PX), plain


def plain(text: str) -> str:
    """A text in the letters of English."""
    kept = (character for character in unicodedata.normalize("NFKD", text) if not unicodedata.combining(character))
    return "".join(character if character.isascii() else "?" for character in kept)


def wrapped(text: str, font: Font, width_px: int, limit: int) -> list[str]:
    """A text in lines no wider than this, cut with an ellipsis after so many; a word that is too wide alone is broken."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") <= width_px:
            line = f"{line} {word}"
            continue
        lines += [line] if line else []
        while font.getlength(word) > width_px and len(word) > 1:
            count = max(n for n in range(1, len(word)) if n == 1 or font.getlength(word[:n]) <= width_px)
            lines, word = [*lines, word[:count]], word[count:]
        line = word
        if len(lines) > limit:
            break
    lines += [line] if line else []
    if len(lines) <= limit:
        return lines
    last = lines[limit - 1]
    while last and font.getlength(f"{last}...") > width_px:
        last = last[:-1]
    return [*lines[: limit - 1], f"{last.rstrip(' ,.;:')}..."]


def _write(draw: ImageDraw.ImageDraw, lines: list[str], x: int, y: int, font: Font, colour: str) -> None:
    for i, line in enumerate(lines):
        draw.text((x, y + i * LINE_PX), line, fill=colour, font=font)


def write_html(grid: Grid, title: str) -> Path:
    """Write index.html: thumbnails inside the page, each a link to the full picture beside it."""
    rows: list[tuple[str, list[dict[str, str]]]] = [(request.prompt, []) for request in grid.rows]
    for cell, image in grid.pictures(CELL_PX):
        data = io.BytesIO()
        image.save(data, "WEBP", quality=80)
        link = cell.file.relative_to(grid.folder).as_posix()
        rows[cell.row][1].append({"link": link, "data": base64.b64encode(data.getvalue()).decode(), "column": grid.columns[cell.column].label})
    file = grid.folder / "index.html"
    text = page("infer", "grid.html", title=title, columns=[column.label for column in grid.columns], rows=rows)
    write_page(file, text)
    return file
