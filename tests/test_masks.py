"""Masks of photos: beside them, or their transparency."""

from pathlib import Path

import numpy as np
import pytest
from drawn_photos import corners, encoded, half, ingested, mask_of
from PIL import Image

from lorabooth.photos import Manifest


@pytest.mark.parametrize("name", ["me.mask.png", "ME.MASK.PNG", "me.mask.webp"])
def test_a_mask_beside_a_photo_is_kept_at_its_size(tmp_path: Path, name: str):
    kind = "WEBP" if name.endswith("webp") else "PNG"
    manifest, _ = ingested(tmp_path, {"me.jpg": encoded(corners(), "JPEG"), name: encoded(half((64, 40)).convert("RGB"), kind)})
    (photo,) = manifest.photos
    mask = mask_of(tmp_path, photo)
    assert mask.shape == (20, 32) and (mask[:, :15] > 250).all() and (mask[:, 17:] < 5).all()
    assert Manifest.load(tmp_path / "run") == manifest


def test_what_is_transparent_in_a_photo_is_its_mask(tmp_path: Path):
    photo = corners()
    photo.putalpha(half())
    manifest, _ = ingested(tmp_path, {"me.png": encoded(photo)})
    assert np.array_equal(mask_of(tmp_path, manifest.photos[0]), np.asarray(half()))
    assert any("me.png is transparent in part, which is not trained on" in note for note in manifest.notes)
    opaque = corners()
    opaque.putalpha(255)
    manifest, _ = ingested(tmp_path, {"me.png": encoded(opaque)}, "opaque")
    assert manifest.photos[0].mask_sha256 is None


def test_a_mask_of_its_own_wins_over_transparency_and_may_be_transparent_itself(tmp_path: Path):
    photo, mask = corners(), Image.new("RGB", (32, 20), "white")
    photo.putalpha(half().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    mask.putalpha(half())
    manifest, _ = ingested(tmp_path, {"me.png": encoded(photo), "me.mask.png": encoded(mask)})
    assert np.array_equal(mask_of(tmp_path, manifest.photos[0]), np.asarray(half()))
    assert not any("transparent" in note for note in manifest.notes)


def test_a_mask_is_turned_like_its_photo(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = corners()
    photo.putalpha(half())
    manifest, (image,) = ingested(tmp_path, {"me.png": encoded(photo, exif=exif)})
    turned = half().transpose(Image.Transpose.ROTATE_270)
    assert image.size == turned.size and np.array_equal(mask_of(tmp_path, manifest.photos[0]), np.asarray(turned))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (encoded(Image.new("L", (32, 20), 0)), "me.mask.png is all black: nothing of its photo would be learned: left out"),
        (encoded(Image.new("RGBA", (32, 20), (255, 255, 255, 0))), "me.mask.png is all black: nothing of its photo would be learned: left out"),
        (encoded(half((20, 32))), "me.mask.png has another shape than its photo (20 x 32 px, not 32 x 20): left out"),
        (b"no picture", "me.mask.png is damaged or not a picture: left out"),
    ],
    ids=["black", "transparent", "shape", "damaged"],
)
def test_a_mask_that_cannot_be_used_is_noted_and_the_photo_stays(tmp_path: Path, mask: bytes, said: str):
    manifest, _ = ingested(tmp_path, {"me.png": encoded(corners()), "me.mask.png": mask})
    assert said in manifest.notes and manifest.photos[0].mask_sha256 is None


def test_a_mask_without_a_photo_is_noted(tmp_path: Path):
    manifest, _ = ingested(tmp_path, {"me.png": encoded(corners()), "you.mask.png": encoded(half())})
    assert "you.mask.png has no photo of its name: left out" in manifest.notes and len(manifest.photos) == 1
