"""How long a user waits for the command line, for the first training step and for the first picture: `python -m scripts.bench_startup`.

Each command runs in a new process, and the wall time includes Python's own start. Warm: again and again, after one run that is not timed.
Cold: once, after the files of Python's packages and of the mini model were dropped from the page cache, as after a restart of the machine.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import click
from tqdm import tqdm

from lorabooth import __version__, machine, mini
from lorabooth.mini import people

QUICK = (("--help",), ("generate", "--help"), ("train", "--help"), ("loras",), ("doctor", "--json"))
PICTURE = ("generate", "a person", "--model", "mini", "--steps", "20", "--format", "png")
STEP = ("train", str(people.DEMO_ZIP), "--trigger", "TOK", "--model", "mini", "--steps", "1", "--preview-every", "0")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/startup.json"), show_default=True, help="Where the figures go.")
@click.option("--runs", default=10, show_default=True, type=click.IntRange(min=1), help="Warm runs of each command.")
def bench(out: Path, runs: int) -> None:
    """Measure the wall time of commands and write it as JSON.

    \b
    Example:
      python -m scripts.bench_startup --runs 10
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        # A run that is there already has no first step: each has a folder of its own.
        names = {" ".join(("lorabooth", *arguments)): lambda i, arguments=arguments: arguments for arguments in QUICK}
        names |= {"first picture, 20 steps of mini": lambda i: (*PICTURE, "--out", f"{folder}/pictures")}
        names |= {"first step, from zip to LoRA file": lambda i: (*STEP, "--out", f"{folder}/run-{i}")}
        commands = {name: measure(arguments, runs) for name, arguments in tqdm(names.items(), unit="command")}
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine_record(load), "commands": commands}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    click.echo(table(record))


def measure(arguments: Callable[[int], tuple[str, ...]], runs: int) -> dict[str, Any]:
    """Wall seconds of one cold process and of `runs` warm ones; arguments: of the i-th."""
    evict([Path(sys.prefix), Path(sys.base_prefix) / "lib", mini.FOLDER])
    cold, *timed = (seconds_of(arguments(i)) for i in range(runs + 1))
    timed = sorted(timed)
    return {"cold_seconds": cold, "median_seconds": round(median(timed), 4), "max_seconds": timed[-1], "seconds": timed}


def seconds_of(arguments: tuple[str, ...]) -> float:
    """Wall seconds of one process."""
    program = str(Path(sys.executable).parent / "lorabooth")
    start = time.perf_counter()
    subprocess.run([program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return round(time.perf_counter() - start, 4)


def evict(folders: Iterable[Path]) -> None:
    """Have the system forget the files below some folders; pages that another process has mapped stay."""
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| | cold | warm, median |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {row['cold_seconds']:.2f} s | {row['median_seconds']:.2f} s |" for name, row in record["commands"].items()])


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
