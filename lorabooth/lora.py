"""LoRA files: safetensors in diffusers' own keys, with metadata that says what they are.

Keys: `transformer.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank]. The strength alpha / rank is
folded into lora_B when it is not 1, since readers disagree about where alpha is kept.
"""

import json
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

from lorabooth.errors import UserError
from lorabooth.families.flux1 import TARGETS
from lorabooth.runs import sha256_file, write_durable

PREFIX = "transformer."
MAX_HEADER_BYTES = 4 * 1024 * 1024
ADAPTER = "default"


@dataclass(frozen=True)
class LoraSpec:
    """Shape of a LoRA: rank, alpha (strength is alpha / rank), and the modules it sits on (a regular expression, full match)."""

    rank: int
    alpha: int
    targets: str

    def module_names(self, transformer: torch.nn.Module) -> list[str]:
        """Names of the linears this LoRA sits on; a UserError that lists what can be matched where there is none."""
        linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        try:
            pattern = re.compile(TARGETS.get(self.targets, self.targets))
        except re.error as error:
            raise UserError(f"targets: {self.targets!r} is not a regular expression: {error}") from None
        names = [name for name in linears if pattern.fullmatch(name)]
        if not names:
            shapes = sorted({re.sub(r"\.\d+\.", ".N.", name, count=1) for name in linears})
            raise UserError(f"targets: {self.targets!r} matches no layer", hint=f"use one of {', '.join(TARGETS)}, or match names such as: {', '.join(shapes)}")
        return names

    def attach(self, transformer: torch.nn.Module, seed: int) -> list[Tensor]:
        """Put a fresh LoRA (fp32, lora_B zero) on the frozen transformer; its parameters, in a fixed order."""
        names = self.module_names(transformer)
        torch.manual_seed(seed)
        cast(Any, transformer).add_adapter(LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=names), adapter_name=ADAPTER)
        parameters: list[Tensor] = [p for p in transformer.parameters() if p.requires_grad]
        for p in parameters:
            p.data = p.data.float()
        return parameters


def tensors(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """The live LoRA weights by their file keys (without folding)."""
    return {PREFIX + name: tensor.detach() for name, tensor in get_peft_model_state_dict(transformer, adapter_name=ADAPTER).items()}


def save_lora(path: Path, state: dict[str, Tensor], spec: LoraSpec, metadata: dict[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Write a LoRA file durably; `state` as from `tensors`. Metadata values are text."""
    scale = spec.alpha / spec.rank
    folded = {name: (t * scale if ".lora_B." in name else t).to(dtype).contiguous().cpu() for name, t in state.items()}
    adapter = {f"{PREFIX}r": spec.rank, f"{PREFIX}lora_alpha": spec.rank, f"{PREFIX}target_modules": sorted({_module(name) for name in state})}
    write_durable(path, _sorted_header(save(folded, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(adapter), **metadata})))


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its metadata in order of name; the library's order is random, and the same LoRA must be the same file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@dataclass(frozen=True)
class LoraFile:
    """What the header of a LoRA file says; the weights stay on the disk."""

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> "LoraFile":
        """Check that a file is a whole safetensors file with a LoRA in it; a UserError says what it is instead."""
        header = _read_header(path)
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        if not any("lora" in name for name in shapes):
            raise UserError(f"{path} holds no LoRA: none of its {len(shapes)} tensors is named lora")
        return cls(path, metadata, shapes)

    @property
    def name(self) -> str:
        """What to call it: the run's folder for our own files, else the file's stem."""
        return self.path.parent.name if self.path.name == "lora.safetensors" else self.path.stem

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the file."""
        return sha256_file(self.path)

    @property
    def trigger_word(self) -> str:
        """The trigger word, where the file tells it."""
        return self.metadata.get("modelspec.trigger_phrase", "")

    def check_fits(self, transformer: torch.nn.Module, model: str) -> None:
        """A UserError where the file's layers or widths are not the transformer's (files in diffusers keys only)."""
        # Once a LoRA was on a linear, PEFT keeps the linear itself as `<name>.base_layer`.
        linears = {name.removesuffix(".base_layer"): module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
        sizes = {name: (module.out_features, module.in_features) for name, module in linears.items()}
        for key, shape in self.shapes.items():
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
            if not match:
                continue
            module, side = match.groups()
            made_for = self.metadata.get("lorabooth.base") or "another model"
            if module not in sizes:
                raise UserError(f"{self.path.name} does not fit {model}: it has a layer {module}, which this model lacks (the LoRA is of {made_for})")
            width = sizes[module][1] if side == "A" else sizes[module][0]
            found = shape[side == "A"] if len(shape) == 2 else shape
            if found != width:
                raise UserError(f"{self.path.name} does not fit {model}: {module} is {width} wide there and {found} in the LoRA (it is of {made_for})")


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Format: 8 bytes length (little endian), JSON, tensor bytes."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path} is not a safetensors file", hint="only safetensors is read: other formats can run code when loaded")
            header = json.loads(file.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            if not isinstance(header.get("__metadata__", {}), dict) or not all(isinstance(entry["shape"], list) for entry in entries):
                raise TypeError("a header of another shape than safetensors'")
            end = max((entry["data_offsets"][1] for entry in entries), default=0)
        if path.stat().st_size != 8 + length + end:
            raise UserError(f"{path} is cut short: it should be {8 + length + end} bytes and is {path.stat().st_size}")
    except FileNotFoundError:
        raise UserError(f"no LoRA file at {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({type(error).__name__})") from None
    return header


def _module(key: str) -> str:
    return re.sub(r"\.lora_[AB]\.weight$", "", key.removeprefix(PREFIX))
