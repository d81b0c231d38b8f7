"""The consent of the people in the photos: asked for once, remembered for the user, recorded in every run.

What is recorded is what the user said, when and how. Nobody can check it, so the LoRA says whose word it is.
"""

import errno
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import click

from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.notes import note
from lorabooth.runs import RunDir, write_durable

Way = Literal["option", "terminal", "remembered"]

STATEMENT = "Everyone who can be recognised in the photos has agreed to their use for this training, or their guardian has."
QUESTION = (
    "Training on photos of a person needs that person's consent.\n"
    "Has everyone in these photos agreed, and will you ask everyone in later ones? The answer is kept: this is asked once."
)
NO_PERSON = "photos of things or drawings need none: add --subject object or --subject style"


@dataclass(frozen=True)
class Consent:
    """What a user said of the people in the photos."""

    statement: str
    given: str
    """When it was said: UTC, ISO 8601."""
    way: Way
    """The option --consent, the question at the terminal, or an answer remembered from an earlier run."""

    def sentence(self) -> str:
        """For what is passed on with a LoRA: report, metadata, model card."""
        return f"{self.statement} (So its maker stated on {self.given[:10]}.)"


def needed(config: TrainConfig) -> bool:
    """Whether the photos show people: the mini model knows drawn ones only."""
    return config.subject == "person" and config.model != "mini"


def recorded(run_dir: RunDir) -> Consent | None:
    """The consent of a run; None where it needed none."""
    record = run_dir.read_json("consent.json")
    try:
        found = Consent(**record) if record else None
        if found and not all(isinstance(value, str) for value in vars(found).values()):
            raise TypeError
        return found
    except TypeError:
        raise UserError(f"{run_dir.path / 'consent.json'} is damaged", hint="delete that file, then run the same command again with --consent") from None


def record(run_dir: RunDir, consent: Consent | None) -> None:
    """Write the consent into the run, where there is one."""
    if consent:
        run_dir.write_json("consent.json", asdict(consent))


def obtain(config: TrainConfig, run_dir: RunDir, option: bool) -> Consent | None:
    """The consent to record in a run that has none yet; None where it has one or needs none. `option`: --consent was given.

    Raises UserError where it is refused, or where there is nobody to ask.
    """
    if recorded(run_dir) or not (option or needed(config)):
        return None
    if option:
        return _remember("option")
    if remembered := _remembered():
        return replace(remembered, way="remembered")
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(
            "training on photos of a person needs that person's consent, and there is no terminal to ask at",
            hint=f"if everyone in them has agreed, add --consent, once: it is remembered; {NO_PERSON}",
        )
    # On standard error: standard output is for the result.
    if not click.confirm(QUESTION, default=False, err=True):
        raise UserError("nothing was trained: photos of a person need that person's consent", hint=f"ask them, then run the same command again; {NO_PERSON}")
    return _remember("terminal")


def _remembered() -> Consent | None:
    """The answer of an earlier run; None where there is none that can be read."""
    try:
        return Consent(**json.loads(_file().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _remember(way: Way) -> Consent:
    consent = Consent(STATEMENT, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), way)
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_durable(_file(), json.dumps(asdict(consent), indent=1).encode())
    except OSError as error:  # a home that cannot be written, as in a container, must not stop a training
        note(f"the consent is recorded in the run, but cannot be remembered ({error.strerror})")
    return consent


def _file() -> Path:
    """Where the user's answer is kept. Raises OSError where the user has no home."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
    if not folder.is_absolute():
        raise OSError(errno.ENOENT, "no home folder")
    return folder / "lorabooth" / "consent.json"
