"""diffusers' own `train_dreambooth_lora_flux.py`, unmodified, on the mini model: its command line, and the losses it logged.

It is not part of diffusers' package (examples/dreambooth/ of its repository) and wants torchvision and datasets besides what this project installs, the
former for the installed torch: `pip install torchvision==0.28.0 datasets` where torch is 2.13 from the package index.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from lorabooth import mini
from lorabooth.families import load_family
from lorabooth.lora import LoraSpec
from scripts.peer import caption_of, photo_files

METADATA = "metadata.jsonl"
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""The surroundings in which every side of a benchmark of the CPU runs, whatever else the machine has."""


def command(script: Path, photos: Path, out: Path, settings: dict[str, Any], steps: int, seed: int = 42, save_every: int | None = None) -> list[str]:
    """What trains on PHOTOS with captions beside them as scripts/peer.py does; the LoRA is OUT/pytorch_lora_weights.safetensors,
    and after every `save_every` steps one of that name in OUT/checkpoint-N."""
    family, rank = load_family("mini"), settings["lora_rank"]
    # Names in full: of "proj_out" PEFT would take the transformer's last linear, too.
    layers = LoraSpec(rank, rank, settings["targets"]).module_names(family.empty_transformer())
    options = {
        "pretrained_model_name_or_path": mini.FOLDER, "dataset_name": dataset(photos, out.with_name(f"{photos.name} as a dataset")), "caption_column": "text",
        "instance_prompt": "a portrait of TOK", "output_dir": out, "resolution": family.native_px, "train_batch_size": settings["batch_size"],
        "max_train_steps": steps, "rank": rank, "lora_alpha": rank, "lora_layers": ",".join(layers), "learning_rate": settings["learning_rate"],
        "guidance_scale": 1, "optimizer": "adamw", "weighting_scheme": "none", "max_sequence_length": family.text_tokens, "seed": seed,
        "mixed_precision": "no", "lr_warmup_steps": 0, "checkpointing_steps": save_every or steps + 1,
    }  # fmt: skip
    return [sys.executable, str(script), *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def dataset(photos: Path, folder: Path) -> Path:
    """Photos and captions as the library `datasets` reads them: captions as files beside the photos would make it a folder of texts."""
    if not (folder / METADATA).exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for file in photo_files(photos):
            shutil.copyfile(file, folder / file.name)
            rows.append(json.dumps({"file_name": file.name, "text": caption_of(file)}) + "\n")
        (folder / METADATA).write_text("".join(rows), encoding="utf-8")
    return folder


def losses(out: Path) -> list[ScalarEvent]:
    """The loss of each step (`value`) and when it was (`wall_time`, seconds of the epoch), as the script logged them for TensorBoard."""
    for file in (out / "logs").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "loss" in events.Tags()["scalars"]:  # another file has the settings
            return list(events.Scalars("loss"))
    raise FileNotFoundError(f"the script logged no loss under {out}")
