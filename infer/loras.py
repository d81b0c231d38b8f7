"""`LoraStore`: a LoRA reference from the command line -> a local safetensors file.

A reference is a run folder, a file, or a hub repository (`owner/name` or `owner/name/file.safetensors`), each with an
optional `:weight` behind it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from lorabooth import hub
from lorabooth.errors import UserError
from lorabooth.lora import LoraFile

WEIGHTS = (-2.0, 3.0)


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file and the weight it is applied with."""

    file: LoraFile
    weight: float


def resolve(reference: str) -> LoraChoice:
    """The file of a reference, checked; a UserError says what was looked for where."""
    name, weight = split_weight(reference)
    return LoraChoice(LoraFile.read(_locate(name)), weight)


def split_weight(reference: str) -> tuple[str, float]:
    """`runs/tok:0.8` -> (`runs/tok`, 0.8); without a weight, 1.0."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+)", reference)
    if not match or Path(reference).exists():
        return reference, 1.0
    weight = float(match.group(2))
    if not WEIGHTS[0] <= weight <= WEIGHTS[1]:
        raise UserError(f"the weight of {match.group(1)} is {weight:g}; it must lie from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}")
    return match.group(1), weight


def _locate(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "lora.safetensors").exists():
            return path / "lora.safetensors"
        if (path / "config.json").exists():
            raise UserError(f"the run {name} has no LoRA yet: its training has not ended", hint="run the same lorabooth train command again to go on")
        return _only_one(path, sorted(path.glob("*.safetensors")), name)
    if path.exists():
        return path
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+\.safetensors))?", name)
    if not match or name.startswith((".", "/", "~")) or (name.endswith(".safetensors") and not match.group(2)):
        raise UserError(f"no LoRA at {name!r}", hint="give a run folder, a .safetensors file, or a hub repository such as owner/name")
    repository, file = match.groups()
    # The hub's patterns match across folders; trainers put each checkpoint's LoRA into one, and none of those is asked for.
    folder = hub.download(repository, (file,)) if file else hub.download(repository, ("*.safetensors",), ignored=("*/*",))
    if file and not (folder / file).exists():
        raise UserError(f"{repository} has no file {file}")
    return _only_one(folder, [folder / file] if file else sorted(folder.glob("*.safetensors")), name)


def _only_one(folder: Path, files: list[Path], name: str) -> Path:
    named = [f for f in files if f.name == "lora.safetensors"] or files
    if len(named) == 1 and named[0].exists():
        return named[0]
    if not named:
        raise UserError(f"{name} holds no .safetensors file", hint="only safetensors is read: other formats can run code when loaded")
    raise UserError(f"{name} holds several LoRA files: {', '.join(f.name for f in named)}", hint=f"name one, such as {name}/{named[0].name}")
