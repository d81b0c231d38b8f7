"""Findings about the photos together: duplicates, and variety of framing, background and light."""

from collections.abc import Iterator, Sequence

import numpy as np

from lorabooth.check import limits
from lorabooth.check.findings import Finding
from lorabooth.check.measures import Measures
from lorabooth.check.photo_rules import Checked


def of_people(photos: Sequence[Checked]) -> bool:
    """Whether so many photos have a face that the set is of a person."""
    return sum(bool(checked.measures.faces) for checked in photos) >= limits.PEOPLE_SHARE * len(photos)


def near_duplicates(photos: Sequence[Checked]) -> Iterator[Finding]:
    """A finding for each photo that looks like a better one; the best of them, the largest of the sharp ones, has none."""

    def worse(checked: Checked) -> tuple[bool, int, float]:
        sharpness = checked.measures.sharpness
        return sharpness < limits.SHARPNESS, -checked.photo.width_px * checked.photo.height_px, -sharpness

    best_first = sorted(photos, key=worse)
    kept: list[Checked] = []
    for checked in best_first:
        like = next((other for other in kept if _alike(checked.measures, other.measures)), None)
        if like is None:
            kept.append(checked)
            continue
        bits = int((checked.measures.hash != like.measures.hash).sum())
        yield checked.finding(
            "near_duplicate", f"looks like {like.photo.original}: {bits} of 63 bits of their hashes differ, over {limits.HASH_BITS} is wanted"
        )


def _alike(one: Measures, other: Measures) -> bool:
    """Hashes alone take two portraits of one pose for one picture, whatever is worn in them: the colours must agree too."""
    return int((one.hash != other.hash).sum()) <= limits.HASH_BITS and float(np.abs(one.colours - other.colours).mean()) <= limits.HASH_COLOUR


def set_findings(photos: Sequence[Checked], of_person: bool) -> Iterator[Finding]:
    """What the set lacks. of_person: whether it is meant to be of a person, and faces matter."""
    if len(photos) < limits.ENOUGH:
        yield Finding("few_photos", f"{len(photos)} of the {limits.ENOUGH} photos that work well")
    with_face = sum(bool(checked.measures.faces) for checked in photos)
    if of_person and photos[0].measures.faces is not None and not of_people(photos):
        yield Finding("no_faces", f"a face was found in {with_face} of {len(photos)} photos")
    if len(photos) >= limits.SET_PHOTOS:
        if of_person:
            yield from _framing(photos)
        yield from _background(photos)
        spread = float(np.std([checked.measures.light for checked in photos]))
        if spread < limits.LIGHT_SPREAD:
            yield Finding("same_light", f"the brightness of the photos spreads by {spread:.0f} of 255, at least {limits.LIGHT_SPREAD:.0f} is wanted")


def framing(measures: Measures) -> str | None:
    """How much of a person the photo shows, by the height of the face; None without a face."""
    if measures.face is None:
        return None
    if measures.face.height > limits.CLOSE_UP:
        return "close-up"
    return "half body" if measures.face.height > limits.HALF_BODY else "whole body"


def _framing(photos: Sequence[Checked]) -> Iterator[Finding]:
    found = [framing(checked.measures) for checked in photos if checked.measures.face]
    for name in ("close-up", "half body", "whole body"):
        if len(found) >= limits.SET_PHOTOS and found.count(name) >= limits.SAME_FRAMING_SHARE * len(found):
            yield Finding("same_framing", f"{found.count(name)} of {len(found)} photos with a face are framed as {name}")


def _background(photos: Sequence[Checked]) -> Iterator[Finding]:
    """The largest group whose backgrounds are like that of one photo: not chains of likeness, which reach from any room to any other.

    What is behind a mask is not trained on, so photos with one do not count.
    """
    photos = [checked for checked in photos if checked.photo.mask_sha256 is None]
    if len(photos) < limits.SET_PHOTOS:
        return
    histograms = np.stack([checked.measures.background for checked in photos])
    groups = [np.flatnonzero(np.minimum(histograms, one).sum(axis=1) >= limits.BACKGROUND_OVERLAP).tolist() for one in histograms]
    group = max(groups, key=len)
    if len(group) >= limits.SAME_BACKGROUND_SHARE * len(photos):
        alike = [photos[i].photo for i in group]
        reason = f"the borders of {len(alike)} of {len(photos)} photos have the same colours (common part {limits.BACKGROUND_OVERLAP:.0%} or more)"
        yield Finding("same_background", reason, tuple(photo.file for photo in alike), tuple(photo.original for photo in alike))
