"""Mutants for `scripts.fuzz_intake`: small pictures and archives of every kind, and what chance makes of them."""

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pillow_heif
from PIL import Image

SIZES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)
"""What is written over size fields: ends of ranges, and what overflows."""

PACK: dict[str, Callable[[bytes], bytes]] = {"tar.gz": partial(gzip.compress, mtime=0), "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


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
