"""Stage: the last checkpoint -> lora.safetensors, proven to load, and the run report."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers import FluxPipeline

from lorabooth import __version__, consent, hub, pages
from lorabooth.checkpoints import file_dtype, named
from lorabooth.config import TrainConfig
from lorabooth.device import check_gpu, compute_device
from lorabooth.errors import StageFailed, UserError
from lorabooth.families import load_family
from lorabooth.lora import LoraSpec, save_lora
from lorabooth.lora_file import LoraFile
from lorabooth.runs import RunDir
from train import report
from train.base import pinned
from train.fit import checkpoint_of, final_weights, finished
from train.planning import plans_for
from train.trackers import check_trackers

THUMBNAIL_PX = 256
CHECK = (sys.executable, "-m", "train", "check")


def run(run_dir: RunDir, raw: bool = False) -> Path:
    """Write RUN/lora.safetensors (raw: RUN/lora-raw.safetensors, of the weights without averaging) and RUN/report.html; the path of the LoRA."""
    if not finished(run_dir):
        raise UserError(f"{run_dir.path} has not been trained to its last step", hint=f"go on with: python -m train fit {run_dir.path}")
    config = run_dir.config
    spec = LoraSpec.of(config)
    state = named(run_dir, final_weights(run_dir, raw))
    path = run_dir.path / "lora-raw.safetensors" if raw else run_dir.lora
    run_dir.check_there()
    save_lora(path, state, spec, metadata(run_dir), file_dtype(config))
    check_loads(path, len(state))
    report.write(run_dir)
    return path


def check_model(config: TrainConfig) -> None:
    """Refuse a model or layers that training would refuse in its last stage, before a run is bound to them; needs no weights."""
    family = load_family(config.model)
    check_gpu(family.native_px, config.model)
    LoraSpec.of(config).check(family.empty_transformer())
    check_trackers(config)
    if torch.cuda.is_available():
        # In a process of its own: one that asks the GPU keeps half a gigabyte of it to its end, and this one lives as long as the run.
        code = subprocess.run(CHECK, input=config.model_dump_json(), text=True, check=False).returncode
        if code:
            raise StageFailed("check", code)


def check_plan(config: TrainConfig) -> None:
    """Refuse a training that does not fit this GPU, with the settings that would."""
    plans_for(config, load_family(config.model), compute_device())


def metadata(run_dir: RunDir) -> dict[str, str]:
    """What the file says of itself, by the names other tools read (modelspec.*, ss_*) and our own recipe; no path, no photo."""
    config, family = run_dir.config, load_family(run_dir.config.model)
    base = hub.display_name(config.model)
    agreed = consent.recorded(run_dir)
    rank = config.lora_rank * (2 if config.lora_init == "pissa" else 1)
    return (
        {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "flux-1-dev/lora",
            "modelspec.implementation": "https://github.com/huggingface/diffusers",
            "modelspec.title": f"{config.trigger_word} on {base}",
            "modelspec.trigger_phrase": config.trigger_word,
            "modelspec.usage_hint": f"put {config.trigger_word} in the prompt",
            "modelspec.license": family.licence.name,
            "modelspec.resolution": f"{family.native_px}x{family.native_px}",
            "modelspec.date": trained_at(run_dir).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "ss_base_model_version": "flux1",
            "ss_network_module": "networks.lora_flux",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(rank),
            "ss_steps": str(config.steps),
            "ss_learning_rate": str(config.learning_rate),
            "ss_seed": str(config.seed),
            "lorabooth.version": __version__,
            "lorabooth.base": base,
            "lorabooth.base_sha256": pinned(run_dir, "transformer"),
            "lorabooth.recipe": json.dumps(hub.public_recipe(config)),
        }
        | thumbnail(run_dir)
        | ({"lorabooth.consent": agreed.sentence()} if agreed else {})
    )


def thumbnail(run_dir: RunDir) -> dict[str, str]:
    """The last preview of the first prompt, for programs that show a LoRA by its picture; nothing where there are no previews."""
    file = run_dir.samples / f"step-{run_dir.config.steps:06d}-0.png"
    picture = pages.thumbnail(file, THUMBNAIL_PX, "JPEG") if file.exists() else ""
    return {"modelspec.thumbnail": picture} if picture else {}


def trained_at(run_dir: RunDir) -> datetime:
    """When the last step was saved: a second export of a run is the same file, and pictures that name its hash still do."""
    return datetime.fromtimestamp((checkpoint_of(run_dir) / "state.json").stat().st_mtime, UTC)


def check_loads(path: Path, expected: int) -> None:
    """diffusers must read the file's every tensor; a failure here is ours."""
    LoraFile.read(path)
    state, _ = FluxPipeline.lora_state_dict(str(path), return_alphas=True)
    assert len(state) == expected, f"{path}: diffusers reads {len(state)} of {expected} tensors"
