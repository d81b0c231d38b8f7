"""What the check can find: one table of kinds, each with what to do about it. docs/photos.md shows the same table with the limits."""

from dataclasses import dataclass
from typing import Literal

Weight = Literal["warning", "hint"]


@dataclass(frozen=True)
class Kind:
    """A kind of finding. Warnings count in the verdict; a hint is for a person to judge."""

    weight: Weight
    title: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """One finding: its kind, the photos it is about (none: the whole set), and the figure with its limit."""

    code: str
    reason: str
    files: tuple[str, ...] = ()
    """Photos in the run, such as "00001.png"; empty for the whole set and for files that were left out."""
    names: tuple[str, ...] = ()
    """The names they came with."""

    @property
    def kind(self) -> Kind:
        """Weight, title and advice."""
        return KINDS[self.code]


KINDS: dict[str, Kind] = {
    "left_out": Kind("hint", "not used", "Mend it and add it again: a photo as JPEG, a caption or mask under its photo's name. Otherwise it stays out."),
    "duplicate": Kind("hint", "the same picture twice", "Nothing: it is used once."),
    "near_duplicate": Kind("warning", "nearly the same picture", "Keep the best one: what is shown twice is learned twice as much, its background too."),
    "small": Kind("warning", "too small", "Take the original instead of a copy from a chat or a web page, or train with a lower --resolution."),
    "enlarged": Kind("hint", "smaller than the largest training size", "Good enough; a larger original would give more detail."),
    "long": Kind("warning", "too long", "Cut it around the subject yourself: training cuts its ends."),
    "blurred": Kind("warning", "blurred", "Leave it out, or take it again with more light or a steady hand: blur is learned like a feature."),
    "dark": Kind("warning", "too dark", "Leave it out or brighten it; take photos with the light in front of the subject."),
    "burnt": Kind("warning", "burnt out", "Leave it out, or take it again out of the direct sun or flash: white skin has no detail to learn."),
    "flat": Kind("warning", "no contrast", "Clean the lens or raise the contrast."),
    "no_face": Kind("warning", "no face found", "Leave it out if the face cannot be seen; a turned head in one photo of ten does no harm."),
    "several_faces": Kind("warning", "several faces", "Cut it to the person: otherwise the trigger word means the others as well."),
    "small_face": Kind("warning", "the face is too small", "Cut it closer to the person, or train with a higher --resolution."),
    "ordinary_trigger": Kind(
        "warning",
        "the trigger word is an ordinary word",
        "Take a rare one such as TOK, or add one (TOK man): captions and the model have their own meaning for this one.",
    ),
    "no_trigger": Kind("warning", "the caption lacks the trigger word", "Write the trigger word, or [trigger], where the caption names the subject."),
    "same_caption": Kind("hint", "the same caption", "Say what differs (clothes, place, light): what no caption names is learned as part of the trigger word."),
    "fused_word": Kind(
        "hint",
        "words in every caption",
        "Take what belongs to the subject out of the captions, and add photos without the rest: such words and the trigger word become one.",
    ),
    "few_photos": Kind("hint", "few photos", "Add photos: 10-50 work best."),
    "no_faces": Kind("hint", "hardly any faces", "Right for a thing, an animal, a style or drawings; for a person, add photos that show the face."),
    "same_framing": Kind("hint", "all framed alike", "Add the other framings (face, half body, whole body): those that are missing must be guessed."),
    "same_background": Kind(
        "warning", "the same background", "Take photos at other places, or name the background in captions: otherwise it comes with the trigger word."
    ),
    "same_light": Kind("hint", "the same light", "Add photos in other light: indoors, in the sun, in the evening."),
}
