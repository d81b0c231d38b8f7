"""Findings about captions: without the trigger word, the same several times, or with words that become one with it."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from lorabooth import errors
from lorabooth.captions import PLACEHOLDER, has_trigger, one_line
from lorabooth.check import limits
from lorabooth.check.findings import Finding
from lorabooth.check.photo_rules import Checked

PLAIN = """
a an the of in on at by to with and or as from for into over under near is are was be being this that these those there it its their his her he she they
one some other while wearing photo photograph picture image portrait shot headshot selfie closeup close up view background
"""
"""Words that name nothing in a photo, or only say that it is one."""
PLAIN_WORDS = frozenset(PLAIN.split())
BEINGS = "person people human man men woman women boy girl child kid baby me myself face model subject dog cat style object"
"""What stands in captions and prompts for anybody."""


def caption_findings(photos: Sequence[Checked], trigger_word: str | None, class_phrase: str) -> Iterator[Finding]:
    """What is wrong with the captions there are. Without a trigger word, only [trigger] in them is known."""
    known = PLAIN_WORDS | set(BEINGS.split()) | set(_words(class_phrase))
    if trigger_word and set(trigger_word.casefold().split()) <= known:
        yield Finding("ordinary_trigger", f"the trigger word is {trigger_word}")
    captioned = [(checked, checked.caption) for checked in photos if checked.caption]
    for checked, caption in captioned:
        if trigger_word and not has_trigger(caption, trigger_word):
            yield checked.finding("no_trigger", f"{trigger_word} does not stand in “{_short(caption)}”")
    yield from _repeated(captioned)
    yield from _fused([caption for _, caption in captioned], trigger_word or "", class_phrase)


def _repeated(captioned: Sequence[tuple[Checked, str]]) -> Iterator[Finding]:
    same = defaultdict(list)
    for checked, caption in captioned:
        same[" ".join(caption.casefold().split())].append((checked.photo.file, checked.photo.original, caption))
    for users in same.values():
        if len(users) > 1:
            files, names, captions = zip(*users, strict=True)
            yield Finding("same_caption", f"{len(users)} photos have the caption “{_short(captions[0])}”", files, names)


def _fused(captions: Sequence[str], trigger_word: str, class_phrase: str) -> Iterator[Finding]:
    """Words that stand in every caption beside the trigger word; nothing where there are few captions or all are one."""
    if len(captions) < limits.CAPTIONS or len({" ".join(caption.casefold().split()) for caption in captions}) == 1:
        return
    plain = PLAIN_WORDS | set(_words(trigger_word)) | set(_words(class_phrase))
    common = set.intersection(*(set(_words(caption.replace(PLACEHOLDER, " "))) for caption in captions)) - plain
    if common:
        yield Finding("fused_word", f"{', '.join(sorted(common))} in all {len(captions)} captions")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


def _short(caption: str) -> str:
    """A caption in a message: one line, 60 characters."""
    line = errors.one_line(one_line(caption))
    return line if len(line) <= 60 else line[:59] + "…"
