"""`Column`: what one column of a grid applies: no LoRA, a LoRA at a weight, or a checkpoint of a training run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infer.loras import LoraChoice
from infer.references import WEIGHTS
from lorabooth.errors import UserError
from lorabooth.lora_file import LoraFile
from lorabooth.runs import RunDir

DEFAULT_WEIGHTS = "0,0.6,0.8,1,1.2"
COLUMNS_LIMIT = 50
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})\+((?:\d+\.?\d*|\.\d+))")


@dataclass(frozen=True)
class Column:
    """A column's label and its LoRAs."""

    label: str
    loras: tuple[LoraChoice, ...]


NO_LORA = Column("no LoRA", ())


def weight_columns(choices: Sequence[LoraChoice], weights: Sequence[float]) -> list[Column]:
    """No LoRA, then the first LoRA at each weight but 0; the others keep theirs."""
    first, *others = choices
    return [NO_LORA, *(Column(f"weight {weight:g}", (LoraChoice(first.file, weight), *others)) for weight in weights if weight)]


def checkpoint_columns(run: RunDir, folder: Path) -> tuple[list[Column], list[str]]:
    """No LoRA, then each checkpoint of a run, written as a LoRA file into `folder`; and the names of those that cannot be read."""
    from lorabooth import checkpoints

    columns, damaged = [NO_LORA], []
    folder.mkdir(parents=True, exist_ok=True)
    for checkpoint in checkpoints.folders(run):
        file = folder / f"{checkpoint.name}.safetensors"
        if not checkpoints.save_as_lora(run, checkpoint, file):
            damaged.append(checkpoint.name)
            continue
        lora = LoraFile.read(file)
        columns.append(Column(f"step {lora.metadata['ss_steps']}", (LoraChoice(lora, 1.0),)))
    if len(columns) == 1:
        found = f"none of its {len(damaged)} checkpoints is whole" if damaged else "it has no checkpoint yet"
        raise UserError(f"no LoRA in the checkpoints of {run.path}: {found}")
    return columns, damaged


def weights_of(text: str) -> list[float]:
    """`0,0.6,1` or `0..1.2+0.2` (from, to, step), or both by commas -> the weights, each once, in this order."""
    found: list[float] = []
    for part in (part.strip() for part in text.split(",")):
        if match := RANGE.fullmatch(part):
            start, stop, step = map(float, match.groups())
            if not step or not 0 <= (stop - start) / step <= COLUMNS_LIMIT:
                raise UserError(f"the weights {part} are no range of at most {COLUMNS_LIMIT} steps upwards", hint="write from..to+step, such as 0..1.2+0.2")
            found += [start + i * step for i in range(math.floor((stop - start) / step + 1e-6) + 1)]
        elif re.fullmatch(NUMBER, part):
            found.append(float(part))
        else:
            raise UserError(f"{part!r} in --weights is not a weight", hint=f"write them as {DEFAULT_WEIGHTS} or as 0..1.2+0.2")
    weights = list(dict.fromkeys(round(weight, 4) + 0.0 for weight in found))
    for weight in weights:
        if not WEIGHTS[0] <= weight <= WEIGHTS[1]:
            raise UserError(f"the weight {weight:g} is out of range; it must lie from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}")
    if not any(weights):
        raise UserError("a grid needs a weight other than 0: the first column is without a LoRA anyway", hint=f"write them as {DEFAULT_WEIGHTS}")
    if len(weights) > COLUMNS_LIMIT:
        raise UserError(f"{len(weights)} weights are given; the limit is {COLUMNS_LIMIT}")
    return weights
