"""What phones write: HEIC and AVIF in all their turns, deep colours, raw pictures, and what they tell about the person."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from drawn_photos import corners, encoded, half, ingested, mask_of, one
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from lorabooth.cli import main
from lorabooth.decoding import decode
from lorabooth.entry import LeftOut

TURNED_BACK = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""Orientation -> the transposition by which a camera's stored picture differs from the upright one."""


def test_heic_and_avif_are_read(tmp_path: Path):
    manifest, images = ingested(tmp_path, {"IMG_1.HEIC": encoded(corners(size=(64, 64)), "HEIF"), "b.avif": encoded(corners(), "AVIF")})
    assert [photo.original for photo in manifest.photos] == ["b.avif", "IMG_1.HEIC"]
    assert [image.size for image in images] == [(32, 20), (64, 64)]
    assert all(np.abs(np.asarray(image, int) - np.asarray(corners(size=image.size))).mean() < 6 for image in images)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_heic_and_avif_are_turned_once(kind: str, orientation: int):
    # Both hold the turn as a property of the picture, and again in the EXIF data: applied twice it would be wrong.
    upright = corners(size=(64, 48))
    stored = upright.transpose(Image.Transpose(TURNED_BACK[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.info["exif"] = exif.tobytes()
    data = encoded(stored, kind, exif=exif.tobytes(), quality=95)
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    image = decode("a", data).image
    assert image.size == (64, 48) and np.abs(np.asarray(image, int) - np.asarray(upright)).mean() < 6


def test_heic_of_10_bits_of_tiles_and_of_several_pictures():
    deep = pillow_heif.from_bytes("RGB;16", (64, 64), (np.asarray(corners(size=(64, 64))).astype(np.uint16) * 257).tobytes())
    several = pillow_heif.from_pillow(Image.new("RGB", (64, 64), "black"))
    several.add_from_pillow(corners(size=(64, 64)))
    for heif, options in ((deep, {}), (several, {"primary_index": 1})):
        file = io.BytesIO()
        heif.save(file, quality=95, **options)
        image = decode("a.heic", file.getvalue()).image
        assert np.abs(np.asarray(image, int) - np.asarray(corners(size=(64, 64)))).mean() < 6
    tiles = encoded(corners(size=(256, 192)), "HEIF", quality=95, tile_size=64)
    assert b"grid" in tiles
    assert np.abs(np.asarray(decode("a", tiles).image, int) - np.asarray(corners(size=(256, 192)))).mean() < 6


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_transparency_of_heic_and_avif_is_a_mask(tmp_path: Path, kind: str):
    photo = corners(size=(64, 64))
    photo.putalpha(half((64, 64)))
    manifest, (image,) = ingested(tmp_path, {"a.heic": encoded(photo, kind, quality=95)})
    assert np.abs(mask_of(tmp_path, manifest.photos[0]).astype(int) - np.asarray(half((64, 64)))).mean() < 6
    assert np.asarray(image)[:, 40:].min() > 245


@pytest.mark.parametrize("side_px", [10_001, 30_000, 60_000])
@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_the_size_that_heic_and_avif_declare_is_limited_before_they_are_decoded(kind: str, side_px: int):
    data = bytearray(encoded(corners(size=(64, 64)), kind))
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">II", side_px, side_px)
    with pytest.raises(LeftOut, match=r"over 100 megapixels|is damaged or not a picture") as caught:
        decode("bomb.heic", bytes(data))
    if side_px == 10_001:
        assert "over 100 megapixels" in str(caught.value)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_heic_and_avif_that_were_cut_off_are_named(tmp_path: Path, kind: str):
    whole = encoded(Image.effect_noise((64, 64), 60).convert("RGB"), kind)
    cut = {f"{sixteenth}.heic": whole[: len(whole) * sixteenth // 16] for sixteenth in range(1, 15)}
    manifest, _ = ingested(tmp_path, cut | {"good.png": encoded(corners())})
    assert [photo.original for photo in manifest.photos] == ["good.png"]
    assert len([note for note in manifest.notes if note.endswith("is damaged or not a picture: left out")]) == 14


def png_of_16_bits(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits a colour, which Pillow reads and does not write. pixels: height x width x channels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("channels", "colour_type"), [(2, 4), (3, 2), (4, 6)])
def test_the_upper_half_of_16_bits_is_kept(tmp_path: Path, channels: int, colour_type: int):
    pixels = np.full((4, 4, channels), 0xFFFF)
    pixels[:, 0, 0], pixels[:, 1, 0] = 0x1280, 0x8000
    image = one(tmp_path, png_of_16_bits(pixels, colour_type))
    assert np.asarray(image)[0, :3, 0].tolist() == [0x12, 0x80, 0xFF]


def test_tiff_of_16_bits_a_colour(tmp_path: Path):
    pixels = np.full((2, 2, 3), 0x1234, "<u2")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[258] = (16, 16, 16)
    data = bytearray(encoded(Image.new("RGB", (2, 2)), "TIFF"))
    # The same file with its bits, its length and its pixels exchanged.
    with Image.open(io.BytesIO(data)) as plain:
        offset = plain.tag_v2[273][0]
    data[offset:] = pixels.tobytes()
    for tag, old, new in ((279, 12, 24),):
        place = data.index(struct.pack("<HHII", tag, 4, 1, old))
        data[place : place + 12] = struct.pack("<HHII", tag, 4, 1, new)
    bits = data.index(struct.pack("<HHH", 8, 8, 8))
    data[bits : bits + 6] = struct.pack("<HHH", 16, 16, 16)
    assert one(tmp_path, bytes(data), "a.tif").getpixel((1, 1)) == (0x12, 0x12, 0x12)


def test_cmyk_is_converted_by_its_profile_or_the_profile_is_noted(tmp_path: Path):
    # An RGB profile on CMYK colours, which some programs leave behind.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    manifest, (image,) = ingested(tmp_path, {"a.jpg": encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95, icc_profile=profile)})
    assert np.allclose(np.asarray(image), [255, 0, 0], atol=6)
    assert "a.jpg has a colour profile that cannot be used: taken as sRGB" in manifest.notes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"])
def test_every_kind_of_pixels_that_tiff_has_is_taken_or_named(tmp_path: Path, mode: str):
    manifest, _ = ingested(tmp_path, {"good.png": encoded(corners()), "a.tif": encoded(Image.new(mode, (16, 16)), "TIFF")})
    said = "a.tif has 32 bits a colour; save it as JPEG or PNG: left out"
    assert (said in manifest.notes) == (mode in ("I", "F")) and len(manifest.photos) == (1 if mode in ("I", "F") else 2)


def test_a_grey_picture_with_a_grey_profile(tmp_path: Path):
    # Gamma 1: what is half of the light is 188 in sRGB, not 128.
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    tags = [(b"wtpt", 156, len(white)), (b"kTRC", 156 + len(white), len(curve))]
    table = struct.pack(">I", len(tags)) + b"".join(struct.pack(">4sII", *tag) for tag in tags)
    size = 128 + len(table) + len(white) + len(curve)
    head = struct.pack(">I4sI4s4s4s12s4s", size, bytes(4), 0x02100000, b"mntr", b"GRAY", b"XYZ ", bytes(12), b"acsp").ljust(68, b"\0")
    profile = (head + struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)).ljust(128, b"\0") + table + white + curve
    image = one(tmp_path, encoded(Image.new("L", (16, 16), 128), icc_profile=profile))
    assert image.getpixel((0, 0)) == pytest.approx((188, 188, 188), abs=2)


def test_the_first_page_of_a_tiff_is_taken(tmp_path: Path):
    data = encoded(Image.new("RGB", (16, 16), "red"), "TIFF", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")])
    assert one(tmp_path, data, "a.tif").getpixel((0, 0)) == (255, 0, 0)


def test_a_raw_picture_is_not_taken_for_its_thumbnail(tmp_path: Path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[50706] = b"\x01\x04\0\0"
    tags.tagtype[50706] = 1
    manifest, _ = ingested(tmp_path, {"good.png": encoded(corners()), "IMG.DNG": encoded(corners(), "TIFF", tiffinfo=tags)})
    assert "IMG.DNG is a raw picture (DNG); save it as JPEG or HEIC: left out" in manifest.notes


# What a photo tells about the person besides the picture

MARK = "MARKER-of-52.5163N"


def marked() -> dict[str, bytes]:
    """A picture of each format with the mark in every place for words that it has."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x9286] = MARK, 1, b"ASCII\0\0\0" + MARK.encode()
    exif[0x8825] = {1: "N", 2: (52.0, 31.0, 0.0), 29: MARK}
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf>{MARK}</rdf></x:xmpmeta>'.encode()
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", 5 + len(MARK)) + b"\x1c\x02\x78" + struct.pack(">H", len(MARK)) + MARK.encode()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + MARK.encode()
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", MARK)
    text.add_text("Author", MARK, zip=True)
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = tags[315] = MARK
    pictures = {kind: Image.effect_noise((64, 64), 20 + i).convert("RGB") for i, kind in enumerate(("JPEG", "PNG", "WEBP", "TIFF", "GIF", "HEIF", "AVIF"))}
    options = {
        "JPEG": {"exif": exif, "xmp": xmp, "comment": MARK, "icc_profile": profile},
        "PNG": {"exif": exif, "pnginfo": text, "icc_profile": profile},
        "WEBP": {"exif": exif, "xmp": xmp, "icc_profile": profile},
        "TIFF": {"exif": exif, "tiffinfo": tags, "icc_profile": profile},
        "GIF": {"comment": MARK},
        "HEIF": {"exif": exif.tobytes(), "xmp": xmp, "icc_profile": profile},
        "AVIF": {"exif": exif.tobytes(), "xmp": xmp, "icc_profile": profile},
    }  # fmt: skip
    files = {f"{kind}-{MARK}-name.{kind}": encoded(image, kind, **options[kind]) + MARK.encode() for kind, image in pictures.items()}
    jpeg = f"JPEG-{MARK}-name.JPEG"
    files[jpeg] = files[jpeg][:2] + b"\xff\xed" + struct.pack(">H", 2 + len(iptc)) + iptc + files[jpeg][2:]
    return files


def test_personal_metadata_reaches_no_file_of_a_finished_run(tmp_path: Path):
    files = marked()
    assert all(data.count(MARK.encode()) >= 2 for data in files.values())
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as new:
        for name, data in files.items():
            new.writestr(name, data)
    run = tmp_path / "run"
    options = ("--trigger", "TOK", "--model", "mini", "--steps", "1", "--batch-size", "1", "--lora-rank", "1", "--resolution", "64")
    assert main(["train", str(tmp_path / "photos.zip"), *options, "--out", str(run)]) == 0
    written = [file for file in run.rglob("*") if file.is_file()]
    assert len(list((run / "photos").iterdir())) == len(files) and (run / "lora.safetensors") in written
    found = {str(file.relative_to(run)) for file in written if MARK.encode() in everything_in(file)}
    # The manifest and the check alone know the names that the photos came with. They stay on this machine, so that messages can name a photo.
    assert found == {"manifest.jsonl", "check.json", "check.html"}
    for name in found:
        assert (text := (run / name).read_text()).count(MARK) == text.count(f"{MARK}-name") >= len(files)


def everything_in(file: Path) -> bytes:
    """The bytes of a file, and those of a PNG's packed chunks unpacked."""
    data = file.read_bytes()
    if file.suffix == ".png":
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            data += repr(image.info).encode()  # type: ignore[attr-defined]
    return data
