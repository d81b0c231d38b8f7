"""From a zip, tar or folder of photos to RUN/photos/00001.png and RUN/manifest.jsonl, and the shapes photos are trained in.

Beside a photo there may be a caption, <stem>.txt, and a mask, <stem>.mask.png, which says what of it is trained on.
"""

import errno
import json
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import sqrt
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from lorabooth import archive
from lorabooth.decoder import Decoder
from lorabooth.decoding import PICTURE_SUFFIXES, as_mask, png
from lorabooth.entry import Entry, LeftOut, printable
from lorabooth.errors import UserError
from lorabooth.runs import publish, write_durable

CAPTION_BYTES_LIMIT = 64 << 10
FEW_PHOTOS = 4
SAME_PICTURE = "is the same picture as "

NEEDED = "put 10-50 JPEG, HEIC, PNG or WebP photos in it"

Progress = Callable[[Iterable[Entry]], Iterable[Entry]]


@dataclass(frozen=True)
class Photo:
    """One photo in RUN/photos: upright RGB of 8 bits, sRGB, the longer side at most 2048 px."""

    file: str
    """"00001.png"; named by us, never by the archive."""
    original: str
    """The name it came with, for messages only."""
    width_px: int
    height_px: int
    sha256: str
    """Hex digest of the stored file."""
    caption: str | None
    """The text that came with it, byte for byte (a byte order mark too), or None."""
    mask_sha256: str | None = None
    """Hex digest of its mask, which lies beside it as 00001.mask.png; None where all of it is trained on."""

    @property
    def mask_file(self) -> str:
        """Name of its mask, if it has one."""
        return Path(self.file).stem + ".mask.png"


@dataclass(frozen=True)
class Manifest:
    """The photos of a run in the order of their names, and one line for each thing left out or changed."""

    photos: tuple[Photo, ...]
    notes: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    """Name of a file and why it is not used, as the end of a sentence about it; each is among the notes too."""

    def to_jsonl(self) -> str:
        """A line with the notes and how many photos there are, then a line a photo."""
        head = {"count": len(self.photos), "notes": self.notes, "left_out": self.left_out}
        return "".join(json.dumps(line) + "\n" for line in (head, *map(asdict, self.photos)))

    @classmethod
    def from_jsonl(cls, text: str) -> "Manifest":
        """What `to_jsonl` wrote. Raises ValueError, TypeError, AttributeError or KeyError on anything else."""
        head, *rows = map(json.loads, text.splitlines() or [""])
        if head.get("count", len(rows)) != len(rows):  # lines are gone; a run of an earlier version has no count
            raise ValueError(f"{len(rows)} photos of {head['count']}")
        return cls(tuple(Photo(**row) for row in rows), tuple(head["notes"]), tuple((name, reason) for name, reason in head.get("left_out", ())))

    def check_held_out(self, count: int) -> None:
        """Refuse to keep so many photos out of training that none is left."""
        if count >= len(self.photos):
            raise UserError(f"validation_photos is {count} of {len(self.photos)} photos: none is left to train on", hint="hold out fewer of them")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of a run; UserError where there is none or it is damaged."""
        path = folder / "manifest.jsonl"
        if not path.exists():
            raise UserError(f"{folder} has no photos yet: {path.name} is missing", hint="take them in with: lorabooth train PHOTOS --trigger-word TOK")
        try:
            return cls.from_jsonl(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{path} is damaged", hint=f"delete {path}, then run the same command again") from error


@dataclass(frozen=True)
class Bucket:
    """A training shape. Both sides are multiples of 16: the VAE's 8 times the transformer's patches of 2."""

    height_px: int
    width_px: int

    @classmethod
    def nearest(cls, width_px: int, height_px: int, resolution_px: int) -> "Bucket":
        """The shape of a photo at about resolution_px**2 pixels: same aspect within 1:3 to 3:1, each side at least 64 px."""
        aspect = min(max(width_px / height_px, 1 / 3), 3.0)
        return cls(height_px=_multiple(resolution_px / sqrt(aspect)), width_px=_multiple(resolution_px * sqrt(aspect)))


def _multiple(side_px: float) -> int:
    return max(64, round(side_px / 16) * 16)


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """The picture resized (Lanczos) to cover the bucket and cropped to exactly its width_px x height_px.

    Sides are cropped evenly. From the height, three quarters of the excess go at the bottom: in photos of people the
    face is in the upper half, and an even crop of a tall one cuts into the hair.
    """
    scale = max(bucket.width_px / image.width, bucket.height_px / image.height)
    width, height = min(bucket.width_px / scale, image.width), min(bucket.height_px / scale, image.height)
    left, top = (image.width - width) / 2, (image.height - height) / 4
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize((bucket.width_px, bucket.height_px), Image.Resampling.LANCZOS, box=box)


def ingest(source: Path, folder: Path, progress: Progress = iter, decoder: Decoder | None = None) -> Manifest:
    """Take the photos of a zip, tar or folder into `folder`/photos and write `folder`/manifest.jsonl; returns the manifest.

    Where the manifest exists, all is done and it is only read. It is written last, and the photos are gathered aside,
    so that a kill leaves nothing that looks complete; the next call starts afresh. `decoder` is one that runs already, for
    those who ingest often. Raises UserError.
    """
    if (folder / "manifest.jsonl").exists():
        return Manifest.load(folder)
    if source.resolve().is_relative_to((folder / "photos").resolve()):
        raise UserError(f"{source} is where the photos of this run are put", hint="move your photos to another folder")
    part = folder / "photos.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        manifest = _gather(source, folder, part, progress, decoder)
        # Left by a kill between the two writes below.
        shutil.rmtree(folder / "photos", ignore_errors=True)
        publish(part, folder / "photos")
        write_durable(folder / "manifest.jsonl", manifest.to_jsonl().encode())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk is full: the photos do not fit in {folder}", hint="free some space, then run the same command again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def _gather(source: Path, folder: Path, part: Path, progress: Progress, running: Decoder | None) -> Manifest:
    with archive.entries(source, leave_out=folder) as found, nullcontext(running) if running else Decoder() as decoder:
        intake = _Intake(part, decoder)
        for entry in progress(sorted(found, key=lambda entry: _natural(entry.name))):
            intake.add(entry)
    if not found:
        raise UserError(f"{source} is empty", hint=NEEDED)
    if not intake.photos:
        raise UserError(f"{source} has no photo that can be used, only {intake.others()}", hint=NEEDED)
    return intake.manifest()


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key by which 2.jpg comes before 10.jpg. Digits compare by length first: they may be too many for an int."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, part) for i, part in enumerate(parts)], name


class _Intake:
    """What has been taken from a source so far."""

    def __init__(self, folder: Path, decoder: Decoder):
        self.folder, self.decoder = folder, decoder
        self.photos: list[tuple[Photo, str]] = []
        """With the stem that a photo shares with its caption."""
        self.captions: dict[str, tuple[str, str]] = {}
        """Stem -> name of the text file, text."""
        self.masks: dict[str, tuple[str, Image.Image]] = {}
        """Stem -> name of the mask, its picture."""
        self.cut_out: list[tuple[str, str]] = []
        """Name and stem of photos that are transparent in part."""
        self.masked: set[str] = set()
        """Stems of photos that have a mask of their own."""
        self.notes: list[str] = []
        self.left_out: list[tuple[str, str]] = []
        self.texts = 0
        self.rejects: list[str] = []
        self._stored: dict[str, tuple[str, str]] = {}
        """Digest of a picture -> its name and stem."""
        self._twins: dict[str, str] = {}
        """Stem of a picture that came again -> stem of the one that was taken."""

    def add(self, entry: Entry) -> None:
        """Take one entry as photo or caption, or note why not."""
        name = printable(entry.name)
        is_text = PurePosixPath(entry.name).suffix.casefold() == ".txt"
        self.texts += is_text
        try:
            data = entry.read()
            if is_text:
                self._add_caption(name, _stem(entry.name), data)
            elif _is_mask(entry.name):
                self._add_mask(name, _stem(entry.name)[: -len(".mask")], data)
            else:
                self._add_photo(name, _stem(entry.name), data)
        except LeftOut as reason:
            self.leave_out(name, str(reason))
            if not is_text:
                self.rejects.append(f"{name} {reason}")

    def leave_out(self, name: str, reason: str) -> None:
        """Note a file that is not used, and why."""
        self.left_out.append((name, reason))
        self.notes.append(f"{name} {reason}: left out")

    def _add_photo(self, name: str, key: str, data: bytes) -> None:
        decoded = self.decoder.decode(name, data)
        image, stored = decoded.image, png(decoded.image)
        digest = sha256(stored).hexdigest()
        # The same pixels give the same file, whatever format they came in.
        if digest in self._stored:
            kept, self._twins[key] = self._stored[digest]
            raise LeftOut(SAME_PICTURE + kept)
        self._stored[digest] = name, key
        file = f"{len(self.photos) + 1:05d}.png"
        write_durable(self.folder / file, stored)
        photo = Photo(file, name, image.width, image.height, digest, None)
        if decoded.opacity is not None and not decoded.opacity.getextrema()[1]:
            self.notes.append(f"{name} is transparent everywhere: its colours are taken as they are")
        elif decoded.opacity is not None:
            photo = self._masked(photo, decoded.opacity)
            self.cut_out.append((name, key))
        self.photos.append((photo, key))
        self.notes += [f"{name} {change}" for change in decoded.changes]

    def _add_mask(self, name: str, key: str, data: bytes) -> None:
        if key in self.masks:
            raise LeftOut(f"has the name of another mask, {self.masks[key][0]}")
        self.masks[key] = name, as_mask(self.decoder.decode(name, data))

    def _masked(self, photo: Photo, mask: Image.Image) -> Photo:
        """The photo with this mask, stored at the photo's size."""
        stored = png(mask.resize((photo.width_px, photo.height_px)))
        write_durable(self.folder / photo.mask_file, stored)
        return replace(photo, mask_sha256=sha256(stored).hexdigest())

    def _add_caption(self, name: str, key: str, data: bytes) -> None:
        if key in self.captions:
            raise LeftOut(f"has the name of another caption, {self.captions[key][0]}")
        self.captions[key] = name, _caption(data)

    def others(self) -> str:
        """What was found in place of photos, with one example of a reason."""
        found = [_count(self.texts, "text file")] if self.texts else []
        if self.rejects:
            found.append(f"{_count(len(self.rejects), 'other file')} ({self.rejects[0]})")
        return " and ".join(found)

    def manifest(self) -> Manifest:
        """The photos with their captions, and the notes."""
        for found, what in ((self.captions, "caption"), (self.masks, "mask")):
            self._assign(found, what)
            self._hand_over(found)
        photos = [replace(self._with_own_mask(photo, stem), caption=self.captions.get(stem, ("", None))[1]) for photo, stem in self.photos]
        self.notes += [f"{name} is transparent in part, which is not trained on" for name, stem in self.cut_out if stem not in self.masked]
        users = Counter(self.captions[stem][0] for _, stem in self.photos if stem in self.captions)
        shared = [f"{name} is the caption of {count} photos of its name" for name, count in users.items() if count > 1]
        few = [few_note(len(photos))] if len(photos) <= FEW_PHOTOS else []
        return Manifest(tuple(photos), (*self.notes, *shared, *few), tuple(self.left_out))

    def _assign(self, found: dict[str, Any], what: str) -> None:
        """Key captions or masks by the stems of their pictures: the same, or else one that differs by case alone, or by how letters are composed."""
        given, like = dict(found), defaultdict[str, list[str]](list)
        found.clear()
        for stem in given:
            like[_alike(stem)].append(stem)
        own = {stem for _, stem in self.photos}
        taken = own & given.keys()
        for stem in dict.fromkeys([stem for _, stem in self.photos]):
            alike = like[_alike(stem)]
            chosen = stem if stem in given else next((other for other in alike if other not in taken or len(alike) == 1), None)
            if chosen:
                found[stem] = given[chosen]
                taken.add(chosen)
        for stem in [stem for stem in self._twins if stem not in own]:
            if chosen := next((other for other in (stem, *like[_alike(stem)]) if other in given and other not in taken), None):
                found[stem] = given[chosen]
                taken.add(chosen)
        for stem in [stem for stem in given if stem not in taken]:
            other = next((given[other][0] for other in like[_alike(stem)] if other in taken), None)
            self.leave_out(given[stem][0], f"has the name of another {what}, {other}" if other else "has no photo of its name")

    def _hand_over(self, found: dict[str, Any]) -> None:
        """Give what belongs to a picture that came again to the one that was taken, unless that has its own."""
        for key, kept in self._twins.items():
            if key != kept and key in found and not any(key == other for _, other in self.photos):
                belonging = found.pop(key)
                if kept in found:
                    self.leave_out(belonging[0], f"is of a picture that came twice, and {found[kept][0]} is of it too")
                found.setdefault(kept, belonging)

    def _with_own_mask(self, photo: Photo, key: str) -> Photo:
        """The photo with the mask of its name, where there is one and it has the photo's shape."""
        if key not in self.masks:
            return photo
        name, mask = self.masks[key]
        if not 0.98 < mask.width * photo.height_px / (mask.height * photo.width_px) < 1.02:
            sizes = f"{mask.width} x {mask.height} px, not {photo.width_px} x {photo.height_px}"
            self.leave_out(name, f"has another shape than its photo ({sizes})")
            return photo
        self.masked.add(key)
        return self._masked(photo, mask)


def few_note(photos: int) -> str:
    """What is said of a set of FEW_PHOTOS or less."""
    return f"only {_count(photos, 'photo')}: likeness will be limited; 10-50 work best"


def _is_mask(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.casefold() in PICTURE_SUFFIXES and path.stem.casefold().endswith(".mask")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _stem(name: str) -> str:
    """What a photo shares with its caption: folder and name without ending."""
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.parent / path.stem)


def _alike(stem: str) -> str:
    """The same whatever the case and the way accents are written."""
    return unicodedata.normalize("NFC", stem).casefold()


def _caption(data: bytes) -> str:
    if len(data) > CAPTION_BYTES_LIMIT:
        raise LeftOut(f"is over {CAPTION_BYTES_LIMIT >> 10} KiB, too long for a caption")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise LeftOut("is not UTF-8 text") from None
    if not text.strip("\ufeff").strip():
        raise LeftOut("is an empty caption")
    return text
