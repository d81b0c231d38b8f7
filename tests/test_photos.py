"""Photos: what comes out of ingest, whatever comes in; the manifest; the shapes of training."""

import errno
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from drawn_photos import corners, encoded, ingested, one
from PIL import Image, ImageCms, ImageDraw, ImageOps, PngImagePlugin

from lorabooth import photos
from lorabooth.errors import UserError
from lorabooth.photos import Bucket, Manifest, Photo, fit, ingest


def chunks(path: Path) -> set[bytes]:
    """The kinds of chunks in a PNG."""
    data, place, kinds = path.read_bytes(), 8, set()
    while place < len(data):
        kinds.add(data[place + 4 : place + 8])
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return kinds


def test_a_photo_is_stored_under_our_name_and_listed_in_the_manifest(tmp_path: Path):
    manifest, (image,) = ingested(tmp_path, {"me/at the sea.png": encoded(corners()), "me/at the sea.txt": "ein Café".encode()})
    (photo,) = manifest.photos
    assert (photo.file, photo.original, photo.width_px, photo.height_px) == ("00001.png", "me/at the sea.png", 32, 20)
    assert photo.caption == "ein Café" and len(photo.sha256) == 64
    assert np.array_equal(np.asarray(image), np.asarray(corners()))
    assert Manifest.load(tmp_path / "run") == manifest == Manifest.from_jsonl(manifest.to_jsonl())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_comes_out_upright_to_the_pixel(tmp_path: Path, kind: str, orientation: int):
    upright = corners()
    # What a camera stores is the upright picture turned by the inverse of what the tag asks for.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = one(tmp_path, encoded(stored, kind, exif=exif, **options), f"a.{kind.lower()}")
    assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_damaged_exif_data_does_not_cost_the_photo(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = one(tmp_path, encoded(corners(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), "a.jpg")
    assert image.size == (32, 20)


def test_cmyk_becomes_rgb(tmp_path: Path):
    image = one(tmp_path, encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), "a.jpg")
    assert np.allclose(np.asarray(image), [255, 0, 0], atol=6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, kind: str):
    values = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16).repeat(4, axis=0)
    image = one(tmp_path, encoded(Image.fromarray(values), kind))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


def test_big_endian_16_bits_are_scaled_too(tmp_path: Path):
    image = Image.frombytes("I;16B", (2, 1), bytes([0x12, 0x34, 0xFF, 0xFF]))
    assert np.asarray(one(tmp_path, encoded(image, "TIFF")))[0, :, 0].tolist() == [0x12, 0xFF]


def test_transparency_is_flattened_on_white(tmp_path: Path):
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    expected = [[255, 0, 0], [127, 127, 127], [255, 255, 255]]
    assert np.asarray(one(tmp_path, encoded(rgba)))[0, :3].tolist() == expected
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    _, (image,) = ingested(tmp_path, {"p.png": encoded(palette, transparency=1)}, "palette")
    assert np.asarray(image)[0, :2].tolist() == [[255, 0, 0], [255, 255, 255]]
    _, (grey,) = ingested(tmp_path, {"la.png": encoded(Image.new("LA", (4, 2), (0, 0)).copy())}, "grey")
    assert grey.getpixel((0, 0)) == (0, 0, 0), "nothing else is left of it"


def test_a_picture_that_is_transparent_everywhere_is_its_colours(tmp_path: Path):
    manifest, (image,) = ingested(tmp_path, {"a.png": encoded(Image.new("RGBA", (16, 16), (200, 10, 10, 0)))})
    assert image.getpixel((5, 5)) == (200, 10, 10) and manifest.photos[0].mask_sha256 is None
    assert "a.png is transparent everywhere: its colours are taken as they are" in manifest.notes


def test_a_grey_profile_takes_no_colour_from_a_coloured_photo(tmp_path: Path):
    grey = exchanged_profile().replace(b"RGB XYZ", b"GRAYXYZ")
    manifest, (image,) = ingested(tmp_path, {"a.png": encoded(Image.new("RGB", (16, 16), (200, 10, 10)), icc_profile=grey)})
    assert image.getpixel((5, 5)) == (200, 10, 10) and any("colour profile that cannot be used" in note for note in manifest.notes)


def test_texts_in_a_png_do_not_cost_the_photo(tmp_path: Path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Raw profile type xmp", "0123456789abcdef" * 80_000, zip=True)
    assert np.array_equal(np.asarray(one(tmp_path, encoded(corners(), pnginfo=texts))), np.asarray(corners()))


def test_names_that_are_alike_are_one_where_no_other_is_meant(tmp_path: Path):
    """Photos, and what is said of them; of each kind by itself."""
    text, mask, half = b"of ME", encoded(Image.new("L", (32, 20), 255)), encoded(ImageOps.expand(Image.new("L", (16, 20), 255), (0, 0, 16, 0)))
    manifest, _ = ingested(tmp_path, {"me.png": encoded(corners()), "ME.txt": text, "me.mask.png": half, "Me.mask.png": mask}, "one")
    assert manifest.photos[0].caption == "of ME" and manifest.photos[0].mask_sha256
    assert manifest.left_out == (("Me.mask.png", "has the name of another mask, me.mask.png"),)
    manifest, _ = ingested(tmp_path, {"Me.png": encoded(corners()), "me.txt": b"small", "ME.txt": text}, "two")
    assert [photo.caption for photo in manifest.photos] == ["of ME"]
    assert manifest.left_out == (("me.txt", "has the name of another caption, ME.txt"),)
    manifest, _ = ingested(tmp_path, {"a.png": encoded(corners()), "A.webp": encoded(corners(size=(16, 16)), "WEBP"), "a.txt": b"both"}, "three")
    assert [photo.caption for photo in manifest.photos] == ["both", "both"]
    cut = corners()
    cut.putalpha(Image.linear_gradient("L").resize(cut.size))
    manifest, _ = ingested(tmp_path, {"me.png": encoded(cut), "me.mask.png": encoded(Image.new("L", (20, 32), 255))}, "four")
    assert "me.png is transparent in part, which is not trained on" in manifest.notes, "for the mask of another shape does not count"


def test_folders_that_are_not_gone_into_are_named(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encoded(corners()))
    (tmp_path / "photos" / "trip").symlink_to(tmp_path / "elsewhere")
    manifest = ingest(tmp_path / "photos", tmp_path / "run")
    assert len(manifest.photos) == 1 and manifest.left_out == (("trip", "is a link to a folder, which is not followed"),)


def test_each_photo_has_the_caption_of_its_exact_name_where_several_are_alike(tmp_path: Path):
    names = {"A": "cap A", "a": "cap a", "Stra\u00dfe": "sharp", "strasse": "double", "u\u0308": "two", "\u00fc": "one"}
    files = {f"{name}.png": encoded(Image.new("RGB", (16, 16), (i * 9, 0, 0))) for i, name in enumerate(names)}
    files |= {f"{name}.txt": text.encode() for name, text in names.items()}
    manifest, _ = ingested(tmp_path, files)
    assert {photo.original.removesuffix(".png"): photo.caption for photo in manifest.photos} == names and not manifest.left_out


def exchanged_profile() -> bytes:
    """An RGB profile far from sRGB: sRGB's with red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def test_colours_are_converted_to_srgb_by_the_profile(tmp_path: Path):
    image = one(tmp_path, encoded(Image.new("RGB", (16, 16), (255, 0, 0)), icc_profile=exchanged_profile()))
    assert np.allclose(np.asarray(image), [0, 255, 0], atol=2)


@pytest.mark.parametrize("profile", [b"junk" * 50, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_a_profile_that_cannot_be_used_is_ignored_with_a_note(tmp_path: Path, profile: bytes):
    manifest, (image,) = ingested(tmp_path, {"a.png": encoded(corners(), icc_profile=profile)})
    assert np.array_equal(np.asarray(image), np.asarray(corners()))
    assert "a.png has a colour profile that cannot be used: taken as sRGB" in manifest.notes


def test_no_metadata_is_stored(tmp_path: Path):
    exif = Image.Exif()
    exif[0x8825] = {1: "N", 2: (52.0, 31.0, 0.0)}
    exif[0x010F] = "camera"
    jpeg = encoded(corners(), "JPEG", exif=exif, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), dpi=(300, 300), comment=b"x")
    ingested(tmp_path, {"a.jpg": jpeg, "p.png": encoded(corners("P"), transparency=3, dpi=(72, 72))})
    for name in ("00001.png", "00002.png"):
        assert chunks(tmp_path / "run/photos" / name) == {b"IHDR", b"IDAT", b"IEND"}


def test_a_photo_over_2048_px_is_reduced(tmp_path: Path):
    assert one(tmp_path, encoded(Image.new("RGB", (3000, 1500)))).size == (2048, 1024)
    _, (tall,) = ingested(tmp_path, {"a.jpg": encoded(Image.new("RGB", (90, 9000)), "JPEG")}, "tall")
    assert tall.size == (20, 2048)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "MPO"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
        _, (image,) = ingested(tmp_path, {f"a.{kind}": data}, kind)
        assert np.allclose(image.getpixel((0, 0)), (255, 0, 0), atol=2)


def test_what_is_a_picture_is_decided_by_content(tmp_path: Path):
    manifest, _ = ingested(tmp_path, {"a.pdf": encoded(corners()), "b": encoded(corners(size=(16, 16)), "WEBP"), "c.jpg": b"%PDF-1.7", "d.pdf": b"%PDF-1.7"})
    assert [photo.original for photo in manifest.photos] == ["a.pdf", "b"]
    assert "c.jpg is damaged or not a picture: left out" in manifest.notes
    assert "d.pdf is not a JPEG, PNG, WebP, HEIC, AVIF, TIFF, BMP or GIF picture: left out" in manifest.notes


def test_damaged_pictures_are_named_and_the_good_ones_go_on(tmp_path: Path):
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    files = {"good.png": encoded(corners())}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        whole = encoded(noise, kind)
        files |= {f"{sixteenth}.{kind}": whole[: len(whole) * sixteenth // 16] for sixteenth in range(1, 15)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manifest, _ = ingested(tmp_path, files | {"none.jpg": b""})
    assert [photo.original for photo in manifest.photos] == ["good.png"]
    assert len([note for note in manifest.notes if "left out" in note]) == 6 * 14 + 1
    assert "none.jpg is an empty file: left out" in manifest.notes


@pytest.mark.parametrize("side_px", [10_001, 20_000, 100_000])
def test_a_picture_over_100_megapixels_is_left_out_before_it_is_decoded(tmp_path: Path, side_px: int):
    header = b"IHDR" + side_px.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = encoded(corners())[:12] + header + zlib.crc32(header).to_bytes(4, "big") + encoded(corners())[33:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manifest, _ = ingested(tmp_path, {"a.png": encoded(corners()), "bomb.png": bomb})
    assert "bomb.png has over 100 megapixels, which is the limit: left out" in manifest.notes


def test_the_second_of_two_equal_pictures_is_left_out(tmp_path: Path):
    manifest, _ = ingested(tmp_path, {"a.png": encoded(corners()), "b.bmp": encoded(corners(), "BMP")})
    assert [photo.original for photo in manifest.photos] == ["a.png"]
    assert "b.bmp is the same picture as a.png: left out" in manifest.notes


def test_what_belongs_to_the_second_of_two_equal_pictures_goes_to_the_first(tmp_path: Path):
    files = {"a.png": encoded(corners()), "b.bmp": encoded(corners(), "BMP"), "b.txt": b"TOK", "b.mask.png": encoded(Image.new("L", (32, 20), 255))}
    manifest, _ = ingested(tmp_path, files)
    assert [(photo.original, photo.caption, photo.mask_sha256 is not None) for photo in manifest.photos] == [("a.png", "TOK", True)]
    assert not any("b.txt" in note for note in manifest.notes)

    manifest, _ = ingested(tmp_path, files | {"a.txt": b"TOK smiles"}, run="both")
    assert manifest.photos[0].caption == "TOK smiles"
    assert "b.txt is of a picture that came twice, and a.txt is of it too: left out" in manifest.notes


def test_captions_belong_to_the_photo_of_their_folder_and_name_in_any_case(tmp_path: Path):
    a, b, c = (encoded(Image.new("RGB", (16, 16), colour)) for colour in ("red", "lime", "blue"))
    files = {"x/A.PNG": a, "x/a.Txt": b"\xef\xbb\xbfin x\n", "y/a.png": b, "z/e\u0301.png": c, "z/\u00e9.txt": b"accent"}
    manifest, _ = ingested(tmp_path, files)
    assert {photo.original: photo.caption for photo in manifest.photos} == {"x/A.PNG": "\ufeffin x\n", "y/a.png": None, "z/e\u0301.png": "accent"}


def test_captions_that_cannot_be_used_are_noted(tmp_path: Path):
    files = {f"{name}.png": encoded(Image.new("RGB", (16, 16), (i * 9, 0, 0))) for i, name in enumerate("abcde")}
    files |= {"a.txt": "Café".encode("latin-1"), "b.txt": b" \n", "c.txt": b"x" * 70_000, "readme.txt": b"hello", "d.txt": b"d", "D.txt": b"other d"}
    manifest, _ = ingested(tmp_path, files)
    assert [photo.caption for photo in manifest.photos if photo.caption] == ["d"]
    assert sorted(manifest.notes) == [
        "D.txt has the name of another caption, d.txt: left out",
        "a.txt is not UTF-8 text: left out",
        "b.txt is an empty caption: left out",
        "c.txt is over 64 KiB, too long for a caption: left out",
        "readme.txt has no photo of its name: left out",
    ]


def test_two_photos_of_one_name_share_the_caption(tmp_path: Path):
    files = {"a.png": encoded(corners()), "a.webp": encoded(corners(size=(16, 16)), "WEBP"), "a.txt": b"both"}
    manifest, _ = ingested(tmp_path, files)
    assert [photo.caption for photo in manifest.photos] == ["both", "both"]
    assert "a.txt is the caption of 2 photos of its name" in manifest.notes


def test_photos_are_in_the_order_a_person_would_count(tmp_path: Path):
    names = ["10.png", "9.png", "a2.png", "A10.png", "a1.png", "02.png"]
    manifest, _ = ingested(tmp_path, {name: encoded(Image.new("RGB", (16, 16), (i * 9, 0, 0))) for i, name in enumerate(names)})
    assert [photo.original for photo in manifest.photos] == ["02.png", "9.png", "10.png", "a1.png", "a2.png", "A10.png"]


@pytest.mark.parametrize("number", [1, 4, 5])
def test_few_photos_are_taken_with_a_note(tmp_path: Path, number: int):
    manifest, _ = ingested(tmp_path, {f"{i}.png": encoded(Image.new("RGB", (16, 16), (i * 9, 0, 0))) for i in range(number)})
    said = [note for note in manifest.notes if "likeness will be limited; 10-50 work best" in note]
    assert said == ([f"only {number} photo{'s' if number > 1 else ''}: likeness will be limited; 10-50 work best"] if number < 5 else [])


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "is empty"),
        ({"__MACOSX/._a.png": b"x"}, "is empty"),
        ({"a.txt": b"a", "b.txt": b"b"}, "has no photo that can be used, only 2 text files"),
        ({"a.jpg": b"x", "a.txt": b"a"}, "only 1 text file and 1 other file (a.jpg is damaged or not a picture)"),
    ],
)
def test_a_source_without_photos_says_what_was_found_and_what_is_needed(tmp_path: Path, files: dict[str, bytes], found: str):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    for attempt in (lambda: ingested(tmp_path, files), lambda: ingest(folder, tmp_path / "run")):
        with pytest.raises(UserError) as caught:
            attempt()
        assert found in caught.value.message
        assert caught.value.hint == "put 10-50 JPEG, HEIC, PNG or WebP photos in it"
        assert not list((tmp_path / "run").iterdir())


def test_an_ingest_that_was_killed_starts_afresh_and_a_finished_one_is_only_read(tmp_path: Path):
    run = tmp_path / "run"
    for left in ("photos", "photos.part"):
        (run / left).mkdir(parents=True)
        (run / left / "00009.png").write_bytes(b"half")
    manifest, _ = ingested(tmp_path, {"a.png": encoded(corners())})
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == ["manifest.jsonl", "photos", "photos/00001.png"]
    before = (run / "photos/00001.png").stat().st_mtime_ns
    assert ingest(tmp_path / "photos.zip", run) == manifest
    assert (run / "photos/00001.png").stat().st_mtime_ns == before


@pytest.mark.parametrize("write", range(1, 4))
def test_a_failure_at_any_write_leaves_nothing_that_looks_complete(tmp_path: Path, write: int, monkeypatch: pytest.MonkeyPatch):
    writes = 0

    def full(path: Path, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(data)

    files = {"a.png": encoded(corners()), "b.png": encoded(corners(size=(16, 16)))}
    with monkeypatch.context() as patch:
        patch.setattr(photos, "write_durable", full)
        with pytest.raises(UserError, match="the disk is full") as caught:
            ingested(tmp_path, files)
    assert str(tmp_path / "run") in caught.value.message
    assert not (tmp_path / "run/manifest.jsonl").exists() and not (tmp_path / "run/photos.part").exists()
    assert len(ingested(tmp_path, files)[0].photos) == 2


def test_the_folder_that_is_replaced_is_not_taken_as_source(tmp_path: Path):
    kept = tmp_path / "run/photos/mine.png"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(encoded(corners()))
    with pytest.raises(UserError, match="where the photos of this run are put"):
        ingest(kept.parent, tmp_path / "run")
    assert kept.exists()


def test_progress_sees_every_file(tmp_path: Path):
    for name in ("a.png", "b.png", "c.txt"):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (16, 16), (ord(name[0]), 0, 0))))
    seen: list[str] = []

    def watch(found):
        for entry in found:
            seen.append(entry.name)
            yield entry

    ingest(tmp_path, tmp_path / "run", watch)
    assert seen == ["a.png", "b.png", "c.txt"]


@pytest.mark.parametrize("text", ["", "junk", "{}", "[]", '{"notes": []}\n{"file": 1}', '{"count": 1, "notes": []}\n'])
def test_a_damaged_manifest_is_a_sentence(tmp_path: Path, text: str):
    with pytest.raises(UserError, match=r"manifest\.jsonl is missing"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        Manifest.load(tmp_path)


def test_a_manifest_survives_odd_text():
    photo = Photo("00001.png", "line \u2028 and \x85", 1, 2, "0" * 64, "two\nlines \u2029 and more")
    manifest = Manifest((photo,), ("a note\u2028",))
    assert Manifest.from_jsonl(manifest.to_jsonl()) == manifest


def test_a_bucket_keeps_area_and_aspect_in_steps_of_16_px():
    assert Bucket.nearest(1000, 1000, 1024) == Bucket(1024, 1024)
    assert Bucket.nearest(3000, 4000, 1024) == Bucket(height_px=1184, width_px=880)
    for width_px, height_px in ((4000, 3000), (1080, 1920), (5000, 100), (100, 5000), (17, 16)):
        for resolution_px in (64, 512, 768, 1024):
            bucket = Bucket.nearest(width_px, height_px, resolution_px)
            aspect = min(max(width_px / height_px, 1 / 3), 3)
            assert bucket.width_px % 16 == bucket.height_px % 16 == 0 and min(bucket.width_px, bucket.height_px) >= 64
            if resolution_px >= 512:
                assert bucket.width_px * bucket.height_px == pytest.approx(resolution_px**2, rel=0.04)
                assert bucket.width_px / bucket.height_px == pytest.approx(aspect, rel=0.05)


@pytest.mark.parametrize("size", [(64, 64), (641, 479), (100, 900), (900, 100), (1, 1), (2047, 1363)])
def test_fit_gives_exactly_the_bucket(size: tuple[int, int]):
    for resolution_px in (64, 256):
        bucket = Bucket.nearest(*size, resolution_px)
        assert fit(Image.new("RGB", size), bucket).size == (bucket.width_px, bucket.height_px)


def test_fit_crops_sides_evenly_and_keeps_more_of_the_top():
    image = Image.new("RGB", (64, 164), "black")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 63, 24), fill="red")  # a quarter of the 100 px that are too many
    assert fit(image, Bucket(64, 64)).getextrema()[0] == (0, 0)
    draw.rectangle((0, 0, 63, 25), fill="red")
    assert fit(image, Bucket(64, 64)).getpixel((32, 0))[0] > 200
    wide = ImageOps.expand(Image.new("RGB", (64, 64), "lime"), (50, 0), "red")
    assert fit(wide, Bucket(64, 64)).getextrema() == ((0, 0), (255, 255), (0, 0))


def test_fit_leaves_a_picture_of_its_size_as_it_is():
    assert np.array_equal(np.asarray(fit(corners(size=(64, 64)), Bucket(64, 64))), np.asarray(corners(size=(64, 64))))
