"""Types of the command line's arguments: what a shell completes for each, and what is refused of all of them."""

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem


class Location(click.Path):
    """A file or a folder. An empty one, as a shell makes of a variable that is not set, would be the current folder: it is refused."""

    def __init__(self, path_type: Any = Path, **kinds: bool) -> None:
        super().__init__(path_type=path_type, **kinds)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx) if str(value) else self.fail("it is empty; is a variable of the shell not set?", param, ctx)


class Known(click.types.StringParamType):
    """Text of which some values are known. They are completed; whether another is right is for who reads it to say.

    otherwise: what is completed where none of them begins like that: "file" (folders, too), "dir" or nothing.
    """

    def __init__(self, *values: str, otherwise: str = "") -> None:
        self.values, self.otherwise = values, otherwise

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(value) for value in self.values if value.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type=self.otherwise)] * bool(self.otherwise)


LORA = Known(otherwise="file")
"""A reference to a LoRA, as infer/references.py reads it."""
