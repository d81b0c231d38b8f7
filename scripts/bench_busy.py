"""A training step of mini beside other programs: `python -m scripts.bench_busy`.

torch's threads wait by spinning, as long as libgomp has it or as GOMP_SPINCOUNT says, which the command line sets (lorabooth/cli.py). Each is measured
in a process of its own, alone and beside trainings of one thread each, one for each core.
"""

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import click

from lorabooth.cli import SETTINGS_OF_LIBRARIES
from lorabooth.families import load_family
from scripts.bench_generate import seconds_of
from scripts.bench_startup import machine_record
from scripts.bench_train import SETTINGS, WARM_UP_STEPS, mini_size, our_arm
from scripts.gpu_check import write
from scripts.original import ON_THE_CPU
from scripts.peer import CPU

NAME = "GOMP_SPINCOUNT"
SPINS: dict[str, dict[str, str]] = {"not set": {}, SETTINGS_OF_LIBRARIES[NAME]: {NAME: SETTINGS_OF_LIBRARIES[NAME]}}
FOR_EVER = 10**6


def time_steps(count: int) -> None:
    """Print the seconds of each of `count` steps, after a few that do not count."""
    with tempfile.TemporaryDirectory() as folder:
        arm = our_arm(Path(folder) / "run", load_family("mini"), mini_size(), SETTINGS | {"batch_size": 4})
        times = [seconds_of(arm.step, CPU) for _ in range(WARM_UP_STEPS + count)]
    print(json.dumps(times[WARM_UP_STEPS:]))


def started(steps: int, **settings: str) -> subprocess.Popen[str]:
    """A process that times so many steps."""
    command = [sys.executable, "-c", f"from scripts.bench_busy import time_steps; time_steps({steps})"]
    surroundings = {name: value for name, value in os.environ.items() if name not in (NAME, "OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings | ON_THE_CPU | settings)


def measured(settings: dict[str, str], neighbours: int, steps: int) -> list[float]:
    """Seconds of each step of a training that takes all cores, beside so many others of one thread."""
    others = [started(FOR_EVER, OMP_NUM_THREADS="1") for _ in range(neighbours)]
    try:
        said = started(steps, **settings).communicate()[0]
    finally:
        for other in others:
            other.kill()
            other.wait()
    found: list[float] = json.loads(said)
    return found


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| a step of mini | GOMP_SPINCOUNT | median | shortest to longest |", "|---|---|---|---|"]
    for row in record["rows"]:
        beside = f"beside {row['neighbours']} other trainings" if row["neighbours"] else "alone"
        times = row["seconds"]
        lines.append(f"| {beside} | {row['spins']} | {median(times):.2f} s | {min(times):.2f} to {max(times):.2f} s |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/busy.json"), show_default=True, help="Where the figures go.")
@click.option("--steps", default=30, show_default=True, type=click.IntRange(min=1), help="Timed steps of each.")
def bench(out: Path, steps: int) -> None:
    """Time a training step alone and on a busy machine, by how long threads spin, and write it as JSON.

    \b
    Example:
      python -m scripts.bench_busy --steps 30
    """
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine_record(os.getloadavg()[0]), "rows": []}
    for neighbours in (0, os.cpu_count() or 1):
        for name, settings in SPINS.items():
            record["rows"].append({"neighbours": neighbours, "spins": name, "seconds": measured(settings, neighbours, steps)})
    write(out, record)
    click.echo(table(record))


if __name__ == "__main__":
    bench()
