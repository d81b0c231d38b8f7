"""`Prompts`: what the command line asks to draw, from an argument, a file or templates, with wildcards chosen and trigger words put in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import click

from infer import templates
from infer.loras import LoraChoice
from infer.request import Request
from infer.textfile import lines_of
from infer.trigger import Trigger, filled, triggers_of
from infer.wildcards import Wildcards, has_wildcards
from lorabooth.arguments import Known, Location
from lorabooth.captions import PLACEHOLDER
from lorabooth.errors import UserError

PROMPTS_LIMIT = 200
PICTURES_LIMIT = 400
SEEDS = 2**32
PERSON = "a person"
"""Who stands in a template where no LoRA says it."""


@dataclass(frozen=True)
class PromptOptions:
    """The options of a command that say where prompts come from."""

    file: Path | None = None
    templates: tuple[str, ...] = ()
    wildcards: Path | None = None
    as_written: bool = False


def prompt_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add those options to a command, which gets them as `prompt_options`."""

    @wraps(command)
    def gathered(*arguments: Any, prompts_file: Path | None, template_names: tuple[str, ...], wildcards: Path | None, as_written: bool, **others: Any) -> None:
        command(*arguments, prompt_options=PromptOptions(prompts_file, template_names, wildcards, as_written), **others)

    path = Location()
    added = (
        click.option("--prompts", "prompts_file", type=path, metavar="FILE", help="Text file with one prompt a line, instead of PROMPT; # begins a remark."),
        click.option(
            "--template",
            "template_names",
            type=Known(*templates.FLUX, templates.ALL),
            multiple=True,
            metavar="NAME",
            help="Portrait template, instead of PROMPT; several times, or 'all'.",
        ),
        click.option("--list-templates", is_flag=True, is_eager=True, expose_value=False, callback=_list_templates, help="Print the templates."),
        click.option("--wildcards", type=path, metavar="FOLDER", help="Folder of text files: __name__ in a prompt is a line of name.txt."),
        click.option("--as-written", is_flag=True, help="Prompts to the letter: put no trigger word in, take {a|b} and __name__ for text."),
    )
    for option in reversed(added):
        option(gathered)
    return gathered


def _list_templates(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(templates.listing())
        context.exit()


@dataclass
class Prompts:
    """Prompts as they were asked for, and what becomes of them."""

    texts: tuple[str, ...]
    triggers: tuple[Trigger, ...]
    wildcards: Wildcards
    as_written: bool
    places: tuple[str, ...] = ()
    """Where each stands, if in a file; for messages."""
    changed: dict[str, str] = field(default_factory=dict)
    """Prompts that lacked a trigger word -> with it."""

    @classmethod
    def read(cls, given: Sequence[str], options: PromptOptions, choices: Sequence[LoraChoice], mini: bool) -> "Prompts":
        """The prompts of exactly one source; a UserError where there is none, or more than one."""
        sources = [name for name, value in (("PROMPT", given), ("--prompts", options.file), ("--template", options.templates)) if value]
        if len(sources) != 1:
            what = f"{' and '.join(sources)} are both given; choose one of them" if sources else "a prompt is missing"
            raise UserError(what, hint='give a PROMPT such as "a portrait of TOK at a conference", --prompts FILE or --template NAME')
        if options.templates and options.as_written:
            raise UserError("--template and --as-written do not go together: a template has no trigger word of its own")
        triggers = triggers_of(choices)
        texts, places = list(given), list[str]()
        if options.file:
            lines = list(lines_of(options.file, PROMPTS_LIMIT))
            texts, places = [line for _, line in lines], [f"{options.file}, line {number}: " for number, _ in lines]
        if options.templates:
            texts = templates.chosen(options.templates, mini, next((t.phrase for t in triggers if t.subject != "style"), PERSON))
        return cls(tuple(texts), triggers, Wildcards(options.wildcards), options.as_written, tuple(places))

    def resolved(self, text: str, seed: int) -> str:
        """What is drawn for a prompt and a seed."""
        if self.as_written:
            return text
        chosen = self.wildcards.resolve(text, seed)
        result = filled(chosen, self.triggers)
        if self.triggers and result != chosen.replace(PLACEHOLDER, self.triggers[0].word):
            self.changed[chosen] = result
        return result

    def requests(self, request: Request) -> list[Request]:
        """A request for each prompt, like `request` in all else; for each picture of a prompt whose words depend on the seed."""
        pictures = len(self.texts) * request.num_outputs
        if pictures > PICTURES_LIMIT:
            raise UserError(f"{len(self.texts)} prompts with {request.num_outputs} pictures each make {pictures}; the limit is {PICTURES_LIMIT}")
        found = []
        for text, place in zip(self.texts, self.places or [""] * len(self.texts), strict=True):
            try:
                found += self._requests(text, request)
            except UserError as error:
                raise UserError(place + error.message, error.hint) from None
        return found

    def _requests(self, text: str, request: Request) -> list[Request]:
        if self.as_written or not has_wildcards(text):
            return [replace(request, prompt=self.resolved(text, request.seed))]
        seeds = ((request.seed + i) % SEEDS for i in range(request.num_outputs))
        return [replace(request, prompt=self.resolved(text, seed), seed=seed, num_outputs=1) for seed in seeds]

    def notes(self) -> list[str]:
        """What was changed, to tell the user; with --as-written, what is missing."""
        if self.as_written:
            lacking = [t.word for t in self.triggers if not all(t.spans(text) for text in self.texts)]
            return [f"the prompt lacks {word!r}, the trigger word of a LoRA; what it learned may not appear" for word in lacking]
        words = ", ".join(trigger.word for trigger in self.triggers)
        if not self.changed:
            return []
        where = f"into the prompt: {next(iter(self.changed.values()))}" if len(self.changed) == 1 else f"into {len(self.changed)} prompts"
        return [f"put the trigger word {words} {where} (--as-written leaves prompts alone)"]
