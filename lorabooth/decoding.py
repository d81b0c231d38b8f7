"""From the bytes of a picture file to an upright sRGB picture of 8 bits, without metadata.

What is a picture is decided by its bytes. A position or a camera's serial number must not reach a folder that is meant to be shared.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

import pillow_heif
from PIL import AvifImagePlugin, ExifTags, Image, ImageChops, ImageCms, PngImagePlugin

from lorabooth import zips
from lorabooth.entry import LeftOut

PIXELS_LIMIT = 100_000_000
TOO_LARGE = f"has over {PIXELS_LIMIT // 1_000_000} megapixels, which is the limit"
LONG_SIDE_PX = 2048
"""Twice the largest training resolution in use; more costs disk and time at every read and never reaches the model."""

# JPEG opens MPO too, the JPEGs with several pictures that some phones write.
FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "BMP", "GIF")
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".heic", ".heif", ".hif", ".avif", ".tif", ".tiff", ".bmp", ".gif"}

# HEIC for Pillow. The picture alone: what else such a file may hold (thumbnails, depth) is not wanted, and would be decoded.
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
AvifImagePlugin.DEFAULT_MAX_THREADS = 4  # as for HEIC; not one for each of a large machine's cores

# What Pillow's decoders raise on damaged pictures; UnidentifiedImageError and most others are OSError, libheif's are RuntimeError.
PICTURE_FAULTS = (
    OSError,
    SyntaxError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# Unpacked. Pillow has 1 MiB, over which what programs write into PNGs, and colour profiles, may be; the memory of the process is limited in any case.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20

DNG_VERSION = 50706
"""The TIFF tag that tells a raw picture."""

# EXIF orientation -> what makes the picture upright; 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoded:
    """An upright sRGB picture of 8 bits; what was transparent in it is on white, unless all of it was."""

    image: Image.Image
    opacity: Image.Image | None
    """L of the picture's size; None where nothing is transparent. All 0 where everything is."""
    changes: tuple[str, ...]
    """What had to be ignored, as ends of a sentence about the file."""


def decode(name: str, data: bytes) -> Decoded:
    """The picture in a file's bytes. Raises LeftOut."""
    # Pillow warns of damaged EXIF and of sizes that PIXELS_LIMIT covers; a warning is not something a user can act on.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _upright_srgb(_first_frame(data))
        except PICTURE_FAULTS as error:
            raise LeftOut(_not_a_picture(name, data, error)) from error


def as_mask(decoded: Decoded) -> Image.Image:
    """A picture as mask (L): white or opaque is trained on, black or transparent is not. Raises LeftOut."""
    shown = decoded.image.convert("L")
    if decoded.opacity is not None:
        shown = ImageChops.multiply(shown, decoded.opacity)
    if int(shown.getextrema()[1]) < 8:  # type: ignore[arg-type]
        raise LeftOut("is all black: nothing of its photo would be learned")
    return shown


def _first_frame(data: bytes) -> Image.Image:
    """The first frame. Raises LeftOut, or one of PICTURE_FAULTS."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > PIXELS_LIMIT:
        raise LeftOut(TOO_LARGE)
    if image.format == "TIFF" and DNG_VERSION in image.tag_v2:  # type: ignore[attr-defined]
        # Its first picture is a thumbnail, which would pass for the photo.
        raise LeftOut("is a raw picture (DNG); save it as JPEG or HEIC")
    # A JPEG far over what is kept is decoded at half or a quarter of its size: less memory and time.
    image.draft(None, (2 * LONG_SIDE_PX, 2 * LONG_SIDE_PX))
    image.load()
    return image


def _not_a_picture(name: str, data: bytes, error: Exception) -> str:
    """Why bytes gave no picture, as the end of a sentence about the file."""
    if isinstance(error, Image.DecompressionBombError):
        return TOO_LARGE
    if not data:
        return "is an empty file"
    if data.startswith(zips.START):
        return "is an archive, not a picture; unpack it first"
    if PurePosixPath(name).suffix.casefold() in PICTURE_SUFFIXES:
        return "is damaged or not a picture"
    return "is not a JPEG, PNG, WebP, HEIC, AVIF, TIFF, BMP or GIF picture"


def _upright_srgb(image: Image.Image) -> Decoded:
    """A loaded picture turned, reduced and converted. Raises LeftOut, or one of PICTURE_FAULTS."""
    changes: list[str] = []
    profile = image.info.get("icc_profile")
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except PICTURE_FAULTS:
        orientation = 1
        changes.append("has damaged EXIF data: taken as upright")
    reduced = _eight_bits(image)
    # Before anything else, each step of which would hold another 100 megapixels.
    reduced.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX), Image.Resampling.LANCZOS)
    if orientation in UPRIGHT:
        reduced = reduced.transpose(UPRIGHT[orientation])
    flat, opacity = _flat(reduced), _opacity(reduced)
    if profile:
        try:
            flat = _to_srgb(flat, profile)
        except (ImageCms.PyCMSError, OSError, ValueError):
            changes.append("has a colour profile that cannot be used: taken as sRGB")
    return Decoded(flat.convert("RGB"), opacity, tuple(changes))


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture as L, RGB, RGBA or CMYK."""
    if image.mode in ("F", "I"):
        raise LeftOut("has 32 bits a colour; save it as JPEG or PNG")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip them, not scale
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _opacity(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is (L); None where all of them are."""
    if image.mode != "RGBA":
        return None
    alpha = image.getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _flat(image: Image.Image) -> Image.Image:
    """The picture without transparency: on white; its colours alone where there is nothing else of it."""
    if image.mode != "RGBA":
        return image
    if not image.getchannel("A").getextrema()[1]:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The picture in sRGB. Raises ValueError, OSError or PyCMSError where the profile is broken or of another colour space."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
    if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not _is_grey(image)):
        raise ValueError("the profile is not for this picture's colours")
    perceptual = ImageCms.Intent.PERCEPTUAL
    converted = ImageCms.profileToProfile(image.convert(mode), source, ImageCms.createProfile("sRGB"), perceptual, outputMode="RGB")
    assert converted is not None  # only in-place conversion returns nothing
    return converted


def _is_grey(image: Image.Image) -> bool:
    red, *others = image.split()
    return not any(ImageChops.difference(red, other).getbbox() for other in others)


def png(image: Image.Image) -> bytes:
    """The picture alone, without metadata. Level 1 packs photos nearly as well as the default, in a fifth of the time."""
    image.info.clear()
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
