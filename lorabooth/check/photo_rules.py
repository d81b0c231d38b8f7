"""Findings about one photo: its size, sharpness, light and faces."""

from collections.abc import Iterator
from dataclasses import dataclass

from lorabooth.check import limits
from lorabooth.check.findings import Finding
from lorabooth.check.measures import Measures
from lorabooth.photos import Bucket, Photo


@dataclass(frozen=True, eq=False)
class Checked:
    """A photo, what was measured of it, and the caption that it will be trained with, if it has one already."""

    photo: Photo
    measures: Measures
    caption: str | None

    def finding(self, code: str, reason: str) -> Finding:
        """A finding about this photo alone."""
        return Finding(code, reason, (self.photo.file,), (self.photo.original,))


def photo_findings(checked: Checked, resolutions_px: tuple[int, ...], of_people: bool) -> Iterator[Finding]:
    """What is wrong with one photo. of_people: whether most photos of its set show a face."""
    yield from _size(checked, resolutions_px)
    if checked.measures.sharpness < limits.SHARPNESS:
        where = "the face" if checked.measures.face else "its sharpest part"
        yield checked.finding("blurred", f"sharpness of {where} is {checked.measures.sharpness:.0f}, at least {limits.SHARPNESS:.0f} is wanted")
    yield from _light(checked)
    if of_people and checked.measures.faces is not None:
        yield from _faces(checked, max(resolutions_px))


def _size(checked: Checked, resolutions_px: tuple[int, ...]) -> Iterator[Finding]:
    photo = checked.photo
    size = f"{photo.width_px} x {photo.height_px} px"
    aspect = max(photo.width_px / photo.height_px, photo.height_px / photo.width_px)
    if aspect > limits.ASPECT:
        yield checked.finding("long", f"{size} is {aspect:.1f} to 1, the limit is {limits.ASPECT:.0f} to 1: {1 - limits.ASPECT / aspect:.0%} is cut away")
    low, high = min(resolutions_px), max(resolutions_px)
    if _enlargement(photo, low) > limits.ENLARGED:
        yield checked.finding("small", f"{size} must be enlarged {_enlargement(photo, low):.1f} times for the smallest training size, {low} px")
    elif _enlargement(photo, high) > limits.ENLARGED:
        yield checked.finding("enlarged", f"{size} is enlarged {_enlargement(photo, high):.1f} times for the training size {high} px")


def _enlargement(photo: Photo, resolution_px: int) -> float:
    bucket = Bucket.nearest(photo.width_px, photo.height_px, resolution_px)
    return max(bucket.width_px / photo.width_px, bucket.height_px / photo.height_px)


def _light(checked: Checked) -> Iterator[Finding]:
    measures = checked.measures
    subject = "the face" if measures.face else "the middle"
    burnt = limits.BURNT_FACE_SHARE if measures.face else limits.BURNT_MIDDLE_SHARE
    if measures.bright < limits.DARK:
        yield checked.finding("dark", f"the lights of {subject} reach {measures.bright:.0f} of 255, at least {limits.DARK:.0f} is wanted")
    elif measures.burnt > burnt:
        yield checked.finding("burnt", f"{measures.burnt:.0%} of {subject} is pure white, the limit is {burnt:.0%}")
    elif measures.contrast < limits.FLAT:
        yield checked.finding("flat", f"dark and bright parts are {measures.contrast:.0f} of 255 apart, at least {limits.FLAT:.0f} is wanted")


def _faces(checked: Checked, resolution_px: int) -> Iterator[Finding]:
    faces = checked.measures.faces or ()
    if not faces:
        yield checked.finding("no_face", "no face was found; most of the other photos have one")
        return
    others = [face for face in faces[1:] if face.height >= limits.OTHER_FACE * faces[0].height]
    if others:
        yield checked.finding("several_faces", f"{len(others) + 1} faces of about one size; one is wanted")
    photo = checked.photo
    trained_px = faces[0].height * photo.height_px * _enlargement(photo, resolution_px)
    if trained_px < limits.FACE_PX:
        yield checked.finding(
            "small_face", f"the face is {trained_px:.0f} px high at the training size {resolution_px} px, at least {limits.FACE_PX} is wanted"
        )
