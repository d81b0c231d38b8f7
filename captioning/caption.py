"""Stage: photos -> RUN/captions/00001.txt. Supplied captions are kept; the trigger, prefix and suffix are enforced here, in code.

A model that writes captions forgets the trigger now and then, and a caption without it teaches nothing about the person.
"""

import re
from pathlib import Path
from typing import Protocol

from captioning.template import TemplateCaptioner
from lorabooth.photos import Manifest, Photo
from lorabooth.runs import RunDir, write_durable

PLACEHOLDER = "[trigger]"
BATCH_PHOTOS = 8
"""Photos captioned together; a kill loses at most these."""


class Captioner(Protocol):
    """What writes captions; `[trigger]` in them stands for the trigger word."""

    name: str

    def caption(self, images: list[Path]) -> list[str]:
        """One caption for each image file, in their order."""
        ...


def run(folder: Path, captioner: Captioner | None = None) -> list[str]:
    """Write the captions that the run in `folder` lacks, whole files only; returns notes for the user. Raises UserError."""
    run_dir = RunDir.open(folder)
    with run_dir.locked():
        missing = [photo for photo in Manifest.load(folder).photos if not _file(run_dir, photo).exists()]
        _write_generated(run_dir, [photo for photo in missing if photo.caption is None], captioner or TemplateCaptioner())
        return _write_supplied(run_dir, [photo for photo in missing if photo.caption is not None])


def enforce(text: str, trigger: str, prefix: str = "", suffix: str = "") -> str:
    """A generated caption on one line, with the trigger as a word of its own and the prefix and suffix exactly once.

    Doing it again changes nothing.
    """
    text, prefix, suffix = (" ".join(part.replace(PLACEHOLDER, trigger).split()) for part in (text, prefix, suffix))
    while prefix and (match := re.match(_whole(prefix), text)):
        text = text[match.end() :].lstrip()
    while suffix and (match := re.search(_whole(suffix) + r"\Z", text)):
        text = text[: match.start()].rstrip()
    if not re.search(_whole(trigger), f"{prefix} {text} {suffix}"):
        text = _with_trigger(text, trigger)
    return _joined(_joined(prefix, text), suffix)


def _joined(first: str, second: str) -> str:
    """Two parts with a space between them, but none before a comma or full stop."""
    space = " " if first and second and second[0] not in ",.;:!?" else ""
    return first + space + second


def _whole(words: str) -> str:
    """A pattern for `words` that are not part of longer ones: TOK, but not TOKYO."""
    before = r"(?<!\w)" if re.match(r"\w", words) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", words) else ""
    return before + re.escape(words) + after


def _with_trigger(text: str, trigger: str) -> str:
    return f"{trigger}, {text}" if text else trigger


def _write_generated(run_dir: RunDir, photos: list[Photo], captioner: Captioner) -> None:
    config = run_dir.config
    if not config.autocaption:
        for photo in photos:
            _write(run_dir, photo, config.trigger_word)
        return
    for start in range(0, len(photos), BATCH_PHOTOS):
        batch = photos[start : start + BATCH_PHOTOS]
        texts = captioner.caption([run_dir.photos / photo.file for photo in batch])
        for photo, text in zip(batch, texts, strict=True):
            _write(run_dir, photo, enforce(text, config.trigger_word, config.autocaption_prefix, config.autocaption_suffix))


def _write_supplied(run_dir: RunDir, photos: list[Photo]) -> list[str]:
    trigger = run_dir.config.trigger_word
    without = 0
    for photo in photos:
        text = (photo.caption or "").replace(PLACEHOLDER, trigger).strip()
        if not re.search(_whole(trigger), text):
            without += 1
            text = _with_trigger(text, trigger)
        _write(run_dir, photo, text)
    return [f"{trigger} was put before {without} of {len(photos)} supplied captions, which lacked it"] if without else []


def _file(run_dir: RunDir, photo: Photo) -> Path:
    return run_dir.captions / f"{Path(photo.file).stem}.txt"


def _write(run_dir: RunDir, photo: Photo, text: str) -> None:
    write_durable(_file(run_dir, photo), text.encode())
