"""A run's figures and previews for TensorBoard, Weights & Biases and trackio, by accelerate's trackers; metrics.jsonl has the figures in any case."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.notes import note
from lorabooth.runs import RunDir

WANDB_CHECK = """
import sys, wandb
try:
    wandb.Settings(project=sys.argv[1])
    wandb.login(verify=False)
except Exception as error:
    sys.exit(str(error))
"""
"""Reads wandb's settings and looks for a key, where one is needed; asks no server and starts no run. In a process of its own, for wandb keeps what it read."""
HINTS = {
    "project": "choose another --wandb-project",
    "mode:": "set WANDB_MODE to online, offline or disabled",
    "api key": "log in with wandb login, or set WANDB_API_KEY to a key of yours",
}
"""By a word in what a tracker says of it."""


def check_trackers(config: TrainConfig) -> None:
    """A UserError where a tracker's package is not installed, and where wandb could not start even with a network."""
    for name in config.tracker_names:
        if name != "tensorboard" and find_spec(name) is None:
            raise UserError(f"the tracker {name} is not installed", hint=f"pip install {name}, or leave it out of --trackers")
    if "wandb" in config.tracker_names:
        command = [sys.executable, "-P", "-c", WANDB_CHECK, config.wandb_project]
        silent = os.environ | {"WANDB_SILENT": "true"}
        done = subprocess.run(command, env=silent, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise _cannot_start("wandb", done.stderr)


def _cannot_start(names: str, said: str) -> UserError:
    """What a tracker said of an error, in one sentence, and the way out."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if len(lines) > 2 and " validation error" in lines[0]:  # pydantic's: under it the setting, and what is wrong with it
        lines = [f"{lines[1]}: {lines[2].partition(' [type=')[0]}"]
    hint = next((hint for word, hint in HINTS.items() if lines and word in lines[0].lower()), "put that right")
    return UserError(f"a tracker ({names}) cannot start: {lines[0] if lines else 'it does not say why'}", hint=f"{hint}; or leave it out of --trackers")


def start_trackers(accelerator: Accelerator, run_dir: RunDir, step: int) -> None:
    """Open the trackers that the accelerator was made with, in the main process; a resumed run goes on in the same places.

    Raises UserError where one cannot start: better before an hour of training than a chart that is not there after it.
    """
    if accelerator.trackers or not accelerator.is_main_process:
        return
    config = run_dir.config
    name = config.wandb_run or run_dir.path.name
    wandb = {"name": name, "entity": config.wandb_entity or None, "id": identity(run_dir), "resume": "allow", "dir": str(run_dir.path)}
    options = {"tensorboard": {"purge_step": step + 1}, "wandb": wandb, "trackio": {"name": name, "resume": "allow"}}
    try:
        accelerator.init_trackers(config.wandb_project, init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # it would write a folder of settings at each start, and they are in config.json
                tracker.store_init_configuration(config.recipe())
    except Exception as error:  # each tracker has errors of its own
        accelerator.trackers.clear()
        raise _cannot_start(", ".join(config.tracker_names), str(error) or type(error).__name__) from error


def identity(run_dir: RunDir) -> str:
    """What a tracker knows the run by when it goes on. The folder may be used anew for another run: the time its photos were taken in tells them apart."""
    return hashlib.sha256(f"{run_dir.path.resolve()} {(run_dir.path / 'manifest.jsonl').stat().st_mtime_ns}".encode()).hexdigest()[:16]


def log_figures(accelerator: Accelerator, step: int, figures: dict[str, float]) -> None:
    """Send figures by name to all trackers."""
    for tracker in list(accelerator.trackers):
        with _given_up(accelerator, tracker):
            tracker.log(figures, step=step)


def log_pictures(accelerator: Accelerator, step: int, pictures: dict[str, Image.Image]) -> None:
    """Show pictures by name in the trackers that can."""
    for tracker in list(accelerator.trackers):
        with _given_up(accelerator, tracker):
            if tracker.name == "tensorboard":
                for name, picture in pictures.items():
                    tracker.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [picture] for name, picture in pictures.items()}, step)


@contextmanager
def ending_trackers(accelerator: Accelerator) -> Iterator[None]:
    """Have the trackers write out at the end what is still on its way."""
    before = threading.excepthook

    def quiet(broken: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own, whose error is raised here at the next call; that thread would print it, too.
        if type(broken.thread).__name__ != "_AsyncWriterThread":
            before(broken)

    threading.excepthook = quiet
    try:
        yield
    finally:
        for tracker in list(accelerator.trackers):
            with _given_up(accelerator, tracker):
                tracker.finish()
        accelerator.trackers.clear()
        threading.excepthook = before


@contextmanager
def _given_up(accelerator: Accelerator, tracker: GeneralTracker) -> Iterator[None]:
    """A tracker that cannot write gets nothing more, with a note: no chart is worth a training."""
    try:
        yield
    except Exception as error:  # each tracker has errors of its own
        accelerator.trackers.remove(tracker)
        note(f"{tracker.name} gets nothing more of this run ({getattr(error, 'strerror', None) or error}); the figures are in metrics.jsonl all the same")
