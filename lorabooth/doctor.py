"""`lorabooth doctor`: what this machine has, what is missing and how to get it. It never uses the network and never shows a token."""

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from packaging.requirements import Requirement

from lorabooth import __version__, machine, mini
from lorabooth.imports import NO_DOCSTRINGS, WITH_DOCSTRINGS

GIB = 1024**3
FLUX_DEV = "black-forest-labs/FLUX.1-dev"
FLUX_DEV_DOWNLOAD_BYTES = 34 * 10**9
"""Transformer 23.8 GB, T5 9.5 GB, CLIP and VAE 0.4 GB in bf16."""
FLUX_DEV_TRAIN_BYTES = 15 * GIB // 2
"""What a card of 8 GB has: the lightest plan (train/plan.py) trains 512 px on it."""
RUN_BYTES = 2 * 10**9
"""A run's photos, caches, checkpoints and previews, with room to spare."""

# A few files that a complete download has; an index names the shards that belong to it.
FLUX_DEV_FILES = ("model_index.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
FLUX_DEV_INDEXES = ("transformer/diffusion_pytorch_model.safetensors.index.json", "text_encoder_2/model.safetensors.index.json")

OPTIONAL_USES = {"mini": "draws the mini model's world for the demo and its figures"}


@dataclass(frozen=True)
class Problem:
    """One thing that stands in the way, and the way out; `essential` when nothing works without it."""

    what: str
    fix: str
    essential: bool = False


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for a program to read; sizes in bytes.  [default: text]")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what this machine has, what is missing and how to get it.

    It uses no network and changes nothing. Sizes are in GiB. The exit code is 1 when something essential is broken, else 0.

    \b
    Example:
      lorabooth doctor
      lorabooth doctor --json > machine.json
    """
    findings = examine()
    click.echo(json.dumps(findings, indent=2) if as_json else "\n".join(report_lines(findings)))
    if any(problem["essential"] for problem in findings["problems"]):
        ctx.exit(1)


def examine() -> dict[str, Any]:
    """All findings in the form of the JSON output."""
    facts = machine.look_around()
    places = {
        "current folder": _place(Path.cwd()),
        "model cache": _place(_hub_cache()),
    }
    models = {"mini": "present" if (mini.FOLDER / "model_index.json").is_file() else "absent", FLUX_DEV: flux_dev_in_cache()}
    login = hub_login()
    problems = [*library_problems(facts), *gpu_problems(facts.driver, facts.torch), *place_problems(facts.torch, places, models, login)]
    return {
        "lorabooth": __version__,
        **asdict(facts),
        "optional": {requirement.name: optional for extra in OPTIONAL_USES for requirement, optional in _optional(extra)},
        "disk": places,
        "hub_login": login,
        "models": models,
        "can": abilities(facts, models),
        "problems": [asdict(problem) for problem in problems],
    }


def hub_login() -> str | None:
    """Where the hub's token comes from, or None. huggingface_hub's own get_token() is not used: it may go to the network to renew one."""
    from huggingface_hub import constants

    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable, "").strip():
            return variable
    file = Path(constants.HF_TOKEN_PATH)
    return str(file) if file.is_file() and file.stat().st_size else None


def flux_dev_in_cache() -> str:
    """Whether FLUX.1-dev was downloaded: "complete", "partial" or "absent"."""
    wanted = {name: _cached(name) for name in (*FLUX_DEV_FILES, *FLUX_DEV_INDEXES)}
    for name in FLUX_DEV_INDEXES:
        if index := wanted[name]:
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, LookupError, TypeError, AttributeError):
                return "partial"
            folder = name.split("/")[0]
            wanted |= {f"{folder}/{shard}": _cached(f"{folder}/{shard}") for shard in shards}
    if all(wanted.values()):
        return "complete"
    return "partial" if any(wanted.values()) else "absent"


def library_problems(facts: machine.Machine) -> list[Problem]:
    """Libraries that are missing, too old or broken: nothing works without them."""
    problems = []
    for requirement in machine.requirements():
        version = facts.libraries[requirement.name]
        if version is None:
            problems.append(Problem(f"{requirement.name} is not installed", _pip_install(str(requirement)), essential=True))
        elif not requirement.specifier.contains(version, prereleases=True):
            what = f"{requirement.name} {version} is installed, {requirement.specifier} is needed"
            problems.append(Problem(what, _pip_install(str(requirement)), essential=True))
    if facts.torch.version and facts.torch.error:
        fix = "unset TORCH_LOGS" if "log settings" in facts.torch.error else _pip_install("--force-reinstall", "torch")
        problems.append(Problem(f"torch cannot be imported: {facts.torch.error}", fix, essential=True))
    if sys.flags.optimize >= 2:
        problems.append(Problem(NO_DOCSTRINGS, WITH_DOCSTRINGS, essential=True))
    return problems


def gpu_problems(driver: machine.Driver, torch: machine.Torch) -> list[Problem]:
    """A GPU that is there but cannot be used, or not for FLUX.1-dev."""
    if driver.error:
        return [Problem(f"the NVIDIA driver does not work: {driver.error}", "install or restart the driver until `nvidia-smi` lists the GPU")]
    if driver.gpu_names and not torch.gpus and not torch.error:
        return [_unusable_gpu(driver, torch)]
    unusable = [gpu for gpu in torch.gpus if not gpu.usable]
    return [
        Problem(
            f"torch {torch.version} has no code for {gpu.name} (compute capability {gpu.compute_capability})",
            "install a build of torch that has: a newer one for a newer GPU",
        )
        for gpu in unusable
    ] + [
        Problem(f"{gpu.name} has compute capability {gpu.compute_capability}: no bf16", "FLUX.1-dev needs 8.0 or more: RTX 30, A100 or newer")
        for gpu in torch.gpus
        if gpu.usable and not gpu.bf16
    ]


def _unusable_gpu(driver: machine.Driver, torch: machine.Torch) -> Problem:
    what = f"there is a GPU ({driver.gpu_names[0]}, driver {driver.version}), but torch cannot use it"
    if torch.cuda is None:
        return Problem(f"{what}: torch {torch.version} is a CPU build", "install a CUDA build of torch; pytorch.org/get-started shows the command")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return Problem(f"{what}: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides it", "unset CUDA_VISIBLE_DEVICES")
    return Problem(f"{what}: {torch.warning or 'it gives no reason'}", f"update the NVIDIA driver to one for CUDA {torch.cuda} or newer")


def place_problems(torch: machine.Torch, places: dict[str, dict[str, Any]], models: dict[str, str], login: str | None) -> list[Problem]:
    """Models that are not there, and disks without room for them. FLUX.1-dev matters only where a GPU could run it."""
    problems = []
    if models["mini"] == "absent":
        problems.append(Problem("the mini model's folder is missing", f"git checkout -- {mini.FOLDER}, or make it: python -m scripts.mini"))
    if places["current folder"]["free_bytes"] < RUN_BYTES:
        problems.append(Problem("less than 2 GB is free in the current folder", "free some space or go to another disk: a run needs about 1 GB"))
    if torch.gpus and models[FLUX_DEV] != "complete":
        if login is None:
            fix = f"accept its licence at huggingface.co/{FLUX_DEV}, then type: hf auth login"
            problems.append(Problem("not logged in to the hub, and FLUX.1-dev is gated", fix))
        if places["model cache"]["free_bytes"] < FLUX_DEV_DOWNLOAD_BYTES:
            fix = f"free some space in {places['model cache']['path']}, or set HF_HOME to a folder on another disk"
            problems.append(Problem("FLUX.1-dev is a download of 34 GB, and the model cache has less room", fix))
    return problems


def abilities(facts: machine.Machine, models: dict[str, str]) -> list[str]:
    """What this machine can do, in sentences."""
    can = ["train and use the mini model (--model mini) on the CPU, in minutes"] if models["mini"] == "present" else []
    able = [gpu for gpu in facts.torch.gpus if gpu.bf16 and gpu.total_bytes >= FLUX_DEV_TRAIN_BYTES]
    return can + [f"train FLUX.1-dev on {gpu.name} (lorabooth plan says how it fits)" for gpu in able]


def report_lines(findings: dict[str, Any]) -> list[str]:
    """The findings for a person to read."""
    torch, driver = findings["torch"], findings["driver"]
    lines = [
        f"lorabooth {findings['lorabooth']}, Python {findings['python']}, {findings['platform']}",
        f"torch     {torch['version'] or 'missing'} ({'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPU build'})",
        *[_gpu_line(gpu, driver["version"]) for gpu in torch["gpus"]],
        f"CPU       {findings['cpu_cores']} cores; memory {_gib(findings['memory_available_bytes'])} available of {_gib(findings['memory_total_bytes'])}",
        *[f"disk      {_gib(place['free_bytes'])} free in the {name}, {place['path']}" for name, place in findings["disk"].items()],
        f"hub       {'token from ' + findings['hub_login'] if findings['hub_login'] else 'not logged in'}",
        *[f"model     {name}: {state}" for name, state in findings["models"].items()],
        "libraries " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in findings["libraries"].items()),
        *[_optional_line(name, optional) for name, optional in findings["optional"].items()],
    ]
    lines += ["", "This machine can", *[f"  {sentence}" for sentence in findings["can"]]]
    if not any("FLUX.1-dev" in sentence for sentence in findings["can"]):
        lines.append(f"  not train FLUX.1-dev: that needs a CUDA GPU with compute capability 8.0 and about {_gib(FLUX_DEV_TRAIN_BYTES)}")
    lines += ["", "Problems" if findings["problems"] else "No problems found."]
    return lines + [f"  {problem['what']}\n    -> {problem['fix']}" for problem in findings["problems"]]


def _gpu_line(gpu: dict[str, Any], driver: str | None) -> str:
    formats = ", ".join(name for name in ("bf16", "fp8") if gpu[name]) or "no bf16"
    memory = f"{_gib(gpu['free_bytes'])} free of {_gib(gpu['total_bytes'])}"
    return f"GPU       {gpu['name']}, {memory}, compute capability {gpu['compute_capability']} ({formats}), driver {driver or 'unknown'}"


def _optional_line(name: str, optional: dict[str, str | None]) -> str:
    return f"optional  {name} {optional['version'] or 'missing'}: {optional['for']}" + ("" if optional["version"] else f"\n    -> {optional['install']}")


def _optional(extra: str) -> list[tuple[Requirement, dict[str, str | None]]]:
    return [
        (
            asked,
            {
                "version": machine.installed_version(asked.name),
                "for": OPTIONAL_USES[extra],
                "install": _pip_install(f"{asked.name}{asked.specifier}"),
            },
        )
        for asked in machine.requirements(extra)
    ]


def _pip_install(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


def _place(folder: Path) -> dict[str, Any]:
    return {"path": str(folder), "free_bytes": machine.disk_free_bytes(folder)}


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(FLUX_DEV, name)
    return Path(found) if isinstance(found, str) else None


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
