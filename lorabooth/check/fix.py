"""`lorabooth check --fix`: a cleaned copy of photos, for a person to look through and to train on."""

import re
import shutil
from pathlib import Path, PurePosixPath

from lorabooth.check.examine import Report
from lorabooth.errors import UserError
from lorabooth.parts import naming, part_of, sweep
from lorabooth.photos import Photo
from lorabooth.runs import publish, write_durable

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")


def check_out(out: Path, source: Path) -> None:
    """Refuse a place for the copy where something is already, or that is inside the photos themselves."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already, and a cleaned copy overwrites nothing", hint="give --fix a folder that does not exist yet")
    if out.suffix.lower() in ARCHIVES:
        raise UserError(f"{out} has the name of an archive, and a cleaned copy is a folder", hint=f"give --fix a name such as {out.stem}")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} is inside {source}, which stays as it is", hint="give --fix a folder somewhere else")


def write_copy(folder: Path, report: Report, out: Path) -> int:
    """Write the photos that `folder` took in as upright sRGB PNGs to `out`, whole or not at all; returns how many.

    Near duplicates of better photos are left out, as duplicates and unreadable files were when the photos were taken in.
    Captions and masks lie beside them. No metadata is among it.
    """
    twice = {finding.files[0] for finding in report.findings if finding.code == "near_duplicate"}
    kept = [checked for checked in report.photos if checked.photo.file not in twice]
    part = part_of(out)
    sweep(out.parent)
    try:
        with naming(out, part):
            part.mkdir(parents=True)
            for checked in kept:
                photo, stem = checked.photo, _stem(checked.photo)
                write_durable(part / f"{stem}.png", (folder / "photos" / photo.file).read_bytes())
                if photo.mask_sha256:
                    write_durable(part / f"{stem}.mask.png", (folder / "photos" / photo.mask_file).read_bytes())
                if checked.caption is not None:
                    write_durable(part / f"{stem}.txt", checked.caption.encode())
            publish(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(kept)


def _stem(photo: Photo) -> str:
    """Our number, which keeps the order and makes it unique, and what of the old name is safe in every file system."""
    old = re.sub(r"[^\w-]+", "-", PurePosixPath(photo.original.replace("\\", "/")).stem).strip("-")[:40]
    return f"{Path(photo.file).stem}-{old}" if old else Path(photo.file).stem
