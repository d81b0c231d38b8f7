"""`python -m scripts.fuzz_intake --count 10000 --seed 1`: mutated archives and pictures through the intake.

Each is taken, or refused in a sentence: no traceback, no file outside the run, memory within bounds. Half are archives
(zip, tar, packed tars), half pictures of every format. Case 17 of a seed is the same whatever the count.
"""

import argparse
import bz2
import gzip
import io
import lzma
import random
import re
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image
from tqdm import tqdm

from lorabooth.decoder import MEMORY_BYTES_LIMIT, Decoder
from lorabooth.decoding import LONG_SIDE_PX
from lorabooth.errors import UserError
from lorabooth.photos import Manifest, ingest

BATCH = 25
"""Mutated pictures in one folder."""
PARENT_BYTES_LIMIT = 1 << 30
SIZES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)
"""What is written over size fields: ends of ranges, and what overflows."""

PACK: dict[str, Callable[[bytes], bytes]] = {"tar.gz": partial(gzip.compress, mtime=0), "tar.bz2": bz2.compress, "tar.xz": lzma.compress}

# What a refusal of an archive says, to count by.
REFUSALS = (
    "damaged or cut off",
    "not a zip or a tar",
    "is encrypted",
    "other than deflate",
    "no photo that can be used",
    "is empty",
    "times its size",
    "the limit",
)


@dataclass
class Outcome:
    """What became of the mutants, and what should not have happened."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For a person to read."""
        return [f"{number:7,}  {what}" for what, number in sorted(self.counts.items())] + [f"FAULT: {fault}" for fault in self.faults]


def pictures() -> dict[str, bytes]:
    """A small picture of each format and kind of pixels."""
    noise = _noise(48, 40)
    image = Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)])
    rgba = image.copy()
    rgba.putalpha(noise)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    frames = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    made: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "jpeg": (image, "JPEG", {"exif": exif}), "jpeg-progressive": (image, "JPEG", {"progressive": True}), "jpeg-cmyk": (image.convert("CMYK"), "JPEG", {}),
        "mpo": (image, "MPO", frames), "png": (rgba, "PNG", {"exif": exif}), "png-palette": (image.convert("P"), "PNG", {"transparency": 3}),
        "png-16": (Image.fromarray(np.asarray(noise).astype(np.uint16) * 257), "PNG", {}), "apng": (image, "PNG", frames),
        "webp": (image, "WEBP", {"exif": exif}),
        "webp-lossless": (rgba, "WEBP", {"lossless": True}), "webp-frames": (image, "WEBP", frames), "gif": (image.convert("P"), "GIF", frames),
        "bmp": (image, "BMP", {}), "tiff": (image, "TIFF", {"exif": exif}), "tiff-lzw": (rgba, "TIFF", {"compression": "tiff_lzw"}),
        "tiff-jpeg": (image, "TIFF", {"compression": "jpeg"}), "tiff-deflate": (image.convert("CMYK"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff-fax": (image.convert("1"), "TIFF", {"compression": "group4"}), "avif": (rgba, "AVIF", {"exif": exif}), "avif-frames": (image, "AVIF", frames),
        "heic": (image, "HEIF", {"exif": exif}), "heic-alpha": (rgba, "HEIF", {}), "heic-tiles": (image.resize((160, 128)), "HEIF", {"tile_size": 64}),
    }  # fmt: skip
    found = {name: _encoded(*how) for name, how in made.items()}
    deep, file = np.asarray(image).astype(np.uint16) * 257, io.BytesIO()
    pillow_heif.from_bytes("RGB;16", image.size, deep.tobytes()).save(file)
    return found | {"heic-10": file.getvalue()}


def archives() -> dict[str, bytes]:
    """A small archive of each kind, with photos, a caption, a mask and what systems leave behind."""
    image, other = _noise(16, 12), _noise(12, 12)
    files = {
        "me/ä.png": _encoded(image, "PNG", {}),
        "me/ä.txt": b"[trigger] smiles",
        "../b.jpg": _encoded(image, "JPEG", {}),
        "c.gif": _encoded(other, "GIF", {}),
    }
    files |= {"b.mask.png": _encoded(image, "PNG", {}), "__MACOSX/._c.gif": b"x", "n" * 120 + ".bmp": _encoded(_noise(8, 8), "BMP", {})}
    plain = _tar(files)
    zips = {f"zip-{name}": _zip(files, method) for name, method in (("stored", zipfile.ZIP_STORED), ("deflate", zipfile.ZIP_DEFLATED))}
    return zips | {
        "tar": plain,
        "tar-gnu": _tar(files, tarfile.GNU_FORMAT),
        "tar.gz": gzip.compress(plain),
        "tar.bz2": bz2.compress(plain),
        "tar.xz": lzma.compress(plain),
    }


def _noise(width: int, height: int) -> Image.Image:
    """The same noise each time, unlike Pillow's."""
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width), dtype=np.uint8))


def _encoded(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def _zip(files: dict[str, bytes], method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as new:
        for name, data in files.items():
            new.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return file.getvalue()


def _tar(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as new:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return file.getvalue()


def mutated(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """One to four mutations, one after the other; half of the time with the check sums made right, which leads deeper in."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        dice.choice(MUTATIONS)(changed, others, dice)
        changed = changed or bytearray(b"\0")
    if dice.random() < 0.5:
        _repair(changed)
    return bytes(changed)


def _repair(data: bytearray) -> None:
    """Right check sums for the chunks of a PNG and the headers of a tar."""
    place = 8
    while data.startswith(b"\x89PNG") and place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    for place in range(0, len(data) - 511, 512):
        if data[place + 257 : place + 262] == b"ustar":
            data[place + 148 : place + 156] = b" " * 8
            data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])


def _place(data: bytearray, dice: random.Random) -> int:
    """Anywhere, but half of the time near one of the ends, where headers and tables of contents are."""
    near = min(len(data), 300)
    return dice.choice((dice.randrange(len(data)), dice.randrange(len(data)), dice.randrange(near), len(data) - 1 - dice.randrange(near)))


def _flip(data: bytearray, _: list[bytes], dice: random.Random) -> None:
    for _ in range(dice.choice((1, 1, 2, 8, 64))):
        data[_place(data, dice)] ^= 1 << dice.randrange(8)


def _overwrite(data: bytearray, _: list[bytes], dice: random.Random) -> None:
    for _ in range(dice.randint(1, 4)):
        data[_place(data, dice)] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))


def _resize(data: bytearray, _: list[bytes], dice: random.Random) -> None:
    """A size field, in either order of bytes."""
    form = dice.choice((">H", "<H", ">I", "<I", ">Q", "<Q"))
    width, place = struct.calcsize(form), _place(data, dice)
    data[place : place + width] = struct.pack(form, dice.choice(SIZES) & ((1 << 8 * min(width, 4)) - 1))


def _cut(data: bytearray, _: list[bytes], dice: random.Random) -> None:
    del data[_place(data, dice) :]


def _swap(data: bytearray, _: list[bytes], dice: random.Random) -> None:
    """Two pieces change places."""
    size = dice.choice((4, 16, 64, 512))
    first, second = sorted((_place(data, dice), _place(data, dice)))
    if first + size <= second:
        data[first : first + size], data[second : second + size] = data[second : second + size], data[first : first + size]


def _repeat(data: bytearray, _: list[bytes], dice: random.Random) -> None:
    place, size = _place(data, dice), dice.choice((4, 16, 64, 512))
    data[place:place] = data[place : place + size] * dice.choice((1, 2, 50))


def _drop(data: bytearray, _: list[bytes], dice: random.Random) -> None:
    place = _place(data, dice)
    del data[place : place + dice.choice((1, 4, 16, 64, 512))]


def _splice(data: bytearray, others: list[bytes], dice: random.Random) -> None:
    """The start of this one, the end of another."""
    other = dice.choice(others)
    data[_place(data, dice) :] = other[dice.randrange(len(other)) :]


MUTATIONS: tuple[Callable[[bytearray, list[bytes], random.Random], None], ...] = (
    _flip,
    _flip,
    _overwrite,
    _resize,
    _resize,
    _cut,
    _swap,
    _repeat,
    _drop,
    _splice,
)


def fuzz(count: int, seed: int, work: Path) -> Outcome:
    """Put `count` mutants through the intake, in the empty folder `work`."""
    outcome, place = Outcome(), work / "runs" / "run"
    (work / "runs" / "beside").mkdir(parents=True)
    with Decoder() as decoder, tqdm(total=count, unit="file", desc=f"fuzz, seed {seed}") as bar:
        for number in range(0, count // 2, BATCH):
            batch = mutants("picture", pictures(), range(number, min(number + BATCH, count // 2)), seed)
            _feed_folder(batch, work, place, decoder, outcome)
            bar.update(len(batch))
        for name, data in mutants("archive", archives(), range(count - count // 2), seed).items():
            _feed_archive(name, data, work, place, decoder, outcome)
            bar.update()
    return outcome


def mutants(kind: str, samples: dict[str, bytes], numbers: range, seed: int) -> dict[str, bytes]:
    """These cases of a seed by name, such as "00017-tar.gz"."""
    found, others = {}, list(samples.values())
    for number in numbers:
        dice = random.Random(f"{kind} {seed} {number}")
        name = dice.choice(list(samples))
        data = mutated(samples[name], others, dice)
        # Packed after the mutation, too, so that what is in the packing is reached.
        inside = name.startswith("tar.") and dice.random() < 0.7
        found[f"{number:05d}-{name}"] = PACK[name](mutated(samples["tar"], others, dice)) if inside else data
    return found


def _feed_folder(batch: dict[str, bytes], work: Path, place: Path, decoder: Decoder, outcome: Outcome) -> None:
    """A folder of mutated pictures and a good one: each is among the photos, or named with a reason."""
    source = work / "photos"
    source.mkdir()
    for name, data in batch.items():
        (source / name).write_bytes(data)
    (source / "good.png").write_bytes(_encoded(Image.new("RGB", (8, 8)), "PNG", {}))
    manifest = _ingest(source, work, place, decoder, outcome)
    shutil.rmtree(source)
    if not isinstance(manifest, Manifest):
        outcome.faults.append(f"{source} of {next(iter(batch))} was refused: {manifest}")
        return
    taken = {photo.original for photo in manifest.photos}
    reasons = {note.split(" ", 1)[0]: note.split(" ", 1)[1] for note in manifest.notes if note.endswith(": left out")}
    for name in batch:
        if name not in taken and name not in reasons:
            outcome.faults.append(f"{name} was neither taken nor named")
        why = "taken" if name in taken else re.sub(r"same picture as .*:", "same picture as another:", reasons.get(name, "lost"))
        outcome.counts[f"picture {why}"] += 1
        if "its decoder failed" in why:
            outcome.faults.append(f"{name}: {why}")


def _feed_archive(name: str, data: bytes, work: Path, place: Path, decoder: Decoder, outcome: Outcome) -> None:
    source = work / name
    source.write_bytes(data)
    manifest = _ingest(source, work, place, decoder, outcome)
    source.unlink()
    if isinstance(manifest, Manifest):
        outcome.counts["archive taken"] += 1
        return
    known = next((words for words in REFUSALS if words in manifest), None)
    outcome.counts[f"archive refused: {known or manifest}"] += 1


def _ingest(source: Path, work: Path, place: Path, decoder: Decoder, outcome: Outcome) -> Manifest | str:
    """The manifest, or what the refusal says. Looks at what was written, and removes it. A traceback is let through: it ends the fuzz."""
    before = _listing(work)
    try:
        manifest: Manifest | str = ingest(source, place, decoder=decoder)
    except UserError as error:
        manifest = error.message
        if "\n" in manifest or not error.hint:
            outcome.faults.append(f"{source.name}: a refusal that is not one sentence with a hint: {error}")
    except BaseException:
        print(f"\n{source.name} of this seed is at fault", file=sys.stderr)
        raise
    if isinstance(manifest, Manifest):
        if Manifest.load(place) != manifest:
            outcome.faults.append(f"{source.name}: the manifest is read back differently")
        for photo in manifest.photos:
            with Image.open(place / "photos" / photo.file) as image:
                if image.mode != "RGB" or max(image.size) > LONG_SIDE_PX or image.size != (photo.width_px, photo.height_px):
                    outcome.faults.append(f"{source.name}: {photo.file} is {image.mode}, {image.size}")
    elif place.exists() and list(place.iterdir()):
        outcome.faults.append(f"{source.name}: a refusal left {list(place.iterdir())} behind")
    shutil.rmtree(place, ignore_errors=True)
    if _listing(work) != before:
        outcome.faults.append(f"{source.name}: written outside the run: {_listing(work) ^ before}")
    return manifest


def _listing(work: Path) -> set[tuple[str, int]]:
    """Names and times of all there is beside the run."""
    return {(str(path), path.stat().st_mtime_ns) for path in work.rglob("*") if path.name != "runs"}


def peaks_bytes() -> tuple[int, int]:
    """The most memory that this process had, and the largest of the decoders it has ended."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


def main() -> int:
    """Fuzz, and print what became of it; exit code 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=10_000, help="mutants [default: 10000]")
    parser.add_argument("--seed", type=int, default=1, help="seed of the mutations [default: 1]")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(chosen.count, chosen.seed, Path(folder) / "work")
    here, there = peaks_bytes()
    if here > PARENT_BYTES_LIMIT or there > MEMORY_BYTES_LIMIT:
        outcome.faults.append("memory went over its bound")
    print("\n".join(outcome.lines()))
    print(f"count {chosen.count}, seed {chosen.seed}; peak memory {here >> 20} MiB, of the decoder {there >> 20} MiB; {len(outcome.faults)} faults")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
