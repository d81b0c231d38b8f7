"""The trigger word in a prompt: put in where it is missing, once, in the words of the captions, and never into another word."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.styles import STYLES
from infer.loras import LoraChoice
from infer.trigger import STYLE_OPENING, Trigger, filled, triggers_of
from lorabooth.captions import PLACEHOLDER
from lorabooth.errors import UserError
from lorabooth.lora_file import LoraFile

MAN = Trigger("TOK", "person", "a man")
ANYONE = Trigger("TOK", "person", "a person")
MUG = Trigger("ZUG", "object", "a coffee mug")
INK = Trigger("INK", "style")
STRANGER = Trigger("ohwx")
MINI = Trigger("TOK", "person", "", ("a person", "someone", "a character"))


@pytest.mark.parametrize(
    ("trigger", "prompt", "expected"),
    [
        (MAN, "a portrait of a man, smiling", "a portrait of TOK, a man, smiling"),
        (MAN, "A man in a suit", "TOK, A man in a suit"),
        (MAN, "a portrait of a young bearded man in a suit", "a portrait of TOK, a young bearded man in a suit"),
        (MAN, "a photo of the man", "a photo of TOK, the man"),
        (MAN, "a photo of a person", "a photo of TOK, a person"),
        (MAN, "a photo of TOK as a man of the sea", "a photo of TOK as a man of the sea"),
        (MAN, "a woman in a red dress", "TOK, a man, a woman in a red dress"),
        (MAN, "a picture of man", "TOK, a man, a picture of man"),
        (MAN, "a snowman, a man-made lake, a man's hat", "TOK, a man, a snowman, a man-made lake, a man's hat"),
        (MAN, "a portrait of TOKYO", "TOK, a man, a portrait of TOKYO"),
        (MAN, "a man and a man", "TOK, a man and a man"),
        (ANYONE, "a portrait of a woman at sea", "a portrait of TOK, a woman at sea"),
        (ANYONE, "an oil painting", "TOK, a person, an oil painting"),
        (MUG, "a photo of a red coffee mug", "a photo of ZUG, a red coffee mug"),
        (MUG, "on a table", "ZUG, a coffee mug, on a table"),
        (INK, "a man in a boat", "a picture in the style of INK, showing a man in a boat"),
        (MINI, "a portrait of a person in a red hoodie", "a portrait of TOK in a red hoodie"),
        (MINI, "someone with someone", "TOK with someone"),
        (MINI, "a person-sized hat", "TOK, a person-sized hat"),
        (STRANGER, "a portrait of a man", "ohwx, a portrait of a man"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.word,
)
def test_the_word_is_put_where_the_captions_had_it(trigger: Trigger, prompt: str, expected: str):
    assert filled(prompt, (trigger,)) == expected


def test_the_opening_of_a_style_is_that_of_its_captions():
    assert STYLE_OPENING.format(word=PLACEHOLDER).strip() == STYLES["style"][0]


def test_every_lora_gets_its_word():
    assert filled("a man with a coffee mug", (MAN, MUG, INK)) == "a picture in the style of INK, showing TOK, a man with ZUG, a coffee mug"


def test_the_placeholder_is_the_first_word():
    assert filled("[trigger] and [trigger] by ZUG", (MAN, MUG)) == "TOK and TOK by ZUG"
    with pytest.raises(UserError, match=r"\[trigger\]"):
        filled("a [trigger]", ())


def test_a_word_of_several_words_stays_whole():
    long = Trigger("of a man TOK", "person")
    assert filled("a photo of a man TOK2, of a man TOK", (Trigger("X", "person", "a man"), long)) == "a photo of X, a man TOK2, of a man TOK"


WORDS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
TRIGGERS = st.builds(
    Trigger, WORDS | st.lists(WORDS, min_size=2, max_size=3).map(" ".join), st.sampled_from(["person", "object", "style", ""]),
    st.sampled_from(["", "a man", "a person", "dog", "the coffee mug"]),
)  # fmt: skip
PIECES = st.sampled_from(["a", "A", "man", "person", "woman", "dog", "coffee mug", "TOK", "of", "young", ",", ".", "-", "'s", "in a suit"]) | WORDS


@given(st.lists(PIECES, max_size=12), st.booleans(), TRIGGERS)
def test_one_word_is_added_once_and_nothing_is_lost(pieces: list[str], spaced: bool, trigger: Trigger):
    text = (" " if spaced else "").join(pieces)
    result = filled(text, (trigger,))
    assert trigger.spans(result), "the word is not in it as a word of its own"
    if trigger.spans(text):
        assert result == text
        return
    assert len(trigger.spans(result)) <= 1 + trigger.phrase.count(trigger.word) or trigger.word in STYLE_OPENING
    kept = iter(result)
    assert all(character in kept for character in text.lstrip(" ,.;:!?")), "a character of the prompt is gone"


@given(st.lists(PIECES, max_size=12).map(" ".join), st.lists(TRIGGERS, max_size=3))
def test_doing_it_again_changes_nothing(text: str, triggers: list[Trigger]):
    once = filled(text, triggers)
    assert filled(once, triggers) == once
    assert all(trigger.spans(once) for trigger in triggers)


@given(st.lists(st.sampled_from(["a man", "man", "a", "woman", "in snow", "TOKEN"]), max_size=8).map(" ".join))
def test_no_word_is_split(text: str):
    def words(value: str) -> list[str]:
        return re.findall(r"[\w'-]+", value)

    assert [word for word in words(filled(text, (MAN,))) if word != "TOK"][-len(words(text)) or 99 :] == words(text)


def lora(**metadata: str) -> LoraChoice:
    return LoraChoice(LoraFile(Path("a.safetensors"), metadata, {}), 1.0)


def named(word: str, base: str = "black-forest-labs/FLUX.1-dev", **recipe: object) -> LoraChoice:
    return lora(**{"modelspec.trigger_phrase": word, "lorabooth.base": base, "lorabooth.recipe": json.dumps(recipe)})


def test_what_files_say_of_themselves():
    assert triggers_of([named("TOK", subject="person", class_phrase="a man")]) == (MAN,)
    assert triggers_of([named("TOK", subject="object", class_phrase="a person")]) == (Trigger("TOK", "object"),)
    assert triggers_of([named("TOK", "mini", subject="person", class_phrase="a person")]) == (MINI,)
    assert triggers_of([named("TOK", class_phrase="a man"), named("TOK"), named("B")]) == (Trigger("TOK", "", "a man"), Trigger("B"))
    for recipe in ("[", "[1]", "[" * 100_000, '{"class_phrase": [1]}'):
        [trigger] = triggers_of([lora(**{"modelspec.trigger_phrase": "a\n b", "lorabooth.recipe": recipe})])
        assert trigger.word == "a b"
    for word in ("", " ", "x" * 101, "a [trigger]", "a\0b"):
        assert triggers_of([named(word)]) == ()
