"""`Trigger`: the word that calls what a LoRA has learned, and putting it into a prompt that lacks it.

Text is only ever added, at one place a word, and in the forms that captions have: "a photo of TOK, a man" and "TOK, ...".
The mini model's captions have the word in the place of "a person", and a prompt with both is none that it knows.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from infer.loras import LoraChoice
from lorabooth.captions import PLACEHOLDER, one_line, whole, with_trigger
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.lora_file import LoraFile
from lorabooth.mini.world import WORLD

ANYONE = TrainConfig.model_fields["class_phrase"].default
"""The class phrase of a recipe that names none."""
PEOPLE = ("person", "man", "woman", "boy", "girl", "guy", "lady", "gentleman", "teenager", "child")
ARTICLES = ("a", "an", "the", "one", "this", "that")
NO_ADJECTIVES = "of|and|or|in|on|at|by|to|with|from|for|as|over|under|near|is|are|was|who|that|not|without"
JOINS = r"[\w'\u2019-]"
"""What makes a longer word of a word: a man-made lake and a man's hat are no men."""
STYLE_OPENING = "a picture in the style of {word}, showing "
"""How the captions of a style begin."""
WORD_CHARACTERS = 100
"""As in a recipe; what a stranger's file names beyond that is not a word."""


@dataclass(frozen=True)
class Trigger:
    """A trigger word, what it was trained on, and the class phrase where the LoRA names one, such as `a man`."""

    word: str
    subject: str = ""
    class_phrase: str = ""
    in_place_of: tuple[str, ...] = ()
    """What the word replaces."""

    @classmethod
    def of(cls, file: LoraFile, word: str) -> "Trigger | None":
        """What a file says of itself and a word of its, which may be a stranger's; None where that is no word."""
        word = one_line(word)
        if not word or len(word) > WORD_CHARACTERS or not word.isprintable() or PLACEHOLDER in word:
            return None
        if word != one_line(file.trigger_words[0]):  # the recipe is the first one's
            return cls(word)
        try:
            recipe = json.loads(file.metadata.get("lorabooth.recipe", "{}"))
            subject, phrase = str(recipe.get("subject", "")), one_line(str(recipe.get("class_phrase", "")))
        except (ValueError, AttributeError, RecursionError):
            return cls(word)
        if file.metadata.get("lorabooth.base") == "mini":
            return cls(word, subject, "", tuple(WORLD["sentences"]["subjects"]))
        plain = subject == "style" or (subject == "object" and phrase == ANYONE)  # a recipe's default says nothing of what is no person
        return cls(word, subject, "" if plain or len(phrase) > WORD_CHARACTERS else phrase)

    @property
    def phrase(self) -> str:
        """`TOK, a man`, or the bare word."""
        return f"{self.word}, {self.class_phrase}" if self.class_phrase else self.word

    def put_into(self, text: str, others: Sequence["Trigger"] = ()) -> str:
        """The text with the word in it: as it is where it has the word, else before the class in it, else at its start.

        others: triggers whose words must stay whole.
        """
        if self.spans(text):
            return text
        taken = [span for trigger in others for span in trigger.spans(text)]
        if (match := self._replaced.search(text)) and not any(start < match.end() and match.start() < end for start, end in taken):
            return text[: match.start()] + self.word + text[match.end() :]
        for match in self._class_pattern.finditer(text) if self._class_pattern else ():
            if not any(start < match.start() < end for start, end in taken):
                return f"{text[: match.start()]}{self.word}, {text[match.start() :]}"
        if self.subject == "style":
            return STYLE_OPENING.format(word=self.word) + text.lstrip()
        return with_trigger(text, self.phrase)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the word stands in a text, as a word of its own."""
        pattern = r"\s+".join(whole(part) for part in self.word.split(" "))
        return [match.span() for match in re.finditer(pattern, text)]

    @property
    def _replaced(self) -> "re.Pattern[str]":
        """The first of what the word replaces; what never matches where that is nothing."""
        return re.compile(rf"(?<!{JOINS})(?:{'|'.join(map(re.escape, self.in_place_of))})(?!{JOINS})" if self.in_place_of else r"(?!)", re.IGNORECASE)

    @property
    def _class_pattern(self) -> "re.Pattern[str] | None":
        """What of a prompt means the subject: the class with an article, and up to two adjectives between. None of a style, or of an unknown class."""
        first, _, rest = self.class_phrase.partition(" ")
        noun = rest if rest and first.lower() in ARTICLES else self.class_phrase
        if not noun:
            return None
        people = PEOPLE if noun == "person" else ("person",) if noun in PEOPLE else ()
        nouns = "|".join(re.escape(n) for n in dict.fromkeys((noun, *people)))
        between = rf"(?:(?!(?:{NO_ADJECTIVES})\b)[\w-]+,?\s+){{0,2}}?"
        return re.compile(rf"(?<!{JOINS})(?:{'|'.join(ARTICLES)})\s+{between}(?:{nouns})(?!{JOINS})", re.IGNORECASE)


def triggers_of(choices: Sequence[LoraChoice]) -> tuple[Trigger, ...]:
    """The triggers of LoRAs, each word once."""
    found = [trigger for choice in choices for word in choice.file.trigger_words if (trigger := Trigger.of(choice.file, word))]
    return tuple({trigger.word: trigger for trigger in reversed(found)}.values())[::-1]


def filled(text: str, triggers: Sequence[Trigger]) -> str:
    """The text with [trigger] replaced by the first word, and every word in it that it lacks."""
    if PLACEHOLDER in text:
        if not triggers:
            raise UserError(f"{PLACEHOLDER} in a prompt needs a LoRA that names its trigger word", hint="write the word itself, or give --lora")
        text = text.replace(PLACEHOLDER, triggers[0].word)
    for trigger in triggers:
        text = trigger.put_into(text, triggers)
    return text
