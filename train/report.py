"""RUN/report.html: what happened in a run, in one file that needs no network. It shows the photos, so it stays with the run."""

import re
import shlex
from pathlib import Path
from typing import Any

from lorabooth import consent, hub
from lorabooth.config import TrainConfig
from lorabooth.home import expanded
from lorabooth.pages import page, thumbnail, write_page
from lorabooth.photos import Manifest
from lorabooth.runs import RunDir
from lorabooth.stages import seconds_of

COLUMNS, PHOTOS = 10, 60
"""Steps whose previews are shown, and photos: a page of a thousand opens in no browser."""
PREVIEW_PX, PHOTO_PX = 256, 256


def write(run: RunDir) -> Path:
    """Write the report from what the run has recorded; its path."""
    config = run.config
    steps, previews = _previews(run, config)
    shown = [step for i, step in enumerate(steps) if i % -(-len(steps) // COLUMNS) == 0 or step == steps[-1]]
    agreed, photos = consent.recorded(run), Manifest.load(run.path).photos
    defaults = TrainConfig(trigger_word=config.trigger_word).recipe()
    values: dict[str, Any] = {
        "config": config,
        "base": hub.display_name(config.model),
        "command": generate_command(run),
        "consent": agreed.sentence() if agreed else "",
        "steps": shown,
        "thinned": len(shown) < len(steps),
        "previews": [(prompt, [thumbnail(files[step], PREVIEW_PX) if step in files else "" for step in shown]) for prompt, files in previews],
        "curve": loss_curve(run),
        "validation": loss_curve(run, "validation") if config.validation_photos else "",
        "count": len(photos),
        "photos": [{"picture": thumbnail(run.photos / photo.file, PHOTO_PX), "caption": _caption(run, photo.file)} for photo in photos[:PHOTOS]],
        "facts": facts(run),
        "recipe": [(name, _shown(value), value != defaults[name]) for name, value in config.recipe().items()],
    }
    file = run.path / "report.html"
    write_page(file, page("train", "report.html", **values))
    return file


def generate_command(run: RunDir) -> str:
    """What to type next. A base in a local folder must be named: the LoRA does not carry its path."""
    model = f" --model {shlex.quote(run.config.model)}" if expanded(run.config.model).is_dir() else ""
    prompt = f"a portrait of {run.config.trigger_word}"
    quoted = f'"{prompt}"' if re.fullmatch(r"[\w ,.-]+", prompt) else shlex.quote(prompt)  # as most people write it, where that says the same
    return f"lorabooth generate {quoted} --lora {shlex.quote(str(run.path))}{model}"


def facts(run: RunDir) -> list[tuple[str, str]]:
    """Machine, plan and times, as far as they were recorded; a plan for each session that had another."""
    sessions = [row for row in run.history() if row.get("event") == "plan"]
    found = [("plan" if not row.get("step") else f"plan from step {row['step']}", str(row["plan"])) for row in sessions]
    found += [(name, str(sessions[-1][name])) for name in ("device", "torch", "lorabooth") if sessions and name in sessions[-1]]
    seconds = seconds_of(run)
    found += [(f"time of {stage}", duration(value)) for stage, value in seconds.items()]
    return found + ([("a step, all in all", f"{seconds['fit'] / run.config.steps:.2f} s")] if "fit" in seconds else [])


def duration(seconds: float) -> str:
    """A time as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _shown(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _caption(run: RunDir, photo: str) -> str:
    file = run.captions / f"{Path(photo).stem}.txt"
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""


def _previews(run: RunDir, config: TrainConfig) -> tuple[list[int], list[tuple[str, dict[int, Path]]]]:
    """The steps that have previews, and for each prompt its pictures by step."""
    found: list[tuple[str, dict[int, Path]]] = [(prompt.replace("[trigger]", config.trigger_word), {}) for prompt in config.preview_prompts]
    for file in run.samples.glob("step-*.png"):
        if (match := re.fullmatch(r"step-(\d+)-(\d+)", file.stem)) and int(match[2]) < len(found):
            found[int(match[2])][1][int(match[1])] = file
    return sorted({step for _, files in found for step in files}), found


def loss_curve(run: RunDir, event: str = "step", width: int = 800, height: int = 240) -> str:
    """The loss over the steps as an SVG: each value faint, a running mean strong. event: "step" or "validation"."""
    points = [(row["step"], row["loss"]) for row in run.history() if "loss" in row and row.get("event", "step") == event]
    if not points:
        return "<p>no steps yet</p>"
    smooth, mean = [], 0.0
    for i, (step, loss) in enumerate(points):
        mean += max(0.05, 1 / (i + 1)) * (loss - mean)
        smooth.append((step, mean))
    top, last = max(loss for _, loss in points) or 1, max(points[-1][0], 1)

    def path(line: list[tuple[int, float]]) -> str:
        return " ".join(f"{step / last * width:.1f},{height - value / top * height:.1f}" for step, value in line)

    return (
        f'<svg viewBox="0 0 {width} {height + 20}" role="img" aria-label="loss by step">'
        f'<polyline class="each" points="{path(points)}"/><polyline class="mean" points="{path(smooth)}"/>'
        f'<text x="0" y="14">{top:.3f}</text><text x="0" y="{height + 16}">step {points[0][0]}</text>'
        f'<text x="{width}" y="{height + 16}" text-anchor="end">step {last}, mean {mean:.4f}</text></svg>'
    )
