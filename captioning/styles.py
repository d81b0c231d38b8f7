"""What a caption says, by what is trained. What a caption names, the trigger need not learn: so it names all but the subject.

A caption that says "a man with short grey hair" teaches the grey hair to those words; the trigger is left with less of the person, and
the hair comes and goes with the words. Clothes, place and light are named for the same reason turned round: they shall not stick to the trigger.
"""

import re
from dataclasses import dataclass

from lorabooth.captions import PLACEHOLDER, has_trigger, whole
from lorabooth.config import TrainConfig

STYLES = {
    "person": (
        "a photo of [trigger]",
        "Caption this photo in one or two plain sentences. Say what the pose is, which clothes are worn, what the expression is, where it is and "
        "what the light is like. Leave out the face, the hair, the skin, the body and the age, and do not guess who it is.",
    ),
    "object": (
        "a photo of [trigger]",
        "Caption this photo in one or two plain sentences. Say where {class_phrase} is and in which position, what is around it, from which side "
        "it is seen and what the light is like. Leave out its own shape, colour and material.",
    ),
    "style": (
        "a picture in the style of [trigger], showing",
        "Caption this picture in one or two plain sentences. Say who or what is to be seen, doing what, and where. "
        "Leave out the technique, the colours and the mood.",
    ),
}
"""Style -> what opens each caption, and the instruction."""


@dataclass(frozen=True)
class Prompt:
    """What a captioner is told."""

    instruction: str
    opening: str
    """What stands before each caption, said by the program and not by the model; `[trigger]` in it stands for the trigger word."""
    seen: str
    """The opening as the model sees it at the start of its answer, which it goes on with: a person in place of the trigger, a word it knows nothing of."""
    template: str
    """The caption that needs no model."""


def prompt_of(config: TrainConfig) -> Prompt:
    """The prompt of a run. A prefix of the user's own is the opening; where it has the trigger, of the template too."""
    own, instruction = STYLES[config.subject]
    prefix, phrase = config.autocaption_prefix.strip(), config.class_phrase
    opening = prefix or own
    seen = re.sub(whole(config.trigger_word), lambda _: phrase, opening.replace(PLACEHOLDER, phrase))
    style, whom = config.subject == "style", own.removesuffix(", showing")
    if style and not prefix:
        seen = "A picture showing"
    if has_trigger(prefix.replace(PLACEHOLDER, config.trigger_word), config.trigger_word):
        template = prefix if style or re.search(whole(phrase), prefix, re.IGNORECASE) else f"{prefix.rstrip(' ,.;:!?')}, {phrase}"
    else:
        template = whom if style else f"{whom}, {phrase}"
    return Prompt(instruction.format(class_phrase=phrase), opening, seen[:1].upper() + seen[1:], template)
