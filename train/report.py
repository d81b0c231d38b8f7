"""RUN/report.html: what happened in a run, in one file that needs no network."""

import base64
import html
import re
import shlex
from pathlib import Path

from lorabooth import consent
from lorabooth.runs import RunDir, write_durable

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}img{border-radius:6px}"
    "figure{display:inline-block;margin:.3rem;text-align:center}td{padding:.1rem 1rem .1rem 0;vertical-align:top}figcaption{font-size:.8rem;color:#555}"
)


def write(run: RunDir) -> Path:
    """Write the report from metrics.jsonl, samples/ and config.json; its path."""
    config = run.config
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in config.recipe().items())
    validation = f"<h2>Loss of the photos held out</h2>{loss_curve(run, 'validation')}" if config.validation_photos else ""
    agreed = consent.recorded(run)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(config.trigger_word)} - lorabooth run</title><style>{STYLE}</style>'
        f"<h1>{html.escape(config.trigger_word)}</h1><p>A LoRA of {html.escape(config.model)}, {config.steps} steps. Use it: "
        f"<code>{html.escape(generate_command(run))}</code></p>"
        f"{f'<p>{html.escape(agreed.sentence())}</p>' if agreed else ''}"
        f"<h2>Previews</h2>{_previews(run)}<h2>Loss</h2>{loss_curve(run)}{validation}<h2>Recipe</h2><table>{rows}</table></html>"
    )
    file = run.path / "report.html"
    write_durable(file, page.encode())
    return file


def generate_command(run: RunDir) -> str:
    """What to type next. A base in a local folder must be named: the LoRA does not carry its path."""
    model = f" --model {shlex.quote(run.config.model)}" if Path(run.config.model).expanduser().is_dir() else ""
    return f'lorabooth generate "a portrait of {run.config.trigger_word}" --lora {shlex.quote(str(run.path))}{model}'


def data_uri(picture: Path) -> str:
    """A PNG as a data URI, so that a page is one file."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _previews(run: RunDir) -> str:
    config = run.config
    out = []
    for i, prompt in enumerate(config.preview_prompts):
        out.append(f"<h3>{html.escape(prompt.replace('[trigger]', config.trigger_word))}</h3>")
        for file in sorted(run.samples.glob(f"step-*-{i}.png")):
            step = int(re.findall(r"step-(\d+)", file.name)[0])
            out.append(f'<figure><img src="{data_uri(file)}" alt="preview at step {step}" width="160"><figcaption>step {step}</figcaption></figure>')
    return "".join(out)


def loss_curve(run: RunDir, event: str = "step", width: int = 800, height: int = 240) -> str:
    """The loss over the steps as an SVG: each value faint, a running mean strong. event: "step" or "validation"."""
    points = [(row["step"], row["loss"]) for row in run.history() if "loss" in row and row.get("event", "step") == event]
    if not points:
        return "<p>no steps yet</p>"
    smooth, mean = [], points[0][1]
    for step, loss in points:
        mean = 0.95 * mean + 0.05 * loss
        smooth.append((step, mean))
    top, last = max(loss for _, loss in points) or 1, max(points[-1][0], 1)

    def path(line: list[tuple[int, float]]) -> str:
        return " ".join(f"{step / last * width:.1f},{height - value / top * height:.1f}" for step, value in line)

    return (
        f'<svg viewBox="0 0 {width} {height + 20}" role="img" aria-label="loss by step" style="width:100%">'
        f'<polyline points="{path(points)}" fill="none" stroke="#bcd"/><polyline points="{path(smooth)}" fill="none" stroke="#06c" stroke-width="2"/>'
        f'<text x="0" y="14" font-size="12">{top:.3f}</text><text x="0" y="{height + 16}" font-size="12">step 1</text>'
        f'<text x="{width}" y="{height + 16}" font-size="12" text-anchor="end">step {last}, mean {mean:.4f}</text></svg>'
    )
