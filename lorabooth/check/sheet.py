"""The contact sheet: all photos with their findings on one page, for a person to look through. One file; it asks no network for anything."""

from pathlib import Path

from lorabooth.check import faces
from lorabooth.check.report import Report, line
from lorabooth.errors import UserError
from lorabooth.pages import page, write_page


def check_place(file: Path) -> None:
    """Refuse a name that is no page's: a slip must not overwrite the photos."""
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{file} does not end in .html", hint="give --html a name such as check.html")
    if file.is_dir():
        raise UserError(f"{file} is a folder", hint="give --html a name such as check.html")


def write_sheet(report: Report, file: Path, title: str) -> None:
    """Write the page. Names and captions come from strangers: the template escapes all of them."""
    write_page(file, render(report, title))


def render(report: Report, title: str) -> str:
    """The page as text."""
    first = [checked for checked in report.photos if checked.photo.file in report.flawed]
    others = [checked for checked in report.photos if checked.photo.file not in report.flawed]
    verdict, reason = report.judgement
    return page(
        "lorabooth.check",
        "sheet.html",
        title=title,
        verdict=verdict,
        reason=reason,
        summary=report.summary(),
        about_set=[finding for finding in report.findings if len(finding.files) != 1],
        groups=[("Look at these", first), ("No warnings", others)],
        notes=[*report.notes, *([] if report.faces_counted else [faces.MISSING])],
        of=report.of,
        line=line,
    )
