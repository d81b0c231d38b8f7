"""Stage: the last checkpoint -> lora.safetensors, proven to load, and the run report."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel

from lorabooth import __version__, hub
from lorabooth.config import TrainConfig
from lorabooth.device import check_gpu
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.lora import LoraFile, LoraSpec, save_lora, tensors
from lorabooth.runs import RunDir, sha256_file
from train import report
from train.fit import checkpoint_of, final_weights, finished


def run(run_dir: RunDir) -> Path:
    """Write RUN/lora.safetensors and RUN/report.html; the path of the LoRA."""
    if not finished(run_dir):
        raise UserError(f"{run_dir.path} has not been trained to its last step", hint=f"go on with: python -m train fit {run_dir.path}")
    config = run_dir.config
    spec = LoraSpec(config.lora_rank, config.alpha, config.targets)
    skeleton = empty_transformer(config.model)
    parameters = spec.attach(skeleton, config.seed)
    weights = final_weights(run_dir)
    # The checkpoint numbers the weights in the order of `parameters`; the skeleton turns numbers into names.
    order = {id(p): w for p, w in zip(parameters, weights, strict=True)}
    names = {name: p for name, p in skeleton.named_parameters() if id(p) in order}
    keys = list(tensors(skeleton))
    state = {key: order[id(names[_parameter_name(key)])] for key in keys}
    dtype = torch.float32 if config.model == "mini" else torch.bfloat16
    save_lora(run_dir.lora, state, spec, metadata(run_dir), dtype)
    check_loads(run_dir.lora, len(keys))
    report.write(run_dir)
    return run_dir.lora


def check_model(config: TrainConfig) -> None:
    """Refuse a model or layers that training would refuse in its last stage, before a run is bound to them; needs no weights."""
    check_gpu(load_family(config.model).native_px, config.model)
    LoraSpec(config.lora_rank, config.alpha, config.targets).module_names(empty_transformer(config.model))


def empty_transformer(model: str) -> FluxTransformer2DModel:
    """The model's transformer on the meta device: names and shapes without memory."""
    with init_empty_weights():
        return FluxTransformer2DModel.from_config(hub.component_config(model, "transformer"))


def metadata(run_dir: RunDir) -> dict[str, str]:
    """What the file says of itself, by the names other tools read (modelspec.*, ss_*) and our own recipe; no path, no photo."""
    config, family = run_dir.config, load_family(run_dir.config.model)
    base = hub.display_name(config.model)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": f"{config.trigger_word} on {base}",
        "modelspec.trigger_phrase": config.trigger_word,
        "modelspec.usage_hint": f"put {config.trigger_word} in the prompt",
        "modelspec.license": family.licence.name,
        "modelspec.date": trained_at(run_dir).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(config.lora_rank),
        "ss_network_alpha": str(config.lora_rank),
        "ss_steps": str(config.steps),
        "ss_learning_rate": str(config.learning_rate),
        "ss_seed": str(config.seed),
        "lorabooth.version": __version__,
        "lorabooth.base": base,
        "lorabooth.base_sha256": base_sha256(config.model),
        "lorabooth.recipe": json.dumps(config.recipe() | {"model": base}),
    }


def trained_at(run_dir: RunDir) -> datetime:
    """When the last step was saved: a second export of a run is the same file, and pictures that name its hash still do."""
    return datetime.fromtimestamp((checkpoint_of(run_dir) / "state.json").stat().st_mtime, UTC)


def base_sha256(model: str) -> str:
    """SHA-256 of the transformer's weights, for one file its own, for several over their names and hashes."""
    import hashlib

    files = sorted(hub.component_folder(model, "transformer").glob("*.safetensors"))
    # The hub cache names a blob by its SHA-256, which saves reading 24 GB.
    digests = [f.resolve().name if re.fullmatch(r"[0-9a-f]{64}", f.resolve().name) else sha256_file(f) for f in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(f"{f.name} {d}" for f, d in zip(files, digests, strict=True)).encode()).hexdigest()


def check_loads(path: Path, expected: int) -> None:
    """diffusers must read the file's every tensor; a failure here is ours."""
    LoraFile.read(path)
    state, _ = FluxPipeline.lora_state_dict(str(path), return_alphas=True)
    assert len(state) == expected, f"{path}: diffusers reads {len(state)} of {expected} tensors"


def _parameter_name(key: str) -> str:
    """`transformer.a.b.lora_A.weight` -> PEFT's parameter name `a.b.lora_A.default.weight`."""
    return re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", key.removeprefix("transformer."))
