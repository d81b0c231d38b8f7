"""Wildcards in prompts: `{a|b}` chooses one of its parts, `__name__` one line of FOLDER/name.txt.

The seed of a picture decides, and nothing else, so that the picture can be made again. A backslash before `{`, `}`,
`|` or `_` takes its meaning from it.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from infer.textfile import lines_of
from lorabooth.errors import UserError

DEPTH_LIMIT = 10
CHOICES_LIMIT = 1000
"""Choices in one prompt: files that name each other twice would double the text at each depth."""
LINES_LIMIT = 10_000
NAME = re.compile(r"__(?=\S)(.{0,99}?\S)__(?!_)")
SAFE = re.compile(r"[\w-]+(?:/[\w-]+)*")


@dataclass(frozen=True)
class Reference:
    """`__name__` in a text."""

    name: str


@dataclass(frozen=True)
class Choice:
    """`{a|b}` in a text: the texts to choose from."""

    options: "tuple[Parts, ...]"


Parts = tuple[str | Reference | Choice, ...]


class Wildcards:
    """The wildcard files of a folder, if there is one, and choosing from them."""

    def __init__(self, folder: Path | None = None):
        if folder is not None and not folder.is_dir():
            raise UserError(f"no folder of wildcards at {folder}", hint="give one with text files, such as hair.txt with one choice a line")
        self.folder = folder
        self._lines: dict[str, tuple[Parts, ...]] = {}

    def resolve(self, text: str, seed: int) -> str:
        """The text with every choice made, the same for the same seed."""
        return _Resolving(self, seed).text(parse(text, "the prompt"), ())

    def lines(self, name: str) -> tuple[Parts, ...]:
        """The choices that a file holds, parsed."""
        if name not in self._lines:
            file = self._file(name)
            self._lines[name] = tuple(parse(line, f"line {number} of {file.name}") for number, line in lines_of(file, LINES_LIMIT))
        return self._lines[name]

    def _file(self, name: str) -> Path:
        written = f"__{name}__"
        if self.folder is None:
            raise UserError(f"{written} in a prompt needs a folder of wildcards", hint=r"give it with --wildcards FOLDER, or write \_ for an underscore")
        if not SAFE.fullmatch(name):
            raise UserError(f"{written}: the name of a wildcard is made of letters, digits, - and _, with / between folders")
        file = self.folder / f"{name}.txt"
        if not file.is_file():
            raise UserError(f"no wildcard {written}: there is no {name}.txt in {self.folder}", hint=self._there())
        if not file.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"{written} is a link out of the folder {self.folder}", hint="put the file itself there")
        return file

    def _there(self) -> str:
        assert self.folder is not None
        names = sorted(file.relative_to(self.folder).with_suffix("").as_posix() for file in self.folder.rglob("*.txt"))
        shown = ", ".join(f"__{name}__" for name in names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        return f"there are: {shown}" if names else "the folder has no .txt file"


class _Resolving:
    """The choices of one prompt, counted."""

    def __init__(self, wildcards: Wildcards, seed: int):
        self.wildcards, self.seed, self.made = wildcards, seed, 0

    def text(self, parts: Parts, inside: tuple[str, ...]) -> str:
        return "".join(part if isinstance(part, str) else self.chosen(part, inside) for part in parts)

    def chosen(self, part: Reference | Choice, inside: tuple[str, ...]) -> str:
        if isinstance(part, Choice):
            return self.text(self.one_of(part.options), inside)
        if len(inside) == DEPTH_LIMIT:
            way = " > ".join((*inside, part.name))
            raise UserError(f"wildcards name each other more than {DEPTH_LIMIT} deep: {way}", hint="take one of them out of its file")
        return self.text(self.one_of(self.wildcards.lines(part.name)), (*inside, part.name))

    def one_of(self, options: tuple[Parts, ...]) -> Parts:
        self.made += 1
        if self.made > CHOICES_LIMIT:
            raise UserError(f"the wildcards of one prompt make more than {CHOICES_LIMIT:,} choices", hint="let their files name fewer others")
        # A hash, and not Python's generator: the same choice in every version.
        digest = hashlib.sha256(f"{self.seed} {self.made}".encode()).digest()
        return options[int.from_bytes(digest[:8], "big") % len(options)]


@cache
def parse(text: str, where: str) -> Parts:
    """The parts of a text; a UserError names the place of a brace without its other half."""
    parts, end = _parts(text, 0, [], where)
    if end < len(text):
        raise _unbalanced(where, "}", end)
    return parts


def has_wildcards(text: str) -> bool:
    """Whether the seed has a say in what a prompt becomes."""
    return any(not isinstance(part, str) for part in parse(text, "the prompt"))


def _parts(text: str, at: int, opened: list[int], where: str) -> tuple[Parts, int]:
    """The parts from a place on, to the end or to the `|` or `}` that ends this option, and where that is."""
    parts: list[str | Reference | Choice] = []
    while at < len(text):
        match = NAME.match(text, at)
        if text[at] == "\\" and at + 1 < len(text) and text[at + 1] in "{}|_":
            parts.append(text[at + 1])
            at += 2
        elif match and not re.search(r"[{}|\\\n]", match[1]):
            parts.append(Reference(match[1]))
            at = match.end()
        elif text[at] == "{":
            choice, at = _choice(text, at, opened, where)
            parts.append(choice)
        elif text[at] == "}" or (text[at] == "|" and opened):
            break
        else:
            parts.append(text[at])
            at += 1
    return tuple(parts), at


def _choice(text: str, at: int, opened: list[int], where: str) -> tuple[Choice, int]:
    if len(opened) == DEPTH_LIMIT:
        raise UserError(f"character {at + 1} of {where}: braces stand more than {DEPTH_LIMIT} deep in each other")
    options, end = [], at
    while end == at or text[end] == "|":
        option, end = _parts(text, end + 1, [*opened, at], where)
        options.append(option)
        if end == len(text):
            raise _unbalanced(where, "{", at)
    return Choice(tuple(options)), end + 1


def _unbalanced(where: str, brace: str, at: int) -> UserError:
    other = {"{": "}", "}": "{"}[brace]
    return UserError(
        f"character {at + 1} of {where} is a {brace} without its {other}", hint=rf"choices are {{written|like this}}; write \{brace} for the brace itself"
    )
