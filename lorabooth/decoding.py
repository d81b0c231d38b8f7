"""From the bytes of a picture file to an upright sRGB picture of 8 bits, without metadata.

What is a picture is decided by its bytes. A position or a camera's serial number must not reach a folder that is meant to be shared.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import ExifTags, Image, ImageChops, ImageCms

from lorabooth import archive
from lorabooth.archive import LeftOut

PIXELS_LIMIT = 100_000_000
TOO_LARGE = f"has over {PIXELS_LIMIT // 1_000_000} megapixels, which is the limit"
LONG_SIDE_PX = 2048
"""Twice the largest training resolution in use; more costs disk and time at every read and never reaches the model."""

# JPEG opens MPO too, the JPEGs with several pictures that some phones write.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}

# What Pillow's decoders raise on damaged pictures; UnidentifiedImageError and most others are OSError.
PICTURE_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

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
    """An upright sRGB picture of 8 bits; what was transparent in it is on white."""

    image: Image.Image
    opacity: Image.Image | None
    """L of the picture's size; None where nothing is transparent."""
    changes: tuple[str, ...]
    """What had to be ignored, as ends of a sentence about the file."""


def decode(name: str, data: bytes) -> Decoded:
    """The picture in a file's bytes. Raises LeftOut."""
    # Pillow warns of damaged EXIF and of sizes that PIXELS_LIMIT covers; a warning is not something a user can act on.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _first_frame(data)
        except PICTURE_FAULTS as error:
            raise LeftOut(_not_a_picture(name, data, error)) from error
        return _upright_srgb(image)


def decode_mask(name: str, data: bytes) -> Image.Image:
    """A mask (L): white or opaque is trained on, black or transparent is not. Raises LeftOut."""
    decoded = decode(name, data)
    mask = decoded.image.convert("L")
    if decoded.opacity is not None:
        mask = ImageChops.multiply(mask, decoded.opacity)
    if int(mask.getextrema()[1]) < 8:  # type: ignore[arg-type]
        raise LeftOut("is all black: nothing of its photo would be learned")
    return mask


def _first_frame(data: bytes) -> Image.Image:
    """The first frame. Raises LeftOut, or one of PICTURE_FAULTS."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > PIXELS_LIMIT:
        raise LeftOut(TOO_LARGE)
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
    if data.startswith(archive.ZIP_START):
        return "is an archive inside the archive; unpack it first"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return "is a HEIC picture; save it as JPEG"
    if PurePosixPath(name).suffix.casefold() in PICTURE_SUFFIXES:
        return "is damaged or not a picture"
    return "is not a JPEG, PNG, WebP, TIFF, BMP or GIF picture"


def _upright_srgb(image: Image.Image) -> Decoded:
    changes: list[str] = []
    profile = image.info.get("icc_profile")
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except PICTURE_FAULTS:
        orientation = 1
        changes.append("has damaged EXIF data: taken as upright")
    flat, opacity = _flat(image), _opacity(image)
    if orientation in UPRIGHT:
        flat = flat.transpose(UPRIGHT[orientation])
        opacity = opacity.transpose(UPRIGHT[orientation]) if opacity else None
    if profile:
        try:
            flat = _to_srgb(flat, profile)
        except (ImageCms.PyCMSError, OSError, ValueError):
            changes.append("has a colour profile that cannot be used: taken as sRGB")
    rgb = flat.convert("RGB")
    rgb.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX), Image.Resampling.LANCZOS)
    return Decoded(rgb, opacity.resize(rgb.size) if opacity else None, tuple(changes))


def _opacity(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is (L); None where all of them are, or none is."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() in ((255, 255), (0, 0)) else alpha


def _flat(image: Image.Image) -> Image.Image:
    """The picture as L, RGB or CMYK of 8 bits; where it is transparent, on white."""
    if image.mode == "F":
        raise LeftOut("has floating-point pixels; save it as JPEG or PNG")
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip them, not scale
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The picture in sRGB. Raises ValueError, OSError or PyCMSError where the profile is broken or of another colour space."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
    if mode is None or (mode == "CMYK") != (image.mode == "CMYK"):
        raise ValueError("the profile is not for this picture's colours")
    perceptual = ImageCms.Intent.PERCEPTUAL
    converted = ImageCms.profileToProfile(image.convert(mode), source, ImageCms.createProfile("sRGB"), perceptual, outputMode="RGB")
    assert converted is not None  # only in-place conversion returns nothing
    return converted


def png(image: Image.Image) -> bytes:
    """The picture alone, without metadata. Level 1 packs photos nearly as well as the default, in a fifth of the time."""
    image.info.clear()
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
