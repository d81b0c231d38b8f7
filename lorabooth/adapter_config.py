"""PEFT's description of an adapter, in which the strength of its LoRA stands: in a file's metadata, or beside it. Without torch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorabooth.entry import printable
from lorabooth.errors import UserError
from lorabooth.keys import ADAPTER_CONFIG, ADAPTER_MODEL
from lorabooth.lora_file import LoraFile

PARTS = ("transformer.", "text_encoder.")
OF_ANOTHER_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Starts of a LoRA that PEFT takes out of the base (its `init_lora_weights`): what is trained then belongs to what is left of it."""


def adapter_config(file: LoraFile, name: str) -> dict[str, Any]:
    """PEFT's description of the part of a file to which a layer belongs: in its metadata, or beside it."""
    if text := file.metadata.get("lora_adapter_metadata"):
        part = PARTS[name.startswith(PARTS[1])]
        with _described(file):
            described = json.loads(text)
            # A transformer's own `save_lora_adapter` leaves the name of the part out.
            if part != PARTS[0] or any(key.startswith(PARTS) for key in described):
                described = {key.removeprefix(part): value for key, value in described.items() if key.startswith(part)}
            return _checked(file, described)
    return described_beside(file)


def described_beside(file: LoraFile) -> dict[str, Any]:
    """What counts here of PEFT's description in the folder of a file: lora_alpha, alpha_pattern, use_rslora; empty where the file needs none."""
    beside = file.path.parent / ADAPTER_CONFIG
    if file.path.name != ADAPTER_MODEL or "lora_adapter_metadata" in file.metadata or not beside.exists():
        return {}
    with _described(file):
        return _checked(file, json.loads(beside.read_text(encoding="utf-8")))


def identity(file: LoraFile) -> str:
    """What tells apart what files add to a base: the hash, with the description beside it, which two folders may have of their own."""
    beside = described_beside(file)
    return f"{file.sha256} {json.dumps(beside, sort_keys=True)}" if beside else file.sha256


@contextmanager
def _described(file: LoraFile) -> Iterator[None]:
    try:
        yield
    except (ValueError, AttributeError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{file.path.name}: the description of its adapter is not readable ({type(error).__name__})") from None


def _checked(file: LoraFile, config: dict[str, Any]) -> dict[str, Any]:
    """What of a description counts here, with numbers where numbers are to be. Raises what their absence raises."""
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(OF_ANOTHER_BASE):
        raise UserError(
            f"{file.path.name} began as {printable(start)}, which takes a part out of the base: it does not fit the base as it is",
            hint="make a plain LoRA of it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if config.get("lora_alpha") is None:
        return {}
    pattern = {str(name): float(value) for name, value in (config.get("alpha_pattern") or {}).items()}
    return {"lora_alpha": float(config["lora_alpha"]), "alpha_pattern": pattern, "use_rslora": bool(config.get("use_rslora"))}
