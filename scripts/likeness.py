"""`python -m scripts.likeness`: train the shipped recipe on people the mini model never saw, and measure the pictures.

For each person: photos -> `lorabooth train` -> new scenes, before and after, read off against the truth.
"""

import argparse
import json
import platform
import shutil
import time
from pathlib import Path

import diffusers
import torch
from PIL import Image

from infer.engine import Engine
from infer.loras import resolve
from infer.request import Request
from lorabooth.mini import likeness, people, world
from train.command import recipe_config, train_run

TRIGGER = "TOK"


def pictures(engine: Engine, prompts: list[str], lora: Path | None = None) -> list[Image.Image]:
    """One 128 px picture a prompt, 20 steps, seed i for prompt i."""
    choices = (resolve(str(lora)),) if lora else ()
    return [next(engine.generate(Request(p, 128, 128, seed=i, num_inference_steps=20), choices)).image for i, p in enumerate(prompts)]


def measure(name: str, scenes: int, work: Path, settings: dict[str, object], photos: int = people.PHOTOS) -> dict[str, object]:
    """Train on one person and score new scenes with and without the LoRA; 'bleed' scores the LoRA on "a person"."""
    shutil.rmtree(work / name, ignore_errors=True)  # a finished run would be taken as it is, with the base it was trained on
    work.mkdir(parents=True, exist_ok=True)
    archive = work / f"{name}.zip"
    people.write_zip(archive, people.photos(name, "[trigger]", photos))
    config = recipe_config(None, {"model": "mini", "trigger_word": TRIGGER, **settings})
    started = time.perf_counter()
    run = train_run(archive, config, work / name)
    seconds = time.perf_counter() - started
    asked = people.new_scenes(name, TRIGGER, scenes)
    truths = [scene.truth for scene in asked]
    engine = Engine("mini")
    result: dict[str, object] = {"train_seconds": round(seconds, 1)}
    for title, prompts, lora in (
        ("before", [s.caption for s in asked], None),
        ("after", [s.caption for s in asked], run.lora),
        ("bleed", [s.caption.replace(TRIGGER, "a person") for s in asked], run.lora),
    ):
        made = pictures(engine, prompts, lora)
        scores = likeness.score(made, truths)
        groups = {"identity": likeness.mean(scores, world.IDENTITY), "scene": likeness.mean(scores, world.SCENE)}
        result[title] = {group: round(value, 4) for group, value in groups.items()} | {"attributes": scores}
        sheet = Image.new("RGB", (128 * scenes, 256))
        for i, (scene, picture) in enumerate(zip(asked, made, strict=True)):
            sheet.paste(scene.image(), (128 * i, 0))
            sheet.paste(picture, (128 * i, 128))
        sheet.save(work / f"{name}-{title}.png")
    return result


def main() -> None:
    """Measure every held-out person and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m scripts.likeness", description=__doc__)
    parser.add_argument("--people", nargs="*", default=list(people.HELD_OUT), choices=[*people.HELD_OUT, *people.MORE])
    parser.add_argument("--photos", type=int, default=people.PHOTOS, help=f"photos to train on [default: {people.PHOTOS}]")
    parser.add_argument("--scenes", type=int, default=12, help="new scenes a person [default: 12]")
    parser.add_argument("--work", type=Path, default=Path("build/likeness"))
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/likeness.json"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of TrainConfig to try")
    a = parser.parse_args()
    settings: dict[str, object] = dict(pair.split("=", 1) for pair in a.set)
    results = {name: measure(name, a.scenes, a.work, settings, a.photos) for name in a.people}
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "processor": platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "diffusers": diffusers.__version__,
    }  # fmt: skip
    record = {"people": results, "photos": a.photos, "scenes": a.scenes, "settings": settings, "machine": machine}
    a.result.parent.mkdir(parents=True, exist_ok=True)
    a.result.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in results.items():
        print(name, row["train_seconds"], "s", {k: (v["identity"], v["scene"]) for k, v in row.items() if isinstance(v, dict)})


if __name__ == "__main__":
    main()
