"""Likeness beside diffusers' script, on people the mini model never saw: `python -m scripts.bench_likeness`.

For each person, seed and arm: 12 photos are trained on, and at some steps new scenes are drawn and read off against the truth: identity (is it the
person), scene (is it what was asked for), and bleed (the identity that "a person" shows without the trigger word). Both arms have the same base, photos,
captions, seed, LoRA and optimiser; the script is as it is (scripts/peer.py), with --peer-script the original besides. What is done is kept in --work, so
that hours of it can be interrupted, and so that several processes, each with some of the --people and OMP_NUM_THREADS=1, can share it: seconds are those
of the processor, not of the wall.
"""

import hashlib
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import click
import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from infer.engine import Engine
from infer.loras import resolve
from infer.request import Request
from lorabooth import checkpoints, stages
from lorabooth.config import TrainConfig
from lorabooth.families import load_family
from lorabooth.mini import likeness, people, world
from lorabooth.photos import ingest
from lorabooth.runs import RunDir, write_durable
from scripts import original
from scripts.bench_startup import machine_record
from scripts.peer import Encoding, Peer, read_photos
from train import fit
from train.checkpoint import save_checkpoint
from train.command import recipe_config

Command = TypeVar("Command", bound=Callable[..., Any])
Training = Callable[[str, int, list[int], Path, TrainConfig], Iterator[tuple[int, float, Path]]]
OURS, PEER, ORIGINAL = "lorabooth", "script", "the original script"
TRIGGER = "TOK"
PEOPLE = tuple(people.HELD_OUT | people.MORE)


def seeds_of(name: str, count: int) -> list[int]:
    """A person's seeds, which nobody else has: a seed decides the LoRA's start and the noise, so trainings that share one are not independent."""
    return [PEOPLE.index(name) + len(PEOPLE) * i for i in range(count)]


def ours(name: str, seed: int, marks: list[int], folder: Path, recipe: TrainConfig) -> Iterator[tuple[int, float, Path]]:
    """Train by a recipe; at each mark: the step, the seconds so far, and the LoRA file."""
    if recipe.lr_scheduler != "constant" and len(marks) > 1:
        raise click.UsageError(f"with lr_scheduler {recipe.lr_scheduler} each number of steps is another training; give --steps one")
    archive = folder / "photos.zip"
    people.write_zip(archive, people.photos(name, "[trigger]"))
    config = recipe.model_copy(update={"seed": seed, "preview_every": 0, "steps": marks[-1]})
    run, start = RunDir.create(folder / "run", config), time.process_time()
    ingest(archive, run.path)
    for stage in ("caption", "encode"):
        stages.run_stage(stage, run)
    trainer = fit.start(run, config, load_family("mini"), Accelerator(cpu=True))
    spent = time.process_time() - start
    for mark in marks:
        start = time.process_time()
        while trainer.state.step < mark:
            fit.train_step(trainer)
        spent += time.process_time() - start
        save_checkpoint(run, trainer.state)
        file = folder / f"{mark}.safetensors"
        assert checkpoints.save_as_lora(run, checkpoints.folders(run)[-1], file)
        yield mark, spent, file


def peer(name: str, seed: int, marks: list[int], folder: Path, recipe: TrainConfig) -> Iterator[tuple[int, float, Path]]:
    """The same by the script, with the learning rate, rank, layers and batch of our recipe."""
    photos = write_photos(name, folder / "photos")
    start, family = time.process_time(), load_family("mini")
    encoding = Encoding(family, *read_photos(photos, family.native_px), recipe.batch_size, seed)
    trainer = Peer(family, settings_of(PEER, recipe), encoding.batch, seed=seed)
    spent, step = time.process_time() - start, 0
    for mark in marks:
        start = time.process_time()
        while step < mark:
            trainer.step()
            step += 1
        spent += time.process_time() - start
        trainer.save(folder / str(mark))
        yield mark, spent, folder / str(mark) / "pytorch_lora_weights.safetensors"


def original_arm(script: Path) -> Training:
    """The same by the original script, in a process of its own; seconds are those of the wall, imports and all."""

    def train(name: str, seed: int, marks: list[int], folder: Path, recipe: TrainConfig) -> Iterator[tuple[int, float, Path]]:
        photos, out = write_photos(name, folder / "photos"), folder / "out"
        command = original.command(script, photos, out, settings_of(ORIGINAL, recipe), marks[-1], seed, save_every=math.gcd(*marks))
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | original.ON_THE_CPU)
        if done.returncode:
            raise click.ClickException(f"{script} ended with {done.returncode}: {done.stderr[-2000:]}")
        logged = original.losses(out)
        for mark in marks:
            yield mark, logged[mark - 1].wall_time - start, out / f"checkpoint-{mark}" / "pytorch_lora_weights.safetensors"

    return train


def write_photos(name: str, folder: Path) -> Path:
    """A person's photos with captions beside them."""
    folder.mkdir(parents=True)
    for i, scene in enumerate(people.photos(name, "[trigger]")):
        scene.image().save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(scene.caption, encoding="utf-8")
    return folder


def settings_of(arm: str, recipe: TrainConfig) -> dict[str, Any]:
    """What an arm takes from the recipe; the script knows no more than this of it."""
    settings = recipe.recipe()
    return settings if arm == OURS else {name: settings[name] for name in ("learning_rate", "lora_rank", "targets", "batch_size")}


ARMS: dict[str, Training] = {OURS: ours, PEER: peer}


def scores(engine: Engine, name: str, scenes: int, lora: Path) -> dict[str, float]:
    """Shares of attributes that are right: of the person and of the scene where the trigger word is said, of the person where it is not."""
    asked, choices = people.new_scenes(name, TRIGGER, scenes), (resolve(str(lora)),)
    truths = [scene.truth for scene in asked]

    def drawn(prompts: list[str]) -> likeness.Scores:
        pictures = [next(engine.generate(Request(prompt, 128, 128, seed=i, num_inference_steps=20), choices)).image for i, prompt in enumerate(prompts)]
        return likeness.score(pictures, truths)

    named, unnamed = drawn([scene.caption for scene in asked]), drawn([scene.caption.replace(TRIGGER, "a person") for scene in asked])
    found = {"identity": (named, world.IDENTITY), "scene": (named, world.SCENE), "bleed": (unnamed, world.IDENTITY)}
    return {what: round(likeness.mean(score, attributes), 4) for what, (score, attributes) in found.items()}


def measure(
    work: Path, arm: str, name: str, seed: int, marks: list[int], scenes: int, recipe: TrainConfig, train: Training | None = None
) -> list[dict[str, Any]]:
    """The rows of one training, by default the arm's of `ARMS`, from --work where they are there already."""
    digest = hashlib.sha256(json.dumps(settings_of(arm, recipe), sort_keys=True, default=str).encode()).hexdigest()[:8]
    told = [arm, name, str(seed), *map(str, marks), f"{scenes} scenes", digest]
    file = work / f"{' '.join(told)}.json"
    with suppress(OSError, ValueError):
        return list(json.loads(file.read_text(encoding="utf-8")))
    work.mkdir(parents=True, exist_ok=True)
    rows, engine = [], Engine("mini")
    with tempfile.TemporaryDirectory() as folder:
        for mark, seconds, lora in (train or ARMS[arm])(name, seed, marks, Path(folder), recipe):
            rows.append({"arm": arm, "person": name, "seed": seed, "steps": mark, "seconds": round(seconds, 1), **scores(engine, name, scenes, lora)})
    write_durable(file, json.dumps(rows).encode())
    return rows


def summary(rows: list[dict[str, Any]], marks: list[int]) -> list[dict[str, Any]]:
    """Means over people and seeds, for each arm and number of steps. `over_script`: an arm's less the script's, training by training, with its standard error;
    `script_at_equal_time`: its identity when ours had its own, between its marks."""
    found = []
    for mark in marks:
        for arm in (*ARMS, ORIGINAL):
            chosen = [row for row in rows if row["arm"] == arm and row["steps"] == mark]
            if chosen:
                means = {what: round(mean(row[what] for row in chosen), 3) for what in ("identity", "scene", "bleed", "seconds")}
                found.append({"arm": arm, "steps": mark, "trainings": len(chosen), **means, "worst_identity": min(row["identity"] for row in chosen)})
    theirs = [(row["seconds"], row["identity"]) for row in found if row["arm"] == PEER]
    for row in found:
        if row["arm"] != PEER and theirs:
            sides = [[other for other in rows if other["arm"] == arm and other["steps"] == row["steps"]] for arm in (row["arm"], PEER)]
            row["over_script"] = {what: differences(*sides, what) for what in ("identity", "scene")}
        if row["arm"] == OURS and theirs and theirs[0][0] <= row["seconds"] <= theirs[-1][0]:
            row["script_at_equal_time"] = round(float(np.interp(row["seconds"], *zip(*theirs, strict=True))), 3)
    return found


def differences(rows: list[dict[str, Any]], others: list[dict[str, Any]], what: str) -> list[float]:
    """Mean of rows less others, for the same person and seed, and its standard error; empty where they have none in common."""
    first, second = ({(row["person"], row["seed"]): row[what] for row in side} for side in (rows, others))
    found = [first[key] - second[key] for key in first.keys() & second.keys()]
    return [round(mean(found), 4), round(standard_error(found), 4)] if found else []


def standard_error(values: list[float]) -> float:
    """Of their mean; 0 for a single one."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def points(pair: list[float]) -> str:
    """A difference and its standard error, in brackets; nothing for none."""
    return f" ({100 * pair[0]:+.1f} ± {100 * pair[1]:.1f})" if pair else ""


def table(record: dict[str, Any]) -> str:
    """The means as Markdown; in brackets points over the script's, with a standard error."""
    lines = [
        "| steps | arm | seconds | identity | worst identity | scene | identity without the trigger | the script's identity at equal time |",
        "|---" * 8 + "|",
    ]
    for row in record["summary"]:
        over = row.get("over_script", {})
        figures = [f"{row[what]:.0%}{points(over.get(what, []))}" for what in ("identity", "worst_identity", "scene", "bleed")]
        then = f"{row['script_at_equal_time']:.0%}" if "script_at_equal_time" in row else "-"
        lines.append(f"| {row['steps']} | {row['arm']} | {row['seconds']:.0f} | {' | '.join(figures)} | {then} |")
    return "\n".join(lines)


def plot(record: dict[str, Any]) -> str:
    """The curves as an SVG: identity, scene and bleed over the steps, a panel each, an arm a line."""
    panels, width, height, colours = ("identity", "scene", "bleed"), 260, 180, {OURS: "#06c", PEER: "#c60", ORIGINAL: "#888"}
    marks = sorted({row["steps"] for row in record["summary"]})
    there = [arm for arm in colours if any(row["arm"] == arm for row in record["summary"])]
    places = {mark: 40 + i * (width - 60) / max(1, len(marks) - 1) for i, mark in enumerate(marks)}
    parts = []
    for panel, what in enumerate(panels):
        left = panel * width
        parts += [f'<text x="{left + 40}" y="16" font-weight="bold">{what}</text>']
        for share in (0, 0.5, 1):
            y = height - 30 - share * (height - 60)
            parts += [f'<line x1="{left + 40}" x2="{left + width - 20}" y1="{y}" y2="{y}" stroke="#ddd"/><text x="{left + 6}" y="{y + 4}">{share:.0%}</text>']
        parts += [f'<text x="{left + x}" y="{height - 8}" text-anchor="middle">{mark}</text>' for mark, x in places.items()]
        for arm in there:
            points = [(left + places[row["steps"]], height - 30 - row[what] * (height - 60)) for row in record["summary"] if row["arm"] == arm]
            parts += [f'<polyline fill="none" stroke="{colours[arm]}" stroke-width="2" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>']
    parts += [f'<text x="{40 + 110 * i}" y="{height + 14}" fill="{colours[arm]}">{arm}</text>' for i, arm in enumerate(there)]
    size = f'viewBox="0 0 {3 * width} {height + 24}" font-family="system-ui, sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


def mini_recipe(file: Path | None, settings: dict[str, Any]) -> TrainConfig:
    """A recipe of the mini model, by default the shipped one, with some settings changed."""
    return recipe_config(file, {"model": "mini", "trigger_word": TRIGGER, **settings})


def known_names(_context: click.Context, _option: click.Parameter, told: str) -> list[str]:
    """Names by commas, each of somebody that there is."""
    names = told.split(",")
    if strangers := [name for name in names if name not in PEOPLE]:
        raise click.BadParameter(f"nobody is called {', '.join(strangers)}; there are {', '.join(PEOPLE)}")
    return names


def options(command: Command) -> Command:
    """What this benchmark and that of single settings (scripts/bench_choices.py) let one choose."""
    folder, file = click.Path(path_type=Path), click.Path(path_type=Path, exists=True, dir_okay=False)
    for option in (
        click.option("--work", type=folder, default=Path("build/bench_likeness"), show_default=True, help="Where finished trainings are kept."),
        click.option("--recipe", type=file, help="YAML file of settings. [default: configs/mini.yaml]"),
        click.option("--scenes", default=12, show_default=True, type=click.IntRange(min=1), help="New scenes for each measurement."),
        click.option("--people", "names", default=",".join(PEOPLE), show_default=True, callback=known_names, help="Who, by commas."),
    ):
        command = option(command)
    return command


def write_record(out: Path, load: float, recipe: TrainConfig, scenes: int, found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write summary and rows as JSON, with what they were measured on, and return it."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine_record(load), "recipe": recipe.recipe(), "scenes": scenes,
        "summary": found, "rows": rows,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


@click.command()
@options
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Trainings of each person by each arm.")
@click.option("--steps", default="100,200,400,800", show_default=True, help="When pictures are drawn, by commas.")
@click.option("--peer-script", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The original train_dreambooth_lora_flux.py, as a third arm.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/likeness_curve.json"), show_default=True, help="Where the figures go.")
def bench(names: list[str], seeds: int, steps: str, peer_script: Path | None, scenes: int, recipe: Path | None, work: Path, out: Path) -> None:
    """Measure likeness over the steps, ours and the script's, and write it as JSON, with the curves beside it as an SVG.

    \b
    Example:
      python -m scripts.bench_likeness --people ada,bo --seeds 1 --steps 100,200
    """
    load, marks, config = os.getloadavg()[0], sorted(int(mark) for mark in steps.split(",")), mini_recipe(recipe, {})
    arms = ARMS | ({ORIGINAL: original_arm(peer_script)} if peer_script else {})
    trainings = [(arm, name, seed) for name in names for seed in seeds_of(name, seeds) for arm in arms]
    rows = [row for arm, name, seed in tqdm(trainings, unit="training") for row in measure(work, arm, name, seed, marks, scenes, config, arms[arm])]
    record = write_record(out, load, config, scenes, summary(rows, marks), rows)
    out.with_suffix(".svg").write_text(plot(record), encoding="utf-8")
    click.echo(table(record))


if __name__ == "__main__":
    bench()
