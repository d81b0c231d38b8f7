"""`TrainState` on disk: enough for a resume that gives the same bytes as a run without the interruption.

A checkpoint is a folder written aside, fsynced and renamed; `state.json` in it lists the sha256 of its files. The
reader takes the newest folder that verifies. Randomness is not stored: it is a function of the seed and the step.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lorabooth.runs import RunDir, publish, sha256_file, sync_folder, write_durable

KEPT = 2


@dataclass
class TrainState:
    """Everything that changes as a run goes on. Tensors are the live ones; `parameters` in the optimiser's order."""

    step: int
    parameters: list[Tensor]
    ema: list[Tensor]
    optimizer: torch.optim.Optimizer


def save_checkpoint(run: RunDir, state: TrainState) -> None:
    """Write the state durably, then drop all but the newest checkpoints."""
    folder = run.checkpoints / f"step-{state.step:06d}"
    if verified(folder):
        return
    for litter in (folder, *run.checkpoints.glob(".part-*")):  # a damaged checkpoint of this step, and what kills left
        shutil.rmtree(litter, ignore_errors=True)
    part = run.checkpoints / f".part-{os.getpid()}"
    part.mkdir(parents=True)
    try:
        for name, tensors in _files(state).items():
            write_durable(part / name, save({k: t.detach().contiguous().cpu() for k, t in tensors.items()}))
        hashes = {file.name: sha256_file(file) for file in part.iterdir()}
        write_durable(part / "state.json", json.dumps({"step": state.step, "sha256": hashes}).encode())
        sync_folder(part)
        publish(part, folder)
    except BaseException:  # a full disk, Ctrl-C: the older checkpoint stays, no litter beside it
        shutil.rmtree(part, ignore_errors=True)
        raise
    later = [other for other in _folders(run) if other.name > folder.name]  # damaged, or the run would stand behind them
    for old in (*later, *_folders(run)[len(later) + KEPT :]):
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(run: RunDir, state: TrainState) -> None:
    """Put the newest checkpoint that verifies into `state`; without one, `state` stays as it is."""
    for folder in _folders(run):
        record = verified(folder)
        if record is None:
            continue
        _restore(state, {name: load_file(folder / name) for name in ("lora.safetensors", "ema.safetensors", "optimizer.safetensors")})
        state.step = record["step"]
        return


def _files(state: TrainState) -> dict[str, dict[str, Tensor]]:
    moments = {
        f"{i}.{name}": value
        for i, parameter in enumerate(state.parameters)
        for name, value in state.optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }
    return {"lora.safetensors": _numbered(state.parameters), "ema.safetensors": _numbered(state.ema), "optimizer.safetensors": moments}


def _restore(state: TrainState, files: dict[str, dict[str, Tensor]]) -> None:
    with torch.no_grad():
        for i, (parameter, average) in enumerate(zip(state.parameters, state.ema, strict=True)):
            parameter.copy_(files["lora.safetensors"][str(i)])
            average.copy_(files["ema.safetensors"][str(i)])
    for key, value in files["optimizer.safetensors"].items():
        index, name = key.split(".", 1)
        parameter = state.parameters[int(index)]
        # AdamW keeps its step count on the CPU unless it is fused on CUDA; the moments lie beside the parameter.
        state.optimizer.state[parameter][name] = value if name == "step" and parameter.device.type == "cpu" else value.to(parameter.device)


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def _folders(run: RunDir) -> list[Path]:
    return sorted(run.checkpoints.glob("step-*"), reverse=True)


def verified(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint whose files are what they were when it was written; None of any other."""
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        whole = all(sha256_file(folder / name) == digest for name, digest in record["sha256"].items())
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None
