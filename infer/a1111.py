"""The text in which AUTOMATIC1111's web UI writes down how a picture was made; Forge, CivitAI and ComfyUI read it, too.

Prompt, a line `Negative prompt: ...`, and one last line of `Key: value` pairs, where a value with a comma, a colon or a
line break is a JSON string. LoRAs stand twice: as `<lora:name:weight>` behind the prompt, and with their hashes in the
last line.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

HASH_CHARACTERS = 12
"""Of the hash of a LoRA's tensors, which leaves out the header."""


def parameters(record: dict[str, Any], tensor_hashes: Iterable[str], version: str) -> str:
    """The text for one picture; `record` as from `Making.record`, and for each of its LoRAs the hash of its tensors."""
    names = [plain(lora["name"]) for lora in record["loras"]]
    tags = "".join(f" <lora:{name}:{lora['weight']:g}>" for name, lora in zip(names, record["loras"], strict=True))
    pairs: dict[str, Any] = {
        "Steps": record["num_inference_steps"],
        "Sampler": "Euler",
        "CFG scale": f"{record['true_cfg_scale']:g}",
        # FLUX's guidance, by Forge's name: where readers know only "CFG scale", it is true classifier-free guidance.
        "Distilled CFG Scale": f"{record['guidance_scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record["model"],
    }
    if source := record.get("source"):
        pairs |= {"Denoising strength": f"{source['prompt_strength']:g}", "Source hash": source["sha256"]}
    if names:
        pairs["Lora hashes"] = ", ".join(f"{name}: {sha256[:HASH_CHARACTERS]}" for name, sha256 in zip(names, tensor_hashes, strict=True))
    pairs["Version"] = f"lorabooth {version}"
    # ComfyUI takes a text without this line for none at all, so it is there without a negative prompt, too.
    return f"{record['prompt']}{tags}\nNegative prompt: {record['negative_prompt']}\n" + ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items())


def plain(name: str) -> str:
    """A LoRA's name without the characters that have a meaning in the text."""
    return re.sub(r"[^\w .-]", "_", name).strip() or "lora"


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text
