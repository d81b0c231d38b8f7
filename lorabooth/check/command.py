"""`lorabooth check`: whether photos are good enough to train on, before an hour is spent."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from tqdm import tqdm

from lorabooth.arguments import Known, Location
from lorabooth.check import fix, sheet
from lorabooth.check.examine import Purpose, check_folder, check_run, taken_in
from lorabooth.config import known_values, load_config
from lorabooth.photos import Photo
from lorabooth.runs import RunDir

NOT_YET_CODE = 1


@click.command()
@click.argument("photos", type=Location())
@click.option("--trigger-word", "--trigger", help="Word that the captions must contain. [default: captions are not searched for it; a run's own]")
@click.option("--resolution", help="Training sizes in px by commas. [default: 512,768,1024; a run's own]")
@click.option(
    "--subject", type=Known(*known_values("subject")), help="What they show: person, object or style; faces matter for a person. [default: person; a run's own]"
)
@click.option(
    "--class-phrase",
    help="What the photos are of, such as a man or a dog: its words may stand in every caption. [default: a person, or an object; a run's own]",
)
@click.option("--html", "page", type=Location(), help="Write a contact sheet to this file: one page with all photos and findings. [default: none]")
@click.option("--fix", "out", type=Location(), help="Write a cleaned copy to this new folder. [default: none]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for a program to read.  [default: text]")
@click.pass_context
def check(
    ctx: click.Context,
    photos: Path,
    trigger_word: str | None,
    resolution: str | None,
    subject: str | None,
    class_phrase: str | None,
    page: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Look at PHOTOS (a zip, a tar, a folder or a run) and say what is wrong with which of them, and what the set lacks.

    The verdict is ready, usable or not yet; the exit code of "not yet" is 1. Nothing is changed: --fix writes an upright sRGB copy
    without duplicates and unreadable files, with captions and masks. docs/photos.md lists all findings and limits.

    \b
    Example:
      lorabooth check photos.zip --trigger TOK --html check.html
      lorabooth check photos.zip --fix better && lorabooth train better --trigger TOK
    """
    if page:
        sheet.check_place(page)
    if out:
        fix.check_out(out, photos)
    with _opened(photos) as folder:
        report = check_folder(folder, _purpose(folder, trigger_word=trigger_word, resolution=resolution, subject=subject, class_phrase=class_phrase), photo_bar)
        kept = fix.write_copy(folder, report, out) if out else 0
    if page:
        page.parent.mkdir(parents=True, exist_ok=True)
        sheet.write_sheet(report, page, photos.resolve().name)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        click.echo("\n".join(report.lines()))
        click.echo("\n" + (f"sheet: {page}" if page else "to look through them: add --html check.html"))
        if out:
            click.echo(f"copy:  {out}, {kept} photos")
    if report.judgement[0] == "not yet":
        ctx.exit(NOT_YET_CODE)


def check_new_run(run: RunDir) -> None:
    """Check the photos of a run that has not been checked yet, and say the worst on standard error; writes check.json and check.html."""
    if run.read_json("check.json") is not None:
        return
    report = check_run(run, photo_bar)
    page = run.path / "check.html"
    sheet.write_sheet(report, page, run.path.name)
    run.write_json("check.json", report.to_json())
    for line in ("{}: {}".format(*report.judgement), *report.worst(), f"to look through them: {page}"):
        click.echo(f"check: {line}", err=True)


@contextmanager
def _opened(photos: Path) -> Iterator[Path]:
    """The folder of a run, or one into which the photos are taken for as long as they are looked at."""
    if (photos / "config.json").is_file() and (photos / "manifest.jsonl").is_file():
        yield photos
    else:
        with taken_in(photos, lambda entries: tqdm(entries, desc="read photos", unit="file")) as folder:
            yield folder


def _purpose(folder: Path, **values: str | None) -> Purpose:
    """What is given here; the rest from the run's recipe, or the defaults of one."""
    given = {name: value for name, value in values.items() if value is not None}
    of_run = (folder / "config.json").is_file()
    config = load_config(None, (RunDir.open(folder).config.recipe() if of_run else {"trigger_word": "TOK"}) | given)
    trigger_word = config.trigger_word if of_run or "trigger_word" in given else None
    return Purpose(config.resolutions_px, trigger_word, config.class_phrase, config.subject)


def photo_bar(photos: Sequence[Photo]) -> Iterable[Photo]:
    """A progress bar over photos."""
    return tqdm(photos, desc="check photos", unit="photo")
