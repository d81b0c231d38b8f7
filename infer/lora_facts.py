"""What the header of a LoRA file tells, whichever trainer wrote it: base, words, rank, how it was trained. Without torch."""

import json
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from lorabooth import keys
from lorabooth.lora_file import LoraFile

BASE = ("lorabooth.base", "ss_sd_model_name", "base_model", "ss_base_model_version", "modelspec.architecture")
TRAINING = {
    "title": ("modelspec.title", "ss_output_name", "name"),
    "author": ("modelspec.author",),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "photos": ("ss_num_train_images",),
    "learning rate": ("ss_learning_rate", "ss_unet_lr"),
    "optimizer": ("ss_optimizer",),
    "seed": ("ss_seed",),
    "date": ("modelspec.date",),
    "licence": ("modelspec.license",),
    "consent": ("lorabooth.consent",),
    "lorabooth": ("lorabooth.version",),
    "made of": ("lorabooth.made_of",),
    "comment": ("ss_training_comment",),
}
"""Names of metadata, the first that is there counts: modelspec's, kohya's (ss_), ours."""
WORDS_SHOWN = 5


def base(file: LoraFile) -> str:
    """The base model that a file names; empty where it names none."""
    return next((text for name in BASE if (text := file.metadata.get(name, "")) not in ("", "None")), "")


def training(file: LoraFile) -> dict[str, str]:
    """How it was trained, as far as the file says."""
    told = {what: next((text for name in names if (text := file.metadata.get(name, "")) not in ("", "None")), "") for what, names in TRAINING.items()}
    info = _parsed(file.metadata.get("training_info", ""))  # ai-toolkit's
    if isinstance(info, dict) and isinstance(info.get("step"), int):
        told["steps"] = told["steps"] or str(info["step"])
    told["date"] = told["date"] or _date(file.metadata.get("ss_training_finished_at", ""))
    return {what: text for what, text in told.items() if text}


def words(file: LoraFile) -> list[str]:
    """The words that stood in its captions most often, where kohya's trainer counted them: one of them may be the trigger word."""
    counted = _parsed(file.metadata.get("ss_tag_frequency", ""))
    found: Counter[str] = Counter()
    for folder in counted.values() if isinstance(counted, dict) else ():
        for word, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int) and word.strip():
                found[word.strip()] += count
    return [word for word, _ in found.most_common(WORDS_SHOWN)]


def ranks(file: LoraFile) -> dict[str, int]:
    """The rank of each layer, by the file's own names."""
    downs = {name: file.shapes[parts["down"]] for name, parts in keys.layers(file.shapes).items() if "down" in parts}
    return {name: shape[0] if shape else 0 for name, shape in downs.items()}


def rank_text(file: LoraFile) -> str:
    """`16`, or `4-16` where layers differ."""
    found = sorted(set(ranks(file).values()))
    return "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def counted(values: Any) -> dict[str, int]:
    """How often each value stands there, the most frequent first."""
    return {str(value): count for value, count in Counter(values).most_common()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _date(seconds: str) -> str:
    try:
        return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else ""
    except (ValueError, OverflowError, OSError):
        return ""
