"""`TrainState` on disk: enough for a resume that gives the same bytes as a run without the interruption.

A checkpoint is a folder written aside, fsynced and renamed; `state.json` in it lists the sha256 of its files. The
reader takes the newest folder that verifies. Randomness is not stored: it is a function of the seed and the step.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lorabooth.checkpoints import check_shapes, folders, verified
from lorabooth.errors import UserError
from lorabooth.parts import naming
from lorabooth.runs import RunDir, publish, sha256_file, sync_folder, write_durable

KEPT = 2


@dataclass
class TrainState:
    """Everything that changes as a run goes on. Tensors are the live ones; `ema` in the order of `parameters`."""

    step: int
    parameters: list[Tensor]
    ema: list[Tensor]
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    precision: str
    """Of the base's linears."""


def save_checkpoint(run: RunDir, state: TrainState) -> None:
    """Write the state durably, then drop all but the newest checkpoints. A UserError where its numbers have ceased to be any: what is there is kept."""
    if not torch.stack([torch.isfinite(t).all() for t in (*state.parameters, *state.ema)]).all():
        raise UserError(
            f"the LoRA's weights are not finite after step {state.step}; training stopped, the last checkpoint is kept",
            hint="start a new run with a lower --learning-rate or --weight-decay",
        )
    with _one_at_a_time(run):
        _write(run, state)


@contextmanager
def _one_at_a_time(run: RunDir) -> Iterator[None]:
    """Of several processes whose memory runs out at once each wants to save the same step; the later ones find it saved."""
    with (run.path / ".saving").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(run: RunDir, state: TrainState) -> None:
    folder = run.checkpoints / f"step-{state.step:06d}"
    if verified(folder):
        return
    for litter in (folder, *run.checkpoints.glob(".part-*")):  # a damaged checkpoint of this step, and what kills left
        shutil.rmtree(litter, ignore_errors=True)
    part = run.checkpoints / f".part-{os.getpid()}"
    run.checkpoints.mkdir(exist_ok=True)
    part.mkdir()
    try:
        with naming(folder, part):
            moments: dict[str, Tensor] = {}
            optimizer = _without_tensors(state.optimizer.state_dict(), "", moments)
            files = {"lora.safetensors": _numbered(state.parameters), "ema.safetensors": _numbered(state.ema), "optimizer.safetensors": moments}
            for name, tensors in files.items():
                # Cloned: bitsandbytes' states share one table, and a safetensors file holds no shared tensors.
                write_durable(part / name, save({k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}))
            hashes = {file.name: sha256_file(file) for file in part.iterdir()}
            record = {"step": state.step, "optimizer_name": state.optimizer_name, "optimizer": optimizer, "precision": state.precision, "sha256": hashes}
            write_durable(part / "state.json", json.dumps(record).encode())
            sync_folder(part)
            publish(part, folder)
    except BaseException:  # a full disk, Ctrl-C: the older checkpoint stays, no litter beside it
        shutil.rmtree(part, ignore_errors=True)
        raise
    for later in (other for other in _folders(run) if other.name > folder.name):  # damaged, or the run would stand behind them
        shutil.rmtree(later, ignore_errors=True)
    drop_old(run)


def drop_old(run: RunDir) -> None:
    """Keep the newest checkpoints only."""
    for old in _folders(run)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def saved_step(run: RunDir) -> int:
    """The step of the newest checkpoint that verifies; 0 without one."""
    record = next(filter(None, map(verified, _folders(run))), None)
    return int(record["step"]) if record else 0


def saved_precision(run: RunDir) -> str | None:
    """The base's precision at the newest checkpoint that verifies; None without one."""
    record = next(filter(None, map(verified, _folders(run))), None)
    return record.get("precision") if record else None


def load_checkpoint(run: RunDir, state: TrainState) -> None:
    """Put the newest checkpoint that verifies into `state`; without one, `state` stays as it is."""
    for folder in _folders(run):
        record = verified(folder)
        if record is None:
            continue
        if record["optimizer_name"] != state.optimizer_name:
            raise UserError(
                f"the run {run.path} was trained with {record['optimizer_name']} so far, and here 'auto' means {state.optimizer_name}",
                hint="go on with it on a machine of the same kind, or start a new run with --out FOLDER",
            )
        lora, ema, moments = (load_file(folder / f"{name}.safetensors") for name in ("lora", "ema", "optimizer"))
        check_shapes(folder, [lora[str(i)] for i in range(len(lora))], state.parameters)
        with torch.no_grad():
            for i, (parameter, average) in enumerate(zip(state.parameters, state.ema, strict=True)):
                parameter.copy_(lora[str(i)])
                average.copy_(ema[str(i)])
        optimizer = _with_tensors(record["optimizer"], moments)
        state.optimizer.load_state_dict(optimizer | {"state": {int(i): moment for i, moment in optimizer["state"].items()}})
        state.step = record["step"]
        return


def _without_tensors(value: Any, name: str, taken: dict[str, Tensor]) -> Any:
    """An optimiser's state_dict as JSON: each tensor is put into `taken` by the name of its place, and that name into the JSON."""
    if isinstance(value, Tensor):
        taken[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {str(key): _without_tensors(item, f"{name}.{key}", taken) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{name}.{i}", taken) for i, item in enumerate(value)]
    return value


def _with_tensors(value: Any, taken: dict[str, Tensor]) -> Any:
    """What `_without_tensors` took apart; tuples come back as lists and whole-number keys as text."""
    if isinstance(value, dict):
        return taken[value["tensor"]] if value.keys() == {"tensor"} else {key: _with_tensors(item, taken) for key, item in value.items()}
    return [_with_tensors(item, taken) for item in value] if isinstance(value, list) else value


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def _folders(run: RunDir) -> list[Path]:
    return folders(run)[::-1]
