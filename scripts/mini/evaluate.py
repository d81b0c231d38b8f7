"""Stage 8: measure the mini model against the truth, through plain FluxPipeline and none of our sampling code."""

import json
import platform
import random
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lorabooth.mini import MAX_SEQUENCE_LENGTH, likeness, world
from scripts.mini import vae as vae_stage

STEPS = 20
GUIDANCE = 3.5
UNSEEN_SEED = "unseen"


def unseen(count: int) -> list[tuple[world.Person, str]]:
    """People of trained values and their full descriptions, from a seed no training stage uses."""
    rng = random.Random(UNSEEN_SEED)
    people = [world.sample_person(rng) for _ in range(count)]
    return [(person, world.describe(person, rng)) for person in people]


def pictures(folder: Path, prompts: list[str], guidance: float = GUIDANCE, steps: int = STEPS, batch: int = 10) -> list[Image.Image]:
    """One 128 px picture a prompt, seed i for prompt i."""
    pipe = diffusers.FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    made: list[Image.Image] = []
    for i in tqdm(range(0, len(prompts), batch), desc="pictures", mininterval=5):
        seeds = [torch.Generator().manual_seed(j) for j in range(i, min(i + batch, len(prompts)))]
        made += pipe(
            prompts[i : i + batch],
            width=128,
            height=128,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=seeds,
        ).images
    return made


def seconds_a_picture(folder: Path, count: int = 5) -> float:
    """Median wall time of one 128 px picture with plain FluxPipeline on two threads, after one warm-up."""
    torch.set_num_threads(2)
    pipe = diffusers.FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        pipe("a portrait of a person", width=128, height=128, num_inference_steps=STEPS, max_sequence_length=MAX_SEQUENCE_LENGTH)
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def vae_psnr(folder: Path, count: int = 200) -> float:
    """Mean PSNR in dB over unseen drawings of people, encoded and decoded."""
    rng = random.Random(UNSEEN_SEED + "/vae")
    drawings = np.stack([np.asarray(world.draw(world.sample_person(rng))) for _ in range(count)])
    return vae_stage.psnr(diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval().to(vae_stage.device()), drawings)


def evaluate(folder: Path, count: int, result: Path, sheet: Path | None = None, guidance: float = GUIDANCE) -> dict[str, object]:
    """All figures of the card, written as JSON with machine and versions."""
    people = unseen(count)
    made = pictures(folder, [text for _, text in people], guidance)
    if sheet:
        truth_and_made(people, made).save(sheet)
    figures = {
        "descriptions": count, "steps": STEPS, "guidance_scale": guidance, "attributes_right": likeness.score(made, [p for p, _ in people]),
        "vae_psnr_db": round(vae_psnr(folder), 2), "seconds_a_picture": round(seconds_a_picture(folder), 3),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 2, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }  # fmt: skip
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return figures


def truth_and_made(people: list[tuple[world.Person, str]], made: list[Image.Image], columns: int = 12) -> Image.Image:
    """Two rows: drawings from the description, and what the model made of the same words."""
    sheet = Image.new("RGB", (128 * columns, 256), "white")
    for i, ((person, _), picture) in enumerate(zip(people[:columns], made, strict=False)):
        sheet.paste(world.draw(person), (128 * i, 0))
        sheet.paste(picture, (128 * i, 128))
    return sheet
