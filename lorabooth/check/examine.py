"""The check as functions: of a zip or folder of photos, and of a run. Photos are opened one at a time."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorabooth.check.caption_rules import caption_findings
from lorabooth.check.findings import KINDS, Finding
from lorabooth.check.measures import measure
from lorabooth.check.photo_rules import Checked, photo_findings
from lorabooth.check.report import Report
from lorabooth.check.set_rules import near_duplicates, of_people, set_findings
from lorabooth.config import Subject
from lorabooth.errors import UserError
from lorabooth.photos import FEW_PHOTOS, SAME_PICTURE, Manifest, Photo, Progress, few_note, ingest
from lorabooth.runs import RunDir

PhotoProgress = Callable[[Sequence[Photo]], Iterable[Photo]]


@dataclass(frozen=True)
class Purpose:
    """What the photos are to be trained for: what the limits depend on."""

    resolutions_px: tuple[int, ...]
    trigger_word: str | None = None
    class_phrase: str = "a person"
    subject: Subject = "person"


def check_run(run: RunDir, progress: PhotoProgress = iter) -> Report:
    """The report on a run's photos and captions, by the run's own recipe. Raises UserError."""
    config = run.config
    return check_folder(run.path, Purpose(config.resolutions_px, config.trigger_word, config.class_phrase, config.subject), progress)


def check_folder(folder: Path, purpose: Purpose, progress: PhotoProgress = iter) -> Report:
    """The report on photos that `ingest` took into `folder`. Raises UserError."""
    manifest = Manifest.load(folder)
    photos = tuple(_look(folder, photo) for photo in progress(manifest.photos))
    people = purpose.subject == "person" and of_people(photos)
    found: list[Finding] = [_left_out(name, reason) for name, reason in manifest.left_out]
    found += near_duplicates(photos)
    found += [finding for checked in photos for finding in photo_findings(checked, purpose.resolutions_px, people)]
    found += caption_findings(photos, purpose.trigger_word, purpose.class_phrase)
    found += set_findings(photos, purpose.subject == "person")
    order = {code: place for place, code in enumerate(KINDS)}
    return Report(photos, tuple(sorted(found, key=lambda finding: (order[finding.code], finding.files))), tuple(_other_notes(manifest)))


@contextmanager
def taken_in(source: Path, progress: Progress = iter) -> Iterator[Path]:
    """A folder with the photos of a zip or folder, as `ingest` leaves them; gone at the end. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="lorabooth-check-") as folder:
        ingest(source, Path(folder), progress)
        yield Path(folder)


def _look(folder: Path, photo: Photo) -> Checked:
    """One photo of `folder`, measured, with the caption of the run or else the one that came with it."""
    written = folder / "captions" / f"{Path(photo.file).stem}.txt"
    caption = written.read_text(encoding="utf-8", errors="replace") if written.exists() else photo.caption
    file = folder / "photos" / photo.file
    try:
        with Image.open(file) as image:
            return Checked(photo, measure(image.convert("RGB")), caption)
    except (OSError, SyntaxError) as error:  # PNG's own complaint is a SyntaxError
        raise UserError(f"{file} is missing or damaged ({photo.original})", hint="take the photos in again, into a new run") from error


def _left_out(name: str, reason: str) -> Finding:
    return Finding("duplicate" if reason.startswith(SAME_PICTURE) else "left_out", reason, names=(name,))


def _other_notes(manifest: Manifest) -> Iterator[str]:
    """The notes that no finding repeats."""
    repeated = {f"{name} {reason}: left out" for name, reason in manifest.left_out}
    repeated |= {few_note(len(manifest.photos))} if len(manifest.photos) <= FEW_PHOTOS else set()
    return (note for note in manifest.notes if note not in repeated)
