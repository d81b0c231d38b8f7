"""What other programs call FLUX.1's layers, and which rows of theirs are ours.

Black Forest Labs' own code (and ComfyUI, kohya, XLabs after it) fuses query, key and value, and in the single blocks the
feed-forward too, into one linear (black-forest-labs/flux, modules/layers.py); diffusers has one linear for each.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

Sizes = Mapping[str, tuple[int, int]]
"""Of each linear of a transformer: outputs, inputs."""

DOUBLE_BLOCKS, SINGLE_BLOCKS = "transformer_blocks", "single_transformer_blocks"
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    # XLabs' names of their LoRAs: 1 is the picture, 2 the text.
    "processor.qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "processor.qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.proj_lora": ("proj_out",),
}
OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
HALVES_SWAPPED = "norm_out.linear"
"""BFL's last modulation gives the shift first, diffusers' the scale first."""
PREFIXES = ("transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "lora_unet_", "lora_transformer_", "lycoris_", "unet.", "")
CLIP_PREFIXES = ("text_encoder.", "lora_te1_", "text_encoders.clip_l.transformer.", "clip_l.transformer.", "clip_l.", "lora_te_")
OLD_CLIP = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
"""diffusers' names of CLIP's attention from before PEFT."""


@dataclass(frozen=True)
class Rows:
    """Some rows of somebody's linear, in order, that are one linear of diffusers."""

    module: str
    parts: tuple[slice, ...]


class Layout:
    """The linears of one transformer by every name under which files know them."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes

    def find(self, name: str) -> tuple[Rows, ...]:
        """What a layer's name in a file (with its prefix, without `.lora_A.weight` and the like) stands for; empty where nothing."""
        for prefix in PREFIXES:
            rest = name.removeprefix(prefix)
            if name.startswith(prefix) and (found := self._names.get(rest) or self._underscored.get(rest)):
                return found
        return ()

    def is_beyond(self, name: str) -> bool:
        """Whether a layer's name in a file is of a block further on than the base has: some models differ from FLUX.1 in the number of blocks only."""
        block = re.search(r"(?:^|[._])(single_transformer|single|transformer|double)_blocks[._](\d{1,6})[._]", name)
        return block is not None and int(block[2]) >= self._blocks(SINGLE_BLOCKS if block[1].startswith("single") else DOUBLE_BLOCKS)

    def bfl(self) -> dict[str, tuple[Rows, ...]]:
        """Black Forest Labs' own names, and what each stands for."""
        return {name: rows for name, rows in self._foreign() if ".processor." not in name}

    @cached_property
    def _names(self) -> dict[str, tuple[Rows, ...]]:
        whole = {name: (Rows(name, (slice(0, outputs),)),) for name, (outputs, _) in self.sizes.items()}
        return dict(self._foreign()) | dict(self._apart()) | whole

    @cached_property
    def _underscored(self) -> dict[str, tuple[Rows, ...]]:
        """kohya has underscores for points."""
        return {name.replace(".", "_"): rows for name, rows in self._names.items()}

    def _foreign(self) -> Iterator[tuple[str, tuple[Rows, ...]]]:
        for theirs, ours in OUTSIDE.items():
            if ours in self.sizes:
                yield theirs, (self._one(ours),)
        for blocks, ours, table in (("double_blocks", DOUBLE_BLOCKS, DOUBLE), ("single_blocks", SINGLE_BLOCKS, SINGLE)):
            for i in range(self._blocks(ours)):
                for theirs, parts in table.items():
                    modules = [f"{ours}.{i}.{part}" for part in parts]
                    if all(module in self.sizes for module in modules):
                        yield f"{blocks}.{i}.{theirs}", self._stacked(modules)

    def _blocks(self, kind: str) -> int:
        return len({name.split(".")[1] for name in self.sizes if name.startswith(f"{kind}.")})

    def _apart(self) -> Iterator[tuple[str, tuple[Rows, ...]]]:
        """OneTrainer's OMI format has Black Forest Labs' names, but for one, and diffusers' linears: qkv.0, qkv.1, qkv.2."""
        if "x_embedder" in self.sizes:
            yield "img_in.proj", (self._one("x_embedder"),)
        for name, rows in self.bfl().items():
            if len(rows) > 1:
                yield from ((f"{name}.{i}", (self._one(row.module),)) for i, row in enumerate(rows))

    def _one(self, module: str) -> Rows:
        outputs = self.sizes[module][0]
        half = outputs // 2
        return Rows(module, (slice(half, outputs), slice(0, half)) if module == HALVES_SWAPPED else (slice(0, outputs),))

    def _stacked(self, modules: list[str]) -> tuple[Rows, ...]:
        start, found = 0, []
        for module in modules:
            outputs = self.sizes[module][0]
            found.append(Rows(module, (slice(start, start + outputs),)))
            start += outputs
        return tuple(found)


class ClipLayout:
    """The linears of CLIP by diffusers', kohya's, ComfyUI's and OneTrainer's names; `text_model.` is left out by transformers since version 5."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self._names = {re.sub(r"^text_model\.", "", name): name for name in sizes}
        parts = [(name, *name.rpartition(".")) for name in self._names]
        self._names |= {f"{above}.{OLD_CLIP[end]}": self._names[name] for name, above, _, end in parts if end in OLD_CLIP}
        self._underscored = {name.replace(".", "_"): module for name, module in self._names.items()}

    def find(self, name: str) -> tuple[Rows, ...]:
        """What a layer's name in a file stands for; empty where nothing of CLIP."""
        for prefix in CLIP_PREFIXES:
            rest = re.sub(r"^text_model[._]", "", name.removeprefix(prefix))
            if name.startswith(prefix) and (module := self._names.get(rest) or self._underscored.get(rest)):
                return (Rows(module, (slice(0, self.sizes[module][0]),)),)
        return ()


def sizes_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each linear of a model, which may be on the meta device."""
    return {name: (m.out_features, m.in_features) for name, m in module.named_modules() if isinstance(m, nn.Linear)}
