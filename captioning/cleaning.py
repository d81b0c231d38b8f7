"""What a model said -> the words of a caption. Models echo the prompt, put quotation marks around their answer, or fall into another language."""

import re
import unicodedata

from lorabooth.captions import one_line, sentence_ends

ECHO = re.compile(r"\s*(?:user|human|system)\s*:.*?\b(?:assistant|gpt)\s*:", re.IGNORECASE | re.DOTALL)
"""The prompt, said again before the answer."""
LABEL = re.compile(r"\s*(?:(?:assistant|gpt|answer|caption|description)\s*:\s*)+", re.IGNORECASE)
TURN = re.compile(r"(?:^|\s)(?:user|human|system|assistant|gpt)\s*:|</s>|<\|(?:im_end|endoftext)\|>", re.IGNORECASE)
"""Where an answer ends, and a model goes on with a conversation of its own."""
MARK = re.compile(r"<\|[^<>|]*\|>|<s>|<(?:image|video|pad|unk)>|\[/?INST\]|\*\*|^\s*(?:[-*•#]+\s)+")
"""Special tokens and Markdown."""
OPENING = re.compile(
    r"(?:in )?(?:this|the) (?:image|photo|photograph|picture)(?: here)?(?:,| (?:shows|features|depicts|displays|captures|portrays|is of|consists of))\s+",
    re.IGNORECASE,
)
QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "«": "»", "`": "`"}


def clean(text: str) -> str:
    """The caption in what a model said, on one line; empty where there is none, or where most of its letters are not Latin.

    T5 knows Latin letters only: of a text in another alphabet it would see nothing but unknown words.
    """
    text = text[match.end() :] if (match := ECHO.match(text)) else text
    text = text[match.end() :] if (match := LABEL.match(text)) else text
    text = MARK.sub(" ", TURN.split(text, maxsplit=1)[0])
    text = one_line("".join(character for character in text if character.isspace() or unicodedata.category(character)[0] != "C"))
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    text = text[match.end() :] if (match := OPENING.match(text)) else text
    letters = [character for character in text if character.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return text if latin * 2 > len(letters) else ""


def complete(text: str) -> str:
    """The text up to the end of its last whole sentence, where it has one: the rest was cut off by the limit of new tokens."""
    ends = sentence_ends(text)
    return text[: ends[-1]] if ends else text
