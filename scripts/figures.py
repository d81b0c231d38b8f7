"""`python -m scripts.figures`: write the measured figures from benchmarks/results/ into the README, the card and docs/BENCHMARKS.md.

Each table stands between `<!-- name -->` and `<!-- end -->`, so that no figure is typed by hand.
"""

import json
import re
from pathlib import Path
from typing import Any

from scripts.bench_busy import table as busy_table
from scripts.bench_choices import table as choices_table
from scripts.bench_generate import table as generating_table
from scripts.bench_likeness import OURS, PEER
from scripts.bench_likeness import table as curve_table
from scripts.bench_startup import table as startup_table
from scripts.bench_train import table as training_table
from scripts.count_memory import table as memory_table

RESULTS = Path("benchmarks/results")
PRECISIONS, COUNTS = ("bf16", "int8", "fp8", "nf4"), ("3_photos", "5_photos", "12_photos")
SHOWN = (("before", "identity"), ("after", "identity"), ("after", "scene"), ("bleed", "identity"))


def mini_table(mini: dict[str, Any]) -> str:
    """Attributes right on unseen descriptions, VAE, time."""
    right = mini["attributes_right"]
    rows = [f"| {name.replace('_', ' ')} | {share:.1%} |" for name, share in right.items()]
    rows += [
        f"| VAE on unseen drawings | {mini['vae_psnr_db']:.1f} dB PSNR |",
        f"| one 128 px picture, {mini['steps']} steps, two threads | {mini['seconds_a_picture']:.2f} s |",
    ]
    return "\n".join([f"| on {mini['descriptions']} unseen descriptions | right |", "|---|---|", *rows])


def likeness_table(record: dict[str, Any]) -> str:
    """Identity and scene of each held-out person, before and after training, and how much of them shows without the trigger."""
    rows = [
        "| person | identity before | identity after | scene after | identity shown by 'a person' with the LoRA on | training and encoding |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in record["people"].items():
        rows.append(
            f"| {name} | {row['before']['identity']:.0%} | {row['after']['identity']:.0%} | {row['after']['scene']:.0%} | {row['bleed']['identity']:.0%} "
            f"| {row['train_seconds']:.0f} s |"
        )
    return "\n".join(rows)


def means_table(what: str, records: dict[str, dict[str, Any]]) -> str:
    """Means over the people of some records, a row each. what: what the records differ in."""
    rows = [f"| {what} | identity before | identity after | scene after | identity shown by 'a person' with the LoRA on |", "|---|---|---|---|---|"]
    for name, record in records.items():
        people = list(record["people"].values())
        shares = [sum(row[when][group] for row in people) / len(people) for when, group in SHOWN]
        rows.append(f"| {name} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    return "\n".join(rows)


def summary_table(mini: dict[str, Any], record: dict[str, Any], trains: list[dict[str, Any]], curve: dict[str, Any], long: dict[str, Any]) -> str:
    """What a newcomer wants to know, for the README."""
    steps, beside = [train["bases"]["mini"] for train in trains], {(row["steps"], row["arm"]): row for one in (curve, long) for row in one["summary"]}

    def pair(steps: int, what: str) -> str:
        return ", ".join(f"{beside[steps, arm][what]:.0%}" for arm in (OURS, PEER))

    rows = list(record["people"].values())
    right = {name: share for name, share in mini["attributes_right"].items() if name != "all"}
    mean = {key: sum(r[key[0]][key[1]] for r in rows) / len(rows) for key in (("before", "identity"), ("after", "identity"), ("after", "scene"))}
    return "\n".join(
        [
            "| on the mini model, two CPU cores | measured |",
            "|---|---|",
            f"| a LoRA from 12 photos of a person it never saw | {sum(r['train_seconds'] for r in rows) / len(rows):.0f} s |",
            "| identity right in new scenes (hair, its colour, skin, glasses, beard): without the LoRA, with it "
            f"| {mean['before', 'identity']:.0%}, {mean['after', 'identity']:.0%} |",
            f"| scene right (clothes, colour, mouth, eyes, background) | {mean['after', 'scene']:.0%} |",
            f"| the base on {mini['descriptions']} unseen descriptions: mean attribute right, worst, all ten at once "
            f"| {sum(right.values()) / len(right):.0%}, {min(right.values()):.0%}, {mini['attributes_right']['all']:.0%} |",
            f"| one 128 px picture | {mini['seconds_a_picture']:.2f} s |",
            "| a training step, over that of diffusers' script, on two machines: as it is; encoded ahead and compiled, ours compiled too "
            f"| {'; '.join(', '.join(f'{step[over]:.2f}' for step in steps) for over in ('over_as_it_is', 'over_strongest'))} |",
            "| identity right after 25 steps, 50, 200: ours, the script's (eight people, three trainings each) "
            f"| {'; '.join(pair(steps, 'identity') for steps in (25, 50, 200))} |",
            f"| scene right after 200 steps; after 800 (one each) | {pair(200, 'scene')}; {pair(800, 'scene')} |",
            f"| how much of the person 'a person' shows after 200 steps | {pair(200, 'bleed')} |",
        ]
    )


def insert(file: Path, tables: dict[str, str]) -> None:
    """Replace what stands between the marks of each table."""
    text = file.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.S)  # type: ignore[misc]
    file.write_text(text, encoding="utf-8")


def main() -> None:
    """Read the results and fill in the documents."""
    names = ("mini", "likeness", "train", "train_epyc", "likeness_curve", "likeness_long")
    mini, likeness, *trains, curve, long = (json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names)
    insert(Path("README.md"), {"summary": summary_table(mini, likeness, trains, curve, long)})
    insert(Path("lorabooth/mini/README.md"), {"mini": mini_table(mini)})
    tables = {name: curve_table for name in ("likeness_curve", "likeness_long", "likeness_original")}
    tables |= {name: training_table for name in ("train", "train_epyc", "train_original")}
    tables |= {"busy": busy_table, "choices": choices_table, "generate": generating_table, "memory": memory_table, "startup": startup_table}
    written = {name: table(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))) for name, table in tables.items()}
    for name, what, endings in (("precisions", "base in training", PRECISIONS), ("photos", "trained on", COUNTS)):
        records = {ending.replace("_", " "): json.loads((RESULTS / f"likeness_{ending}.json").read_text(encoding="utf-8")) for ending in endings}
        written[name] = means_table(what, records)
    insert(Path("docs/BENCHMARKS.md"), {"mini": mini_table(mini), "likeness": likeness_table(likeness), **written})


if __name__ == "__main__":
    main()
