"""The rules of a caption, on texts that nobody would think of and on what models really say when they go wrong."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from captioning.caption import rules, run, sentence
from captioning.cleaning import clean, complete
from captioning.limit import T5_TOKENS, Limit
from captioning.styles import prompt_of
from lorabooth.captions import enforce, has_trigger, surely_short
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families import load_family
from tests.test_captioning import captions, make_run

MINI = load_family("mini")
QUICK = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def is_trigger(word: str) -> bool:
    try:
        return TrainConfig(trigger_word=word).trigger_word == word
    except ValidationError:
        return False


# What a trigger, a prefix or a model's words could look like: letters that meet the trigger, punctuation, placeholders, many alphabets.
WORDS = st.lists(st.sampled_from(["TOK", "[trigger]", "TOKYO", "a", "man", "a man.", "smiles,", ".", "é", "海", "\n", " ", "\ufeff", "'s", "USER:"])).map(
    " ".join
)
TEXTS = st.one_of(WORDS, st.text(max_size=60))
TRIGGERS = st.one_of(st.sampled_from(["TOK", "@tok", "t.k+", "ohwx man", "名", "a"]), st.text(min_size=1, max_size=12).filter(is_trigger))
PREFIXES = st.one_of(st.sampled_from(["", "a photo of [trigger],", "P", "best:"]), st.text(max_size=10))


@QUICK
@given(TEXTS, TRIGGERS, PREFIXES, PREFIXES)
@example("TOK a man", "TOK", "TOK", "TOK")
def test_a_caption_is_one_line_with_the_trigger_between_prefix_and_suffix(text: str, trigger: str, prefix: str, suffix: str):
    caption = enforce(text, trigger, prefix, suffix)
    assert has_trigger(caption, trigger)
    assert caption == " ".join(caption.split())
    before, after = (" ".join(part.replace("[trigger]", trigger).replace("\ufeff", " ").split()) for part in (prefix, suffix))
    assert caption.startswith(before) and caption.endswith(after)


@QUICK
@given(TEXTS, TRIGGERS)
@example("\n \ufeff TOK", "TOK")
def test_enforcing_twice_changes_nothing(text: str, trigger: str):
    once = enforce(text, trigger)
    assert enforce(once, trigger) == once


@QUICK
@given(TEXTS, st.sampled_from(["TOK", "ohwx man", "名"]), st.sampled_from(["", "a photo of [trigger],", "P"]), st.sampled_from(["", ", studio light", "S"]))
def test_encoding_what_was_generated_changes_nothing(text: str, trigger: str, prefix: str, suffix: str):
    generated = enforce(text, trigger, prefix, suffix)
    assert enforce(generated, trigger, prefix, suffix) == generated == enforce(generated, trigger)


@QUICK
@given(
    st.lists(st.sampled_from(["A man smiles. ", "He wears a hat! ", "TOK ", "word ", "雪", "x" * 40, "?"]), max_size=60).map("".join),
    st.sampled_from(["TOK", "ohwx"]),
)
def test_no_caption_is_longer_than_t5_sees_and_none_loses_trigger_prefix_or_suffix(text: str, trigger: str):
    config = TrainConfig(trigger_word=trigger, model="mini", autocaption_prefix="a photo of", autocaption_suffix="indoors")
    caption = rules(config)(text)
    assert MINI.cut(caption) == "" and has_trigger(caption, trigger)
    assert caption.startswith("a photo of") and caption.endswith("indoors")
    assert rules(config)(caption) == caption


@QUICK
@given(st.text(max_size=80))
def test_a_text_that_is_short_for_sure_is_short(text: str):
    tokens = len(MINI._t5_tokenizer(text).input_ids)
    assert not surely_short(text, tokens - 1)


@pytest.mark.parametrize("text", ["ﷺ" * 5, "㍿ ㍿", "½ ⅓", "…" * 9, "\u00a0\u2028x"])
def test_letters_that_stand_for_several_are_counted_as_several(text: str):
    assert not surely_short(text, len(MINI._t5_tokenizer(text).input_ids) - 1)


def test_a_long_text_is_cut_at_a_sentence_else_a_word_else_anywhere():
    short = 40
    cut = [enforce(text, "TOK", "P", "S", fits=lambda t: len(t) <= short) for text in ("A man. A hat. " * 9, "word " * 30, "x" * 99)]
    assert cut == ["P TOK, A man. A hat. A man. A hat. S", "P TOK, word word word word word word S", f"P TOK, {'x' * 31} S"]


def test_a_prefix_that_leaves_no_room_is_refused_at_once(tmp_path: Path):
    with pytest.raises(UserError, match="leave no room for a caption: the text encoder sees 48 tokens"):
        run(make_run(tmp_path, [None], autocaption_prefix="a very long prefix " * 20))


def test_without_the_tokenizer_of_the_base_a_bound_that_is_never_too_low_cuts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    limit = Limit("someone/not-on-this-machine")
    assert limit.tokens == T5_TOKENS
    assert limit("x" * (T5_TOKENS - 2)) and not limit("x" * (T5_TOKENS - 1))


@pytest.mark.parametrize(
    ("said", "caption"),
    [
        ("a man on a beach", "a man on a beach"),
        ("  a man \n\n on  a\tbeach\x00\u200b ", "a man on a beach"),
        ("USER: <image>\nDescribe it. ASSISTANT: a man", "a man"),
        ("a man. USER: thanks ASSISTANT: you are welcome", "a man."),
        ("ASSISTANT: Caption: a man", "a man"),
        ("Caption: a man", "a man"),
        ('"a man in a hat"', "a man in a hat"),
        ("“a man”", "a man"),
        ("the “old” man", "the “old” man"),
        ("The image shows a man", "a man"),
        ("In this photo, a man smiles", "a man smiles"),
        ("a man<|im_end|>\n<|im_start|>user\nmore", "a man"),
        ("**a man** in [INST] a hat</s>", "a man in a hat"),
        ("- a man", "a man"),
        (", smiling", ", smiling"),
        ("", ""),
        (" \n ", ""),
        ("...", ""),
        ("USER: <image>", ""),
        ("一个男人站在海滩上。", ""),
        ("Мужчина стоит на пляже", ""),
        ("ein Mann in Zürich, 雪", "ein Mann in Zürich, 雪"),
        ("\ud800 a man", "a man"),
    ],
)
def test_what_a_model_says_is_cleaned_to_the_words_of_a_caption(said: str, caption: str):
    assert clean(said) == caption


@QUICK
@given(st.text())
def test_cleaning_gives_one_line_without_control_characters(said: str):
    text = clean(said)
    assert text == " ".join(text.split())
    assert not [c for c in text if unicodedata.category(c)[0] == "C"]
    text.encode()


def test_an_answer_that_was_cut_off_ends_with_its_last_whole_sentence():
    assert complete("wearing a hat. The light is so") == "wearing a hat."
    assert complete("wearing a hat and a") == "wearing a hat and a"


@pytest.mark.parametrize(
    ("opening", "words", "expected"),
    [
        ("a photo of [trigger]", "wearing a hat", "a photo of [trigger] wearing a hat"),
        ("a photo of [trigger]", ", smiling", "a photo of [trigger], smiling"),
        ("a photo of [trigger]", "'s hand", "a photo of [trigger]'s hand"),
        ("a photo of [trigger]", "The man smiles.", "a photo of [trigger]. The man smiles."),
        ("best:", "A man", "best: A man"),
        ("", "A man", "A man"),
    ],
)
def test_a_model_goes_on_with_the_opening_or_starts_anew(opening: str, words: str, expected: str):
    assert sentence(opening, words) == expected


@pytest.mark.parametrize(
    ("config", "opening", "seen"),
    [
        ({}, "a photo of [trigger]", "A photo of a person"),
        ({"class_phrase": "a dog", "subject": "object"}, "a photo of [trigger]", "A photo of a dog"),
        ({"subject": "style"}, "a picture in the style of [trigger], showing", "A picture showing"),
        ({"autocaption_prefix": "portrait of TOK, not TOKYO: "}, "portrait of TOK, not TOKYO:", "Portrait of a person, not TOKYO:"),
    ],
)
def test_the_model_sees_the_opening_without_the_trigger(config: dict[str, str], opening: str, seen: str):
    prompt = prompt_of(TrainConfig(trigger_word="TOK", **config))
    assert (prompt.opening, prompt.seen) == (opening, seen)
    assert "TOK" not in prompt.instruction and "{" not in prompt.instruction


def test_a_person_is_captioned_by_what_is_not_the_person():
    instruction = prompt_of(TrainConfig(trigger_word="TOK")).instruction
    asked, left_out = instruction.split("Leave out")
    assert all(word in asked for word in ("pose", "clothes", "expression", "where", "light"))
    assert all(word in left_out and word not in asked for word in ("face", "hair", "skin", "age"))


class Scripted:
    """Says what it is told to, one text after the other."""

    name, opening, key = "scripted", "a photo of [trigger]", ""

    def __init__(self, *texts: str):
        self.texts = list(texts)

    def caption(self, images: list[Path]) -> list[str]:
        return [self.texts.pop(0) for _ in images]


def test_bad_output_still_makes_captions_that_keep_every_rule(tmp_path: Path):
    said = [
        "",
        "no trigger",
        "word " * 3000,
        "He wears a blue hoodie. " * 600,
        "一个男人站在海滩上。",
        "USER: <image> ASSISTANT:",
        "\ud800\x00\n\n",
        "TOK TOK [trigger]",
    ]
    make_run(tmp_path, [None] * len(said), autocaption_suffix="indoors")
    notes = run(tmp_path, Scripted(*said))
    written = captions(tmp_path)
    template = "a photo of TOK, a person indoors"
    assert [written[i] for i in (0, 4, 5, 6)] == [template] * 4
    assert written[1] == "a photo of TOK no trigger indoors" and written[7] == "a photo of TOK. TOK TOK TOK indoors"
    assert written[3].endswith("hoodie. indoors") and 1 < written[3].count("He wears a blue hoodie.") < 9
    assert all(has_trigger(text, "TOK") and text.endswith("indoors") and "\n" not in text and MINI.cut(text) == "" for text in written)
    assert notes == ["scripted found no words for 4 of 8 photos: the template stands in"]
