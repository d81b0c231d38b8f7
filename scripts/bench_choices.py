"""What each setting of a recipe is worth, on people the mini model never saw: `python -m scripts.bench_choices`.

Each row is a recipe of the mini model with one setting changed, measured as scripts/bench_likeness.py does, and how far it is from the recipe as it is,
training by training; differences below their standard error are none. Finished trainings are kept in --work.
"""

import os
from pathlib import Path
from statistics import mean
from typing import Any

import click
from tqdm import tqdm

from scripts.bench_likeness import OURS, differences, measure, mini_recipe, options, points, seeds_of, write_record

UNCHANGED = "the recipe"
CHOICES = (
    "", "learning_rate=1e-3", "learning_rate=2e-3", "loraplus_lr_ratio=1", "loraplus_lr_ratio=8", "loraplus_lr_ratio=8 learning_rate=1e-3", "lora_rank=8",
    "lora_rank=32", "sigma_sampling=logit-normal", "ema_decay=0", "warmup_steps=10", "caption_dropout_rate=0.1", "lora_dropout=0.1", "preservation_rate=0",
    "preservation_rate=0.33", "preservation_rate=0.5", "targets=attention", "train_text_encoder=false", "text_encoder_lr_ratio=0.1",
    "text_encoder_lr_ratio=0.5", "weight_decay=1e-4", "weight_decay=0.3", "weight_decay=3",
)  # fmt: skip


def parsed(choice: str) -> dict[str, str]:
    """`name=value name=value` as settings."""
    return dict(pair.split("=", 1) for pair in choice.split())


def summary(rows: list[dict[str, Any]], choices: tuple[str, ...], marks: list[int]) -> list[dict[str, Any]]:
    """Means over people and seeds, for each choice and number of steps; `over_recipe`: less those of the recipe as it is, with a standard error."""
    found = []
    for choice in choices:
        for mark in marks:
            chosen, unchanged = ([row for row in rows if row["choice"] == which and row["steps"] == mark] for which in (choice, ""))
            means = {what: round(mean(row[what] for row in chosen), 3) for what in ("identity", "scene", "bleed", "seconds")}
            over = {what: differences(chosen, unchanged, what) for what in ("identity", "scene", "bleed")} if choice else {}
            worst = min(row["identity"] for row in chosen)
            found.append({"choice": choice or UNCHANGED, "steps": mark, "trainings": len(chosen), **means, "worst_identity": worst, "over_recipe": over})
    return found


def table(record: dict[str, Any]) -> str:
    """The means as Markdown; in brackets points over the recipe as it is, with a standard error."""
    marks = sorted({row["steps"] for row in record["summary"]})
    titles = [f"{what} at {mark}" for what in ("identity", "scene", "without the trigger") for mark in marks]
    lines = [f"| recipe | {' | '.join(titles)} | seconds |", "|---" * (len(titles) + 2) + "|"]
    for choice in dict.fromkeys(row["choice"] for row in record["summary"]):
        rows = [row for row in record["summary"] if row["choice"] == choice]
        figures = [f"{row[what]:.0%}{points(row['over_recipe'].get(what, []))}" for what in ("identity", "scene", "bleed") for row in rows]
        lines.append(f"| {choice} | {' | '.join(figures)} | {rows[-1]['seconds']:.0f} |")
    return "\n".join(lines)


@click.command()
@options
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Trainings of each person with each choice.")
@click.option("--steps", default="100,200", show_default=True, help="When pictures are drawn, by commas.")
@click.option("--choice", "choices", multiple=True, metavar="NAME=VALUE", help="Only these, and the recipe as it is; several settings by spaces.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/choices.json"), show_default=True, help="Where the figures go.")
def bench(names: list[str], seeds: int, steps: str, scenes: int, choices: tuple[str, ...], recipe: Path | None, work: Path, out: Path) -> None:
    """Measure what each setting of the recipe is worth and write it as JSON.

    \b
    Example:
      python -m scripts.bench_choices --people ada,bo --choice learning_rate=4e-3
    """
    load, marks, tried = os.getloadavg()[0], sorted(int(mark) for mark in steps.split(",")), ("", *choices) if choices else CHOICES
    trainings = [(choice, name, seed) for choice in tried for name in names for seed in seeds_of(name, seeds)]
    rows = []
    for choice, name, seed in tqdm(trainings, unit="training"):
        rows += [{"choice": choice, **row} for row in measure(work, OURS, name, seed, marks, scenes, mini_recipe(recipe, parsed(choice)))]
    click.echo(table(write_record(out, load, mini_recipe(recipe, {}), scenes, summary(rows, tried, marks), rows)))


if __name__ == "__main__":
    bench()
