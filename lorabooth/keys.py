"""The names of a LoRA file's tensors: of which layer and which half each is, and which program's names they are. Without torch."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

KINDS = {
    "down": r"lora_A(\.\w+)?\.weight|lora_down\.weight|lora(_linear_layer)?\.down\.weight|down\.weight",
    "up": r"lora_B(\.\w+)?\.weight|lora_up\.weight|lora(_linear_layer)?\.up\.weight|up\.weight",
    "alpha": r"alpha",
    "magnitude": r"lora_magnitude_vector(\.\w+)*|dora_scale|magnitude",
}
"""Ends of the names of tensors, after the layer's name and a point."""
WRITTEN = ("diffusers", "kohya", "comfyui")
"""The formats that `conversion` writes, and the precisions."""
PRECISIONS = ("fp32", "bf16", "fp16")
OTHER_METHODS = {
    r"\.lokr_": "LoKr", r"\.hada_": "LoHa", r"\.oft_": "OFT", r"\.lora_mid\.": "LoCon with a middle", r"\.[ab][12]\.weight$": "GLoRA", r"\.on_input$": "IA3",
}  # fmt: skip
WHOLE_CHANGES = r"\.diff(_b)?$"
"""LyCORIS' `full`, where there is nothing else; beside a LoRA these are biases and norms, and are left out by name."""
ADAPTER_MODEL, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What PEFT's `save_pretrained` writes."""
T5_PREFIXES = ("lora_te2_", "lora_te3_", "text_encoder_2.", "t5xxl.", "text_encoders.t5xxl.", "t5.")
TEXT_PREFIXES = ("lora_te", "text_encoder", "clip_l.", "t5xxl.", "t5.")
FORMATS = {
    "XLabs": r".+\.processor\.\w*lora\d?\.(down|up)\.weight",
    "PEFT adapter": r"base_model\.model\..+",
    "OneTrainer": r"lora_transformer_.+|transformer\.(double|single)_blocks\..+",
    "LyCORIS": r"lycoris_.+",
    "kohya": r"lora_(unet|te\d?)_.+",
    "BFL and ComfyUI": r"((model\.)?diffusion_model\.|(double|single)_blocks\.|clip_l\.).+",
    "diffusers, old names": r"(transformer|unet|text_encoder)\..+\.lora\.(down|up)\.weight",
    "diffusers": r"(transformer|unet|text_encoder|(single_)?transformer_blocks)\..+",
}
"""Whose names these are; the first that matches counts."""
NAME_CHARACTERS = 500
"""No layer has a longer name. Those of strangers may have millions, and expressions take their time over them."""


def split(key: str) -> tuple[str, str] | None:
    """A tensor's name as its layer's and its kind; None where it is no part of a LoRA."""
    if len(key) > NAME_CHARACTERS:
        return None
    return next(((m[1], kind) for kind, end in KINDS.items() if (m := re.fullmatch(rf"(.+?)\.(?:{end})", key))), None)


def layers(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The tensors of each layer, by kind."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in keys:
        if parts := split(key):
            found[parts[0]][parts[1]] = key
    return dict(found)


def other_method(keys: Iterable[str]) -> tuple[str, str] | None:
    """The method of a file that holds no LoRA but a relative of it, and the tensor that tells."""
    keys = list(keys)
    marks = OTHER_METHODS | ({} if any(map(split, keys)) else {WHOLE_CHANGES: "LyCORIS of whole weights"})
    return next(((name, key) for key in keys for mark, name in marks.items() if len(key) <= NAME_CHARACTERS and re.search(mark, key)), None)


def format_of(keys: Iterable[str]) -> str:
    """The format of a file by its tensors' names: that of most layers; of the text encoders' only where it has no others."""
    keys = list(keys)
    if method := other_method(keys):
        return method[0]
    downs = [parts["down"] for parts in layers(keys).values() if "down" in parts]
    named = Counter(_named(key) for key in [key for key in downs if not of_text(key)] or downs)
    return named.most_common(1)[0][0] if named else "unknown"


def of_t5(name: str) -> bool:
    """Whether a layer is one of T5, which is not trained here."""
    return name.startswith(T5_PREFIXES)


def of_text(name: str) -> bool:
    """Whether a layer is one of a text encoder, CLIP or T5."""
    return name.startswith(TEXT_PREFIXES)


def _named(key: str) -> str:
    return next((name for name, pattern in FORMATS.items() if re.fullmatch(pattern, key)), "unknown")
