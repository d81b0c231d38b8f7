"""The model card of a run: README.md of its hub repository."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lorabooth import __version__, consent, hub
from lorabooth.captions import PLACEHOLDER
from lorabooth.config import FLUX_DEV, TrainConfig
from lorabooth.hub import HUB_NAME
from lorabooth.licences import Licence, licence_of
from lorabooth.photos import Manifest
from lorabooth.runs import RunDir

TAGS = ("text-to-image", "diffusers", "lora", "flux", "lorabooth", "template:diffusion-lora")
"""The last one is what makes the hub show the samples as a gallery."""
NOTICE = (
    "The FLUX.1 [dev] Model is licensed by Black Forest Labs Inc. under the FLUX.1 [dev] Non-Commercial License. Copyright Black Forest Labs Inc. "
    "IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, "
    "ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS MODEL."
)
"""The attribution notice that the licence of FLUX.1 [dev] prescribes for derivatives (section 3)."""


def model_card(run_dir: RunDir, repository: str, samples: Sequence[str] = ()) -> str:
    """The card as Markdown with the hub's front matter. samples: the pictures' paths in the repository, `.../<i>.png` of the i-th preview prompt."""
    from huggingface_hub import ModelCard

    config = run_dir.config
    licence, base = licence_of(config.model), hub.display_name(config.model)
    agreed = consent.recorded(run_dir)
    measured = run_dir.read_json("likeness.json") or {}
    values: dict[str, Any] = {
        "trigger": config.trigger_word,
        "base": base,
        "base_name": base.rsplit("/", 1)[-1],
        "repository": repository,
        "prompt": prompt_of(config, 0).replace('"', "'"),
        "file": re.sub(r"\W+", "-", config.trigger_word).strip("-").lower() or "picture",
        "samples": samples,
        "consent": agreed.sentence() if agreed else "",
        "known": bool(HUB_NAME.fullmatch(base)),
        "hosted": base == FLUX_DEV,
        "version": __version__,
        "facts": facts(run_dir, config),
        "measure": measured.get("by"),
        "scores": [(name, f"{score:.2f}") for name, score in measured.get("scores", {}).items() if isinstance(score, int | float)],
        "notice": NOTICE if licence.duties else "",
        "licence": licence,
        "duties": "; to ".join(licence.duties),
    }
    # Not HTML, so nothing is escaped: what is the user's own goes into the user's own page.
    environment = Environment(loader=PackageLoader("lorabooth", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("card.md").render(values)
    return str(ModelCard(f"---\n{front_matter(config, licence, base, samples)}\n---\n\n{text}\n"))


def front_matter(config: TrainConfig, licence: Licence, base: str, samples: Sequence[str]) -> str:
    """What the hub reads of a card, as YAML."""
    from huggingface_hub import ModelCardData

    more: dict[str, Any] = {"instance_prompt": config.trigger_word}
    if HUB_NAME.fullmatch(base):
        more |= {"base_model": base, "base_model_relation": "adapter"}
    if licence.duties:
        more |= {"license_name": licence.hub_name, "license_link": licence.url}
    if samples:
        more["widget"] = [{"text": prompt_of(config, int(Path(sample).stem)), "output": {"url": sample}} for sample in samples]
    licence_id = "other" if licence.duties else licence.hub_name
    return ModelCardData(license=licence_id, library_name="diffusers", pipeline_tag="text-to-image", tags=list(TAGS), **more).to_yaml()


def prompt_of(config: TrainConfig, index: int) -> str:
    """A preview's prompt as it was drawn, on one line."""
    prompts = config.preview_prompts or (f"a portrait of {PLACEHOLDER}",)
    return " ".join(prompts[index].replace(PLACEHOLDER, config.trigger_word).split())


def facts(run_dir: RunDir, config: TrainConfig) -> list[tuple[str, str]]:
    """The training in figures."""
    photos = Manifest.load(run_dir.path).photos
    written = sum(photo.caption is not None for photo in photos)
    plans = [row for row in run_dir.history() if row.get("event") == "plan"]
    device = str(plans[-1].get("device", "")) if plans else ""
    chosen = config.optimizer if config.optimizer != "auto" else "adamw" if device in ("", "CPU") else "adamw8bit"
    each = config.batch_size * config.gradient_accumulation
    found = {
        "photos": f"{len(photos)}" + (f", {written} with captions of their own" if written else ""),
        "steps": f"{config.steps} of {each} photo{'s' * (each > 1)}" + (" on each GPU" if each > 1 else ""),
        "resolution": f"{config.resolution.replace(',', ', ')} px",
        "rank": f"{config.lora_rank}, alpha {config.alpha}, on {config.layers_to_optimize_regex or config.targets}" + " and CLIP" * config.train_text_encoder,
        "learning rate": f"{config.learning_rate:g}, {chosen}"
        + (f", {config.lr_scheduler} to zero" if config.lr_scheduler != "constant" else "")
        + (f", of lora_B {config.loraplus_lr_ratio:g} times that" if config.loraplus_lr_ratio > 1 else "")
        + (f", of CLIP {config.text_encoder_lr_ratio:g} times that" if config.train_text_encoder and chosen != "prodigy" else ""),
        "averaged weights": f"EMA {config.ema_decay:g}" if config.ema_decay else "no",
        "seed": f"{config.seed}",
        "memory plan": plans[-1].get("plan") if plans else "",
        "machine": device,
    }
    return [(name, str(value).replace("|", "\\|")) for name, value in found.items() if value]
