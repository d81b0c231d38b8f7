"""`lorabooth loras`: the LoRAs of this machine, and everything that one of them tells."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from infer.lora_list import Listed, listed
from infer.table import cut, table
from lorabooth.arguments import LORA, Location
from lorabooth.errors import UserError
from lorabooth.imports import heavy_imports

TEXT_CHARACTERS = 300
NAMED = 5
ALWAYS = ("attention", "feed-forward", "norms")
"""Kinds of layers of which it is said, too, that none is changed."""


@click.group(invoke_without_command=True)
@click.option("--runs", type=Location(), default=Path("runs"), show_default=True, help="Folder of the runs.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def loras(context: click.Context, runs: Path, as_json: bool) -> None:
    """List the LoRAs of this machine: of runs, of downloads, of the hub's cache.

    \b
    Example:
      lorabooth loras
    Example, everything that one file tells:
      lorabooth loras info runs/TOK-photos
    """
    if context.invoked_subcommand:
        # They would be ignored: the subcommand has its own.
        if given := [name for name in ("runs", "as_json") if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]:
            raise click.UsageError(
                f"--{given[0].removeprefix('as_')} before {context.invoked_subcommand} is of the list: give options behind {context.invoked_subcommand}"
            )
        return
    found = listed(runs)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
    elif found:
        click.echo(table(("NAME", "TRIGGER", "BASE", "RANK", "SIZE", "DATE", "FROM"), [_row(one) for one in found], right=("RANK", "SIZE")))
    else:
        click.echo(f"no LoRA in {runs}, among the downloads or in the hub's cache", err=True)


@loras.command()
@click.argument("references", type=LORA, nargs=-1, required=True, metavar="RUN|FILE|HUB-ID|URL...")
@click.option("--layers", "with_layers", is_flag=True, help="List each layer of the base that it changes.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON: a list, one for each file.")
@click.pass_context
def info(context: click.Context, references: tuple[str, ...], with_layers: bool, as_json: bool) -> None:
    """Everything that a LoRA tells: format, layers, ranks, strength, base, training, hashes.

    \b
    Example:
      lorabooth loras info runs/TOK-photos
      lorabooth loras info owner/name style.safetensors --json
    """
    from infer.loras import unweighted

    found, failed = [], 0
    for reference in references:
        try:
            file = unweighted(reference, "to describe")
            with heavy_imports():  # which a reference to nothing need not wait for
                from infer import lora_info

            found.append(lora_info.info(file))
            if not as_json:
                click.echo(described(found[-1], with_layers) + "\n" * (reference != references[-1]))
        except UserError as error:  # the others are told all the same
            failed += 1
            click.echo(f"lorabooth: {error}", err=True)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    context.exit(2 if failed else 0)


def described(told: dict[str, Any], with_layers: bool) -> str:
    """What `lora_info.info` found, for people."""
    words = told["trigger_word"] or (f"not told; often in its captions: {', '.join(told['words_in_captions'])}" if told["words_in_captions"] else "not told")
    lines = {
        "file": f"{told['path']}, {size_text(told['bytes'])}",
        "format": told["format"] + (", DoRA" if told["dora"] else ""),
        "base": told["base"] or "not told",
        "trigger word": words,
        "rank": _histogram(told["ranks"]),
        "numbers": _histogram(told["dtypes"], "tensors"),
    }
    if told["problem"]:
        lines["not usable"] = told["problem"]
    else:
        lines |= _of_tensors(told)
    lines |= told["training"]
    lines |= {"sha256": told["sha256"], "hash": f"{told['tensors_sha256'][:12]} (kohya's and AUTOMATIC1111's, of the tensors)"}
    text = "\n".join([cut(told["name"]), *(f"  {name:<13} {cut(line, TEXT_CHARACTERS)}" for name, line in lines.items())])
    if with_layers and not told["problem"]:
        rows = [(layer["name"], layer["kind"], str(layer["rank"]), f"{layer['norm']:.4g}") for layer in told["layers"]]
        text += "\n\n" + table(("LAYER", "KIND", "RANK", "CHANGE"), rows, right=("RANK", "CHANGE"))
    return text


def size_text(bytes_: int) -> str:
    """A file's size: in MB, or in kB where it is small."""
    return f"{bytes_ / 1e6:,.1f} MB" if bytes_ >= 1e6 else f"{bytes_ / 1e3:,.1f} kB"


def _of_tensors(told: dict[str, Any]) -> dict[str, str]:
    kinds = {name: kind for name, kind in told["layers_by_kind"].items() if kind["changed"] or name in ALWAYS}
    lines = {
        "layers": ", ".join(f"{name} {kind['changed']}" + (f" of {kind['of']}" if kind["of"] else " (not used)") for name, kind in kinds.items()),
        "alpha": f"{_histogram(told['alphas'])}; strength {_histogram(told['strengths'])}",
        "change": ", ".join(f"{name} {kind['norm']:.4g}" for name, kind in kinds.items() if kind["norm"]) + f"; all {told['norm']:.4g}",
    }
    left = told["left_out"]
    if left:
        more = f" and {len(left) - NAMED} more" * (len(left) > NAMED)
        lines["left out"] = f"no place in {told['fits']} for {', '.join(cut(name) for name in left[:NAMED])}{more}"
    return lines


def _histogram(counts: dict[str, int], what: str = "layers") -> str:
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{value} ({count} {what})" for value, count in list(counts.items())[:NAMED]]
    return ", ".join(shown) + " ..." * (len(counts) > NAMED)


def _row(one: Listed) -> tuple[str, ...]:
    if one.problem:
        return one.name, f"damaged: {one.source} {one.problem}"
    return one.name, one.trigger_word, one.base, one.rank, size_text(one.bytes), one.date, one.source
