"""LoRA files: safetensors in diffusers' own keys, with metadata that says what they are.

Keys: `transformer.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank]; those of CLIP begin with `text_encoder.text_model.`.
The strength alpha / rank is folded into lora_B when it is not 1, since readers disagree about where alpha is kept.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families.flux1 import CLIP_TARGETS, TARGETS
from lorabooth.runs import write_durable

PREFIX = "transformer."
CLIP_PREFIX = "text_encoder."
CLIP_MODULE = "text_model."
"""What the names of CLIP's layers begin with in files; transformers leaves it out since version 5."""
ADAPTER = "default"
INITS: dict[str, Any] = {"default": True, "gaussian": "gaussian", "pissa": "pissa_niter_16"}
"""PEFT's names of how a LoRA starts. PiSSA by its fast decomposition: the exact one of FLUX's 494 layers takes longer than a training."""


@dataclass(frozen=True)
class LoraSpec:
    """Shape of a LoRA: rank, alpha, and the modules it sits on (a regular expression); the rest by PEFT's names."""

    rank: int
    alpha: int
    targets: str
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"
    searched: bool = False
    """Whether `targets` is looked for anywhere in a module's name, as the hosted trainer does; else it is one of TARGETS or must match a whole name."""

    @classmethod
    def of(cls, config: TrainConfig) -> "LoraSpec":
        """The LoRA that a recipe asks for."""
        searched = bool(config.layers_to_optimize_regex)
        targets = config.layers_to_optimize_regex if searched else config.targets
        return cls(config.lora_rank, config.alpha, targets, config.lora_dropout, config.use_rslora, config.use_dora, config.lora_init, searched)

    @property
    def scale(self) -> float:
        """Strength: alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def module_names(self, transformer: torch.nn.Module) -> list[str]:
        """Names of the linears this LoRA sits on; a UserError that lists what can be matched where there is none. An expression that matches no name may
        have them with the prefix that they have in LoRA files."""
        linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        option = "layers_to_optimize_regex" if self.searched else "targets"
        try:
            pattern = re.compile(self.targets if self.searched else TARGETS.get(self.targets, self.targets))
        except re.error as error:
            raise UserError(f"{option}: {self.targets!r} is not a regular expression: {error}") from None
        matches = pattern.search if self.searched else pattern.fullmatch
        names = [name for name in linears if matches(name)] or [name for name in linears if matches(PREFIX + name)]
        if not names:
            shapes = ", ".join(sorted({re.sub(r"\.\d+\.", ".N.", name, count=1) for name in linears}))
            known = "" if self.searched else f"use one of {', '.join(TARGETS)}, or "
            raise UserError(f"{option}: {self.targets!r} matches no layer", hint=f"{known}match names such as: {shapes}")
        return names

    def check(self, transformer: torch.nn.Module) -> None:
        """Refuse what could not be put on a transformer, which may be on the meta device."""
        names = self.module_names(transformer)
        if self.init != "pissa":
            return
        narrower = {name: min(cast(torch.nn.Linear, transformer.get_submodule(name)).weight.shape) for name in names}
        name = min(names, key=narrower.__getitem__)
        if self.rank > narrower[name]:
            raise UserError(f"lora_rank is {self.rank}; with lora_init pissa it is at most {narrower[name]}, for {name} has no more directions")

    def attach(self, transformer: torch.nn.Module, seed: int, start: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Put a fresh LoRA (fp32; the transformer's output does not change) on the frozen transformer; its parameters, in a fixed order.

        start: the weights (as from `tensors`) with which a PiSSA LoRA started before. PiSSA (Meng et al. 2024, arXiv
        2404.02948) takes its start out of the base, and a resumed run must take out the same.
        """
        names = self.module_names(transformer)
        parameters = self._add(transformer, names, seed, INITS[self.init] if start is None else True)
        if start is not None:
            self._take_out(transformer, names, start)
        return parameters

    def attach_clip(self, text_encoder: torch.nn.Module, seed: int) -> list[Tensor]:
        """The same on CLIP's attention; a PiSSA LoRA starts there as a plain one."""
        return self._add(text_encoder, list(CLIP_TARGETS), seed, INITS["default" if self.init == "pissa" else self.init])

    def _add(self, module: torch.nn.Module, names: list[str], seed: int, init: Any) -> list[Tensor]:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=names, lora_dropout=self.dropout, use_rslora=self.use_rslora, use_dora=self.use_dora,
            init_lora_weights=init,
        )  # fmt: skip
        cast(Any, module).add_adapter(config, adapter_name=ADAPTER)
        parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        for p in parameters:
            p.data = p.data.float()
        return parameters

    @torch.no_grad()
    def _take_out(self, transformer: torch.nn.Module, names: list[str], start: dict[str, Tensor]) -> None:
        for name in names:
            layer = cast(Any, transformer.get_submodule(name))
            base = layer.base_layer.weight
            a, b = (start[f"{PREFIX}{name}.lora_{side}.weight"].to(base.device) for side in "AB")
            layer.lora_A[ADAPTER].weight.copy_(a)
            layer.lora_B[ADAPTER].weight.copy_(b)
            base.data = (base.float() - self.scale * b @ a).to(base.dtype)


def tensors(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """The live LoRA weights of a transformer by their file keys (without folding)."""
    return {PREFIX + name: tensor.detach() for name, tensor in _adapter(transformer).items()}


def clip_tensors(text_encoder: torch.nn.Module) -> dict[str, Tensor]:
    """Those of CLIP."""
    return {CLIP_PREFIX + CLIP_MODULE + name.removeprefix(CLIP_MODULE): tensor.detach() for name, tensor in _adapter(text_encoder).items()}


def _adapter(module: torch.nn.Module) -> dict[str, Tensor]:
    # Never embeddings: to find out whether they have grown, PEFT would ask the hub for what a config calls its origin.
    return get_peft_model_state_dict(module, adapter_name=ADAPTER, save_embedding_layers=False)


def since(start: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a PiSSA LoRA learned since its start, as a plain LoRA of the untouched base: B A - B_0 A_0, of twice the rank."""
    return state | {name: torch.cat([state[name], t], 0) if ".lora_A." in name else torch.cat([state[name], -t], 1) for name, t in start.items()}


def save_lora(path: Path, state: dict[str, Tensor], spec: LoraSpec, metadata: dict[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Write a LoRA file durably; `state` as from `tensors`. Metadata values are text."""
    folded = {name: (t * spec.scale if ".lora_B." in name else t).to(dtype).contiguous().cpu() for name, t in state.items()}
    described = _described(state, PREFIX, spec) | (_described(state, CLIP_PREFIX, spec) if any(name.startswith(CLIP_PREFIX) for name in state) else {})
    write_durable(path, sorted_header(save(folded, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(described), **metadata})))


def _described(state: dict[str, Tensor], prefix: str, spec: LoraSpec) -> dict[str, Any]:
    """What PEFT wants to know of one model's part of a file, each name behind the part's prefix."""
    part = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    rank = next(len(t) for name, t in part.items() if ".lora_A." in name)
    targets = sorted({_module(name) for name in part}) if prefix == PREFIX else list(CLIP_TARGETS)
    adapter = {"r": rank, "lora_alpha": rank, "target_modules": targets, "use_dora": spec.use_dora}
    return {prefix + name: value for name, value in adapter.items()}


def sorted_header(data: bytes) -> bytes:
    """A safetensors file with its metadata in order of name; the library's order is random, and the same LoRA must be the same file.

    The hash of the tensors is added by the names under which others look for it.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    digest = hashlib.sha256(memoryview(data)[8 + length :]).hexdigest()
    header["__metadata__"] = dict(sorted((header["__metadata__"] | {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _module(key: str) -> str:
    return re.sub(r"\.lora_([AB]\.weight|magnitude_vector)$", "", key)
