"""`lorabooth push`: a run's LoRA goes to the Hugging Face hub."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from lorabooth.arguments import Location
from lorabooth.errors import UserError


def token_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add --hf-token to a command; it goes into this process's environment, where the hub's client and nothing else looks for it."""

    def keep(_: click.Context, __: click.Parameter, token: str | None) -> None:
        if token:
            os.environ["HF_TOKEN"] = token
            sys.argv = [argument.replace(token, "...") for argument in sys.argv]  # trackers record the command line

    text = "Token of the hub that may write; it is written nowhere. [default: HF_TOKEN, or the login of `hf auth login`]"
    return click.option("--hf-token", callback=keep, expose_value=False, help=text)(command)


@click.command()
@click.argument("run", type=Location(file_okay=False))
@click.argument("repository", required=False, metavar="[OWNER/NAME]")
@click.option("--private/--public", default=None, help="Make the repository private, where it is new. [default: as before, at first public]")
@click.option("--force", is_flag=True, help="Write over files that are not of this run.")
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON.")
@token_option
def push(run: Path, repository: str | None, private: bool | None, force: bool, as_json: bool) -> None:
    """Push the LoRA of RUN with its model card, its recipe and sample pictures; never photos or captions.

    The repository is made where there is none. A push that broke off goes on by the same command, without a name too.

    \b
    Example:
      lorabooth push runs/TOK-photos me/tok --private
    """
    from dataclasses import asdict

    from lorabooth import push as pushing
    from lorabooth.licences import licence_of
    from lorabooth.runs import RunDir

    run_dir = RunDir.open(run)
    before = pushing.Push.of(run_dir)
    named = pushing.Push(run_dir.config.hf_repo_id, run_dir.config.hf_private) if before is None else before  # by a training killed before its push
    if not (repository or named.repository):
        raise UserError("a repository is missing", hint=f"name one: lorabooth push {run} OWNER/NAME")
    with run_dir.locked():
        done = pushing.push(run_dir, repository or named.repository, named.private if private is None else private, force)
    licence = licence_of(run_dir.config.model)
    if licence.duties:
        click.echo(f"licence: {licence.name} ({licence.url}); the card says so, and what it asks", err=True)
    click.echo(json.dumps(asdict(done)) if as_json else done.url)
