"""The same LoRA as each of the trainers of FLUX.1 would write it: written from their formats' descriptions, with none of our reader's code.

Sources: kohya's sd-scripts (networks/lora_flux.py: fused linears, `.alpha`), black-forest-labs/flux (names), XLabs' x-flux
(`processor.*_lora`), PEFT's `save_pretrained`, diffusers' `save_lora_weights`.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Of each linear, by diffusers' names: down [rank, in] and up [out, rank]."""


def changes(pairs: Pairs) -> dict[str, Tensor]:
    """What each linear's weight changes by."""
    return {name: up @ down for name, (down, up) in pairs.items()}


def fused(pairs: Pairs, names: list[str]) -> tuple[Tensor, Tensor]:
    """Several linears as one: the downs below one another, the ups on the diagonal."""
    downs, ups = zip(*(pairs[name] for name in names), strict=True)
    return torch.cat(downs), torch.block_diag(*ups)


def bfl(pairs: Pairs) -> Pairs:
    """By Black Forest Labs' names, with their fused linears."""
    found: Pairs = {}
    for i in range(1 + max(int(name.split(".")[1]) for name in pairs if name.startswith("transformer_blocks"))):
        old, new = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        found[new + "img_attn.qkv"] = fused(pairs, [old + f"attn.to_{x}" for x in "qkv"])
        found[new + "txt_attn.qkv"] = fused(pairs, [old + f"attn.add_{x}_proj" for x in "qkv"])
        found[new + "img_attn.proj"], found[new + "txt_attn.proj"] = pairs[old + "attn.to_out.0"], pairs[old + "attn.to_add_out"]
        found[new + "img_mlp.0"], found[new + "img_mlp.2"] = pairs[old + "ff.net.0.proj"], pairs[old + "ff.net.2"]
        found[new + "txt_mlp.0"], found[new + "txt_mlp.2"] = pairs[old + "ff_context.net.0.proj"], pairs[old + "ff_context.net.2"]
        found[new + "img_mod.lin"], found[new + "txt_mod.lin"] = pairs[old + "norm1.linear"], pairs[old + "norm1_context.linear"]
    for i in range(1 + max(int(name.split(".")[1]) for name in pairs if name.startswith("single_transformer_blocks"))):
        old, new = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        found[new + "linear1"] = fused(pairs, [*(old + f"attn.to_{x}" for x in "qkv"), old + "proj_mlp"])
        found[new + "linear2"], found[new + "modulation.lin"] = pairs[old + "proj_out"], pairs[old + "norm.linear"]
    return found


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path, metadata or None)
    return path


def diffusers(path: Path, pairs: Pairs, **metadata: str) -> Path:
    named = {f"transformer.{name}.lora_{side}.weight": t for name, both in pairs.items() for side, t in zip("AB", both, strict=True)}
    return write(path, named, **metadata)


def diffusers_with_alpha_in_its_metadata(path: Path, pairs: Pairs) -> Path:
    """As `save_lora_weights` with `transformer_lora_adapter_metadata`; the strength of 2 is in no tensor."""
    others = {name: len(down) for name, (down, _) in pairs.items() if len(down) != 4}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(pairs), rank_pattern=others, alpha_pattern={name: 2 * rank for name, rank in others.items()})
    described = {f"transformer.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return diffusers(path, {name: (down, up / 2) for name, (down, up) in pairs.items()}, lora_adapter_metadata=json.dumps(described), format="pt")


def diffusers_with_alpha_tensors(path: Path, pairs: Pairs) -> Path:
    """As in files of some notebooks: PEFT's names and kohya's alphas."""
    named = {f"transformer.{name}.lora_{side}.weight": t for name, (down, up) in pairs.items() for side, t in (("A", down), ("B", up * 4))}
    return write(path, named | {f"transformer.{name}.alpha": torch.tensor(len(down) / 4) for name, (down, _) in pairs.items()})


def peft_folder(path: Path, pairs: Pairs) -> Path:
    """As PEFT's `save_pretrained` with rsLoRA."""
    scaled = {name: (down, up * len(down) ** 0.5 / 8) for name, (down, up) in pairs.items()}
    named = {f"base_model.model.{name}.lora_{side}.weight": t for name, both in scaled.items() for side, t in zip("AB", both, strict=True)}
    (path.parent / path.stem).mkdir(parents=True)
    (path.parent / path.stem / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {}}))
    return write(path.parent / path.stem / "adapter_model.safetensors", named)


def old_diffusers(path: Path, pairs: Pairs) -> Path:
    return write(path, {f"transformer.{name}.lora.{side}.weight": t for name, both in pairs.items() for side, t in zip(("down", "up"), both, strict=True)})


def kohya(path: Path, pairs: Pairs) -> Path:
    """Alpha is half of the rank, so the ups are twice as large."""
    named = {}
    for name, (down, up) in bfl(pairs).items():
        key = "lora_unet_" + name.replace(".", "_")
        named |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * 2, f"{key}.alpha": torch.tensor(len(down) / 2)}
    return write(path, named, ss_network_dim="4", ss_network_alpha="2")


def comfyui(path: Path, pairs: Pairs) -> Path:
    named = {f"diffusion_model.{name}.lora_{side}.weight": t for name, both in bfl(pairs).items() for side, t in zip("AB", both, strict=True)}
    return write(path, named)


def onetrainer(path: Path, pairs: Pairs) -> Path:
    """diffusers' names with kohya's ends."""
    named = {}
    for name, (down, up) in pairs.items():
        key = "lora_transformer_" + name.replace(".", "_")
        named |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(len(down)))}
    return write(path, named)


def omi(path: Path, pairs: Pairs) -> Path:
    """OneTrainer's newer format: Black Forest Labs' names, with diffusers' linears as qkv.0 and so on (omi_model_standards, convert_flux_lora.py)."""
    names = {"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2"}
    names |= {"ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2", "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"}
    names |= {f"attn.to_{x}": f"img_attn.qkv.{i}" for i, x in enumerate("qkv")} | {f"attn.add_{x}_proj": f"txt_attn.qkv.{i}" for i, x in enumerate("qkv")}
    single = {f"attn.to_{x}": f"linear1.{i}" for i, x in enumerate("qkv")} | {"proj_mlp": "linear1.3", "proj_out": "linear2", "norm.linear": "modulation.lin"}
    named = {}
    for name, (down, up) in pairs.items():
        blocks, number, rest = name.split(".", 2)
        kind, table = ("double", names) if blocks == "transformer_blocks" else ("single", single)
        key = f"transformer.{kind}_blocks.{number}.{table[rest]}"
        named |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(len(down)))}
    return write(path, named)


def lycoris(path: Path, pairs: Pairs) -> Path:
    """As SimpleTuner writes LyCORIS' LoRA."""
    return write(path, {name.replace("lora_transformer_", "lycoris_", 1): t for name, t in load_file(onetrainer(path, pairs)).items()})


def xlabs(path: Path, pairs: Pairs) -> Path:
    """Only attention has a name there, and query, key and value share what they read: `shared_attention` makes such pairs."""
    named = {}
    for i in range(1 + max(int(name.split(".")[1]) for name in pairs if name.startswith("transformer_blocks"))):
        old, new = f"transformer_blocks.{i}.attn.", f"double_blocks.{i}.processor."
        for number, inner, outer in ((1, "to_{}", "to_out.0"), (2, "add_{}_proj", "to_add_out")):
            three = [pairs[old + inner.format(x)] for x in "qkv"]
            named |= {f"{new}qkv_lora{number}.down.weight": three[0][0], f"{new}qkv_lora{number}.up.weight": torch.cat([up for _, up in three])}
            named |= {f"{new}proj_lora{number}.{side}.weight": t for side, t in zip(("down", "up"), pairs[old + outer], strict=True)}
    return write(path, named)


def shared_attention(pairs: Pairs) -> Pairs:
    """The attention of the double blocks, with one down for query, key and value."""
    found = {name: both for name, both in pairs.items() if name.startswith("transformer_blocks") and ".attn." in name}
    for name in found:
        for first, others in (("to_q", ("to_k", "to_v")), ("add_q_proj", ("add_k_proj", "add_v_proj"))):
            if name.endswith(first):
                for other in others:
                    found[name.removesuffix(first) + other] = found[name][0], found[name.removesuffix(first) + other][1]
    return found


WRITERS = (diffusers, diffusers_with_alpha_in_its_metadata, diffusers_with_alpha_tensors, peft_folder, old_diffusers, kohya, comfyui, onetrainer, omi, lycoris)
