"""Training by several processes, on one machine or more: what must be the same in all before the first step, and how they end together."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from lorabooth import last_words
from lorabooth.device import compute_device
from lorabooth.errors import UserError
from lorabooth.runs import RunDir
from train.checkpoint import TrainState


@contextmanager
def locked(run_dir: RunDir, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run for all processes. Only the main one writes, and takes the lock; where it does not get it, all end."""
    with ExitStack() as stack:
        refused: list[UserError] = []
        if accelerator.is_main_process:
            try:
                stack.enter_context(run_dir.locked())
            except UserError as error:
                refused.append(error)
        if any(gather_object([bool(refused)])):  # the others must not go on without it
            end_all(accelerator, *(refused or [UserError("the run is locked")]))
        yield


def check_same_end(finished: bool) -> None:
    """Refuse processes of which some have nothing left to do: the others would wait for them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _check_same(Accelerator(cpu=compute_device().type == "cpu"), {"whether it is finished": str(finished)})


def check_same_run(run_dir: RunDir, accelerator: Accelerator) -> None:
    """Refuse processes on several machines that have each its own folder of the run, with other contents; before the base is loaded."""
    if accelerator.num_processes > 1:
        _check_same(accelerator, {"the recipe": _hash(json.dumps(run_dir.config.recipe(), sort_keys=True)), "the photos": _photos(run_dir)})


def check_same_start(state: TrainState, accelerator: Accelerator) -> None:
    """Refuse processes that would start at different steps or weights: the mean of their gradients would fit none of them."""
    if accelerator.num_processes == 1:
        return
    digest = hashlib.sha256()
    for tensor in (*state.parameters, *state.ema):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    _check_same(accelerator, {"the step": f"step {state.step}", "the weights": digest.hexdigest()})


def _check_same(accelerator: Accelerator, facts: dict[str, str]) -> None:
    everywhere = gather_object([facts])
    different = [name for name in facts if len({one[name] for one in everywhere}) > 1]
    if different:
        steps = sorted({one["the step"] for one in everywhere}) if "the step" in different else []
        told = [" and ".join(steps) if name == "the step" else name for name in different]
        error = UserError(
            f"the processes do not have the same run; they differ in {', '.join(told)}",
            hint=f"put the run on a disk that all machines share, and give each of them its folder there; here {accelerator.num_processes} processes met",
        )
        end_all(accelerator, error)


def _photos(run_dir: RunDir) -> str:
    """A digest of the lists of photos, and of what the caches were made from."""
    parts = [file.read_text(encoding="utf-8") for file in (run_dir.path / "manifest.jsonl", run_dir.others / "manifest.jsonl") if file.exists()]
    for file in sorted(run_dir.cache.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as cached:
                parts.append(f"{file.name} {(cached.metadata() or {}).get('key', '')}")
        except (SafetensorError, OSError):  # said when it is read
            parts.append(f"{file.name} damaged")
    return _hash("\n".join(parts))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def batch_note(run_dir: RunDir, step: int, processes: int) -> list[str]:
    """A line where a run goes on with another number of processes than it was trained with last: its batches have another size then."""
    rows = [row for row in run_dir.history() if row.get("event") == "plan" and row["step"] <= step and isinstance(row.get("processes"), int)]
    before = rows[-1]["processes"] if rows and step else processes
    if before == processes:
        return []
    each = run_dir.config.batch_size * run_dir.config.gradient_accumulation
    return [
        f"the run goes on with {processes} of its processes, and had {before} so far: each step now learns from {processes * each} photos, not {before * each}"
    ]


def end_all(accelerator: Accelerator, error: UserError | KeyboardInterrupt) -> NoReturn:
    """End for a reason that every process knows; called by all of them. The main one says it, and to a launcher none has failed: it would kill those that are
    still ending, and print a traceback."""
    code = 130 if isinstance(error, KeyboardInterrupt) else 2
    if accelerator.is_main_process:
        message, hint = (error.message, error.hint) if isinstance(error, UserError) else (str(error), "")
        if not last_words.leave(message, hint, code):
            raise error
    raise SystemExit(0 if last_words.asked_for() else code)


def lost_others(error: RuntimeError) -> bool:
    """Whether an error is what a process sees of the end of another one: the connection to it is gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
