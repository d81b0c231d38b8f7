"""Wildcards: the same choice for the same seed, and a sentence for what cannot be chosen from."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer.wildcards import Wildcards, has_wildcards
from lorabooth.errors import UserError

NONE = Wildcards()


def outcomes(text: str, wildcards: Wildcards = NONE) -> set[str]:
    return {wildcards.resolve(text, seed) for seed in range(60)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {red|blue} hat", {"a red hat", "a blue hat"}),
        ("a {red|{dark|light} blue} hat", {"a red hat", "a dark blue hat", "a light blue hat"}),
        ("a {|big }dog", {"a dog", "a big dog"}),
        ("{a}{}", {"a"}),
        ("{a||b}", {"a", "", "b"}),
        (r"\{a|b\} \__x\__ \\ \n", {r"{a|b} __x__ \\ \n"}),
        (r"{a\|b|c\}}", {"a|b", "c}"}),
        ("a | b, snake_case, ___, _x_", {"a | b, snake_case, ___, _x_"}),
    ],
)
def test_every_choice_comes_up_and_no_other(text: str, expected: set[str]):
    assert outcomes(text) == expected


def test_choices_are_independent_and_even():
    found = [NONE.resolve("{a|b}{a|b}", seed) for seed in range(400)]
    assert all(70 < found.count(text) < 130 for text in ("aa", "ab", "ba", "bb"))


def test_the_choice_of_a_seed_is_the_same_for_ever():
    assert [NONE.resolve("{0|1|2|3|4|5|6|7|8|9}", seed) for seed in range(12)] == list("095192738729")


@given(st.text(alphabet="ab{}|\\_ ", max_size=30), st.integers(0, 2**32 - 1))
def test_any_text_is_a_prompt_or_a_sentence(text: str, seed: int):
    try:
        assert NONE.resolve(text, seed) == NONE.resolve(text, seed)
    except UserError as error:
        assert "character" in error.message or "wildcards" in error.message
    else:
        assert has_wildcards(text) or NONE.resolve(text, seed + 1) == NONE.resolve(text, seed)


@given(st.text(max_size=30))
def test_what_is_escaped_is_itself(text: str):
    escaped = "".join("\\" + c if c in "{}|_" else c for c in text.replace("\\", ""))
    assert NONE.resolve(escaped, 1) == text.replace("\\", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [("a {b|c", "character 3 of the prompt is a { without its }"), ("a b} c", "character 4 of the prompt is a } without its {"), ("{a|{b}", "character 1 ")],
)
def test_unbalanced_braces_name_their_place(text: str, words: str):
    with pytest.raises(UserError) as caught:
        NONE.resolve(text, 1)
    assert words in caught.value.message and "\\" in caught.value.hint


def test_deep_braces_are_refused():
    assert NONE.resolve("{" * 10 + "a" + "}" * 10, 1) == "a"
    with pytest.raises(UserError, match="more than 10 deep"):
        NONE.resolve("{" * 3000, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cards" / "sub").mkdir(parents=True)
    (tmp_path / "cards" / "hair.txt").write_bytes(b"\xef\xbb\xbfred\r\n# not this\r\n\r\n{dark|light} brown\r\n")
    (tmp_path / "cards" / "sub" / "who-2.txt").write_text("a man with __hair__ hair")
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path / "cards"


def test_files(folder: Path):
    assert outcomes("__hair__, __sub/who-2__", Wildcards(folder)) >= {"red, a man with red hair", "dark brown, a man with light brown hair"}


def test_a_missing_file_lists_what_is_there(folder: Path):
    with pytest.raises(UserError) as caught:
        Wildcards(folder).resolve("__hare__", 1)
    assert "no wildcard __hare__" in caught.value.message and caught.value.hint == "there are: __hair__, __sub/who-2__"
    with pytest.raises(UserError, match="--wildcards FOLDER"):
        NONE.resolve("__hair__", 1)
    with pytest.raises(UserError, match="no folder of wildcards"):
        Wildcards(folder / "none")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "sub//who-2", ".", "a b", "c:\\x", "link"])
def test_no_name_leaves_the_folder(folder: Path, name: str):
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    try:
        assert Wildcards(folder).resolve(f"__{name}__", 1) == f"__{name}__"
    except UserError as error:
        assert "secret" not in error.message.replace(name, "")


@pytest.mark.parametrize(
    ("text", "words"),
    [("__a__", "more than 10 deep: a > a"), ("__a__ __a__", "deep"), ("# only this", "no line"), ("{", "line 1 of a.txt"), ("x\n" * 10_001, "10,001 lines")],
)
def test_files_that_cannot_be_chosen_from(tmp_path: Path, text: str, words: str):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        Wildcards(tmp_path).resolve("__a__", 1)
    assert words in caught.value.message


def test_files_that_would_fill_the_memory(tmp_path: Path):
    for i in range(9):
        (tmp_path / f"w{i}.txt").write_text(f"__w{i + 1}__ " * 9)
    (tmp_path / "w9.txt").write_text("x")
    with pytest.raises(UserError, match="more than 1,000 choices"):
        Wildcards(tmp_path).resolve("__w0__", 1)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not text in UTF-8"):
        Wildcards(tmp_path).resolve("__b__", 1)
