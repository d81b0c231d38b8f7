"""How long a user waits for the command line: `python -m scripts.bench_startup`.

Each command runs once to warm the disk cache and then several times, every time in a new process; the wall time includes Python's own start.
"""

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import click

from lorabooth import __version__, machine

COMMANDS = (("--help",), ("doctor", "--json"))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/startup.json"), show_default=True, help="Where the figures go.")
@click.option("--runs", default=10, show_default=True, type=click.IntRange(min=1), help="Timed runs of each command, after one that is not timed.")
def bench(out: Path, runs: int) -> None:
    """Measure the wall time of quick commands and write it as JSON.

    \b
    Example:
      python -m scripts.bench_startup --runs 10
    """
    load = os.getloadavg()[0]
    commands = {" ".join(("lorabooth", *arguments)): measure(arguments, runs) for arguments in COMMANDS}
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine_record(load), "commands": commands}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, figures in commands.items():
        click.echo(f"{name:28} median {figures['median_seconds']:.3f} s, slowest {figures['max_seconds']:.3f} s of {runs}")


def measure(arguments: tuple[str, ...], runs: int) -> dict[str, Any]:
    """Wall seconds of `runs` processes, after one to warm up."""
    program = str(Path(sys.executable).parent / "lorabooth")
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([program, *arguments], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - start)
    timed = sorted(seconds[1:])
    return {"median_seconds": round(median(timed), 4), "max_seconds": round(timed[-1], 4), "seconds": [round(value, 4) for value in timed]}


def machine_record(load: float) -> dict[str, Any]:
    """What the figures depend on; a load near the number of cores says that the machine was busy with something else."""
    total_bytes, _ = machine.memory_bytes()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": machine.cpu_cores(),
        "memory_total_bytes": total_bytes,
        "load_average_before": load,
        "versions": {"lorabooth": __version__} | {name: machine.installed_version(name) for name in ("click", "torch")},
    }


if __name__ == "__main__":
    bench()
