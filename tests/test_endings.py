"""How a training by several processes ends: in one sentence, said last, whatever launcher stood between; and never with half of a run."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lorabooth.errors import UserError
from lorabooth.launched import SAVING_SECONDS, Launched
from lorabooth.runs import RunDir
from tests.test_processes import terminated, torchrun, two_processes, untrained
from train import encode, fit
from train.checkpoint import saved_step
from train.data import cached_key, write_cached

LONG = ["--batch-size", "1", "--steps", "9999", "--checkpoint-every", "9999", "--preview-every", "0"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def launched(tiny_command: list[str], run: RunDir, launcher: list[str], *options: str) -> subprocess.Popen[str]:
    """`lorabooth train` with a launcher."""
    words = [sys.executable, "-m", "lorabooth", *tiny_command, *LONG, *options, "--launch", shlex.join(launcher), "--out", str(run.path)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def training(process: subprocess.Popen[str], run: RunDir) -> list[psutil.Process]:
    """The processes below one, the launchers before those that train, once losses were logged."""
    end = time.monotonic() + 180
    while not any("loss" in row for row in run.history()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    return psutil.Process(process.pid).children(recursive=True)


def last_lines(process: subprocess.Popen[str]) -> str:
    """What a process said last, once it has ended; two lines."""
    said = process.communicate(timeout=120)[1]
    return "\n".join(said.replace("\r", "\n").strip().splitlines()[-2:])


def test_a_launcher_of_one_process_leaves_no_orphan_and_no_traceback(tiny_command: list[str], tmp_path: Path):
    run = RunDir(tmp_path / "run")
    process = launched(tiny_command, run, [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "1"])
    said = terminated(process, run)
    assert process.returncode == 130 and "Traceback" not in said and said.count("is saved; run the same command again to go on") == 1, said
    assert saved_step(run) >= 10
    with run.locked():
        pass  # nobody works on it


def test_a_signal_that_reaches_the_launcher_and_its_processes_but_not_the_command_is_an_interruption(tiny_command: list[str], tmp_path: Path):
    run = RunDir(tmp_path / "run")  # as SLURM sends it to the steps of a job
    process = launched(tiny_command, run, torchrun())
    for below in training(process, run):
        below.send_signal(signal.SIGTERM)
    said = last_lines(process)
    assert process.returncode == 130 and said.endswith(f"interrupted after step {saved_step(run)}, which is saved; run the same command again to go on"), said
    assert not (run.path / "ended.json").exists()


def test_a_process_that_the_kernel_killed_is_said_last_and_no_other_prints_a_traceback(tiny_command: list[str], tmp_path: Path):
    run = RunDir(tmp_path / "run")
    process = launched(tiny_command, run, torchrun())
    training(process, run)[-1].kill()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "memory may have run out" in said.strip().splitlines()[-1], said
    assert "train/fit.py" not in said, "a stack of ours"


def test_a_problem_of_the_users_is_said_last_and_once(tiny_command: list[str], tiny_run: Path, tmp_path: Path):
    run = untrained(tiny_run, tmp_path / "run", batch_size=1, steps=9999, checkpoint_every=9999)
    for file in run.cache.glob("0*x*.safetensors"):  # pictures that are no numbers
        write_cached(file, {name: tensor * torch.nan for name, tensor in load_file(file).items()}, cached_key(file))
    process = launched(tiny_command, run, torchrun())
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and said.count("lorabooth: the loss became nan") == 1 and "Traceback" not in said, said
    sentence, hint = said.replace("\r", "\n").strip().splitlines()[-2:]
    assert sentence.startswith("lorabooth: the loss became nan") and "lower --learning-rate" in hint


def test_a_second_ctrl_c_ends_the_wait_for_another_machine(tiny_command: list[str], tmp_path: Path):
    run = RunDir(tmp_path / "run")
    process = launched(tiny_command, run, [*torchrun(), "--nnodes", "2", "--node_rank", "0"])
    assert process.stderr is not None
    end = time.monotonic() + 120
    while not any("torch.distributed.run" in _words(below) for below in psutil.Process(process.pid).children()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    while "stopping" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "run the same command again" in said, said
    assert not [other for other in psutil.process_iter() if str(run.path) in _words(other)], "an orphan"


def test_a_run_that_is_gone_is_not_waited_for(tmp_path: Path):
    ended = subprocess.Popen(["true"])
    started = Launched(ended, ["-m", "train"], RunDir(tmp_path / "run"))
    started.asked.append(signal.SIGTERM)
    began = time.monotonic()
    assert started.wait() == 0 and time.monotonic() - began < SAVING_SECONDS / 2
    with pytest.raises(UserError, match="is gone: it was moved or deleted"):
        started.raise_end("fit", 1)


@pytest.mark.slow  # waits for what does not come
def test_a_launcher_that_hears_no_signal_is_killed_while_nothing_is_trained(tiny_command: list[str], tmp_path: Path):
    ready = tmp_path / "ready"
    process = launched(tiny_command, RunDir(tmp_path / "run"), ["bash", "-c", f"trap '' TERM; touch {shlex.quote(str(ready))}; sleep 600; true"])
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert "run the same command again" in process.communicate(timeout=60)[1] and process.returncode == 130


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize(
    ("steps", "difference"),
    [(8, "step 0 and step 4, the weights"), pytest.param(4, "whether it is finished", marks=pytest.mark.slow)],
)
def test_processes_that_have_not_the_same_run_are_refused(steps: int, difference: str, tiny_run: Path, tmp_path: Path):
    runs = [untrained(tiny_run, tmp_path / f"disk-{rank}", batch_size=1, steps=steps) for rank in (0, 1)]
    encode.run(runs[0]), encode.run(runs[1])
    (runs[0].path / "checkpoints").symlink_to(tiny_run / "checkpoints")
    said, code = on_own_disks(tmp_path)
    assert code != 0 and said.count(f"the processes do not have the same run; they differ in {difference}") == 1, said
    assert "a disk that all machines share" in said and "train/fit.py" not in said
    assert not any("loss" in row for run in runs for row in run.history())


def on_own_disks(folder: Path) -> tuple[str, int]:
    """Two processes, each with the run in a folder of its own."""
    script = f"exec {shlex.quote(sys.executable)} -m train fit {shlex.quote(str(folder))}/disk-$RANK"
    ended = subprocess.run([*torchrun(), "--no-python", "bash", "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=180)
    return ended.stderr, ended.returncode


def test_memory_that_runs_out_in_one_process_is_saved_by_it(tiny_run: Path, tmp_path: Path):
    run = untrained(tiny_run, tmp_path / "run", batch_size=1, checkpoint_every=9999, steps=9)
    encode.run(run)
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys
import train.fit as fit
from train.__main__ import process
real = fit.loss_of
def loss_of(trainer, *rest):
    if os.environ["RANK"] == "1" and trainer.state.step == 3:
        raise RuntimeError("CUDA out of memory")
    return real(trainer, *rest)
fit.loss_of = loss_of
sys.exit(process(["fit", sys.argv[1]]))
""")
    ended = subprocess.run([*torchrun(), str(script), str(run.path)], capture_output=True, text=True, env=ENVIRONMENT, timeout=180)
    assert ended.returncode != 0 and saved_step(run) == 3
    assert ended.stderr.count("the GPU's memory ran out") == 1 and "the run is saved at step 3" in ended.stderr, ended.stderr
    assert "train/fit.py" not in ended.stderr and "another process of this training has ended" in ended.stderr


@pytest.mark.slow  # starts two processes for a lock
def test_a_run_that_another_command_works_on_is_refused_in_one_sentence(tiny_run: Path, tmp_path: Path):
    run = untrained(tiny_run, tmp_path / "run", batch_size=1)
    with run.locked():
        process = two_processes(run)
        said = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and said.count("another lorabooth process is working on") == 1 and "train/several.py" not in said, said


def test_another_number_of_processes_is_named_with_the_whole_batch(run: RunDir, capfd: pytest.CaptureFixture[str]):
    text = run.metrics.read_text()
    assert '"processes": 1' in text
    run.metrics.write_text(text.replace('"processes": 1', '"processes": 4'))
    run._write_config(run.config.model_copy(update={"steps": 5, "preview_every": 0}))
    fit.run(run)
    assert "the run goes on with 1 of its processes, and had 4 so far: each step now learns from 2 photos, not 8" in capfd.readouterr().err
