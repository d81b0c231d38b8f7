"""The rules of a caption's text: the trigger is a word of it, prefix and suffix stand around it, and T5 sees all of it. Knows no torch.

captioning/ writes captions by these rules and train/ encodes by them, so that neither a model nor a text file can lose the trigger.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator

PLACEHOLDER = "[trigger]"
Fits = Callable[[str], bool]
"""Whether the text encoder sees all of a text."""


def enforce(text: str, trigger: str, prefix: str = "", suffix: str = "", fits: Fits = lambda _: True) -> str:
    """A caption on one line, with the trigger as a word of its own and the prefix and suffix exactly once, cut until it `fits`.

    It is cut at the end of a sentence, else of a word, else anywhere; trigger, prefix and suffix stay. Doing it again changes nothing.
    """
    text, prefix, suffix = (one_line(part.replace(PLACEHOLDER, trigger)) for part in (text, prefix, suffix))
    while prefix and (match := re.match(whole(prefix), text)):
        text = text[match.end() :].lstrip()
    while suffix and (match := re.search(whole(suffix) + r"\Z", text)):
        text = text[: match.start()].rstrip()

    def around(part: str) -> str:
        if not has_trigger(f"{prefix} {part} {suffix}", trigger):
            part = with_trigger(part, trigger)
        return joined(joined(prefix, part), suffix)

    if fits(around(text)):
        return around(text)
    for ends in (sentence_ends(text), word_ends(text), range(1, len(text))):
        places = [end for end in ends if end < len(text)]
        # The first place at which it is too long; nearly sorted, for dropping the part with the trigger adds the trigger.
        count = bisect_right(places, 0, key=lambda end: int(not fits(around(text[:end].rstrip()))))
        if count:
            return around(text[: places[count - 1]].rstrip())
    return around("")


def one_line(text: str) -> str:
    """The text without line breaks, doubled spaces and byte order marks, which editors leave at a file's start and joins put anywhere."""
    return " ".join(text.replace("\ufeff", " ").split())


def has_trigger(text: str, trigger: str) -> bool:
    """Whether the trigger, or what stands for it, is a word of its own in a text."""
    return PLACEHOLDER in text or re.search(whole(trigger), one_line(text)) is not None


def with_trigger(text: str, trigger: str) -> str:
    """The text with the trigger before it."""
    text = text.lstrip(" ,.;:!?")
    return f"{trigger}, {text}" if text else trigger


def joined(first: str, second: str) -> str:
    """Two parts with a space between them, but none before a comma, a full stop or a genitive."""
    space = "" if not first or not second or re.match("[,.;:!?]|['\u2019]s\\b", second) else " "
    return first + space + second


def whole(words: str) -> str:
    """A pattern for `words` that are not part of longer ones: TOK, but not TOKYO."""
    before = r"(?<!\w)" if re.match(r"\w", words) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", words) else ""
    return before + re.escape(words) + after


def sentence_ends(text: str) -> list[int]:
    """Where sentences end, after their mark."""
    return [match.end() for match in re.finditer("[.!?\u2026]+[\"'\u201d\u2019)]*(?=\\s|\\Z)|[\u3002\uff01\uff1f]+", text)]


def word_ends(text: str) -> Iterator[int]:
    """Where words end."""
    return (match.end() for match in re.finditer(r"\S+", text))


def surely_short(text: str, tokens: int) -> bool:
    """Whether a text has at most so many T5 tokens without counting: a token has at least one character of what SentencePiece
    makes of the text (NFKC), a word may have a mark for itself, and the end has one.
    """
    normal = unicodedata.normalize("NFKC", text)
    return len(normal) + len(normal.split(" ")) + 1 <= tokens
