"""`lorabooth demo`: the whole way on the mini model, on one page that shows what happened beside the truth."""

import html
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import click
from PIL import Image

from lorabooth.arguments import Location
from lorabooth.mini import people, world

SCENES = 8
TRIGGER = "TOK"
NAME = "ada"
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222}img{border-radius:6px;display:block}"
    "td,th{padding:.15rem .4rem;text-align:left;vertical-align:middle}small{color:#555}code{background:#eee;padding:.1rem .3rem;border-radius:4px}"
    "tr.scene td{font-size:.75rem;max-width:128px;vertical-align:top}"
)


@dataclass(frozen=True)
class Row:
    """One row of the page: a title and a picture for each scene."""

    title: str
    pictures: list[Image.Image]


@click.command()
@click.option("--out", type=Location(), default=Path("demo"), show_default=True, help="Folder for the page and the run.")
def demo(out: Path) -> None:
    """Train a LoRA of a drawn person on the mini model and show the pictures: no GPU, no account, a few minutes.

    Writes index.html, demo.png and the run itself. A demo that was interrupted goes on.

    \b
    Example:
      lorabooth demo --out demo
    """
    started = time.monotonic()
    from lorabooth.mini import likeness
    from lorabooth.runs import RunDir

    click.echo(f"A person the mini model has never seen, {people.PHOTOS} photos, trigger word {TRIGGER}.")
    run = _train(out)
    scenes = people.new_scenes(NAME, TRIGGER, SCENES)
    after = _generate(run, scenes)
    before = _samples(run, "step-000000")
    rows = [
        Row("the truth", [scene.image() for scene in scenes]),
        Row("before training", before),
        Row("during: step " + str(_middle(run)), _samples(run, f"step-{_middle(run):06d}")),
        Row("after: lora.safetensors", after),
    ]
    truths = [scene.truth for scene in scenes]
    click.echo("measuring the pictures against the truth")
    scores = {"before": likeness.score(before, truths), "after": likeness.score(after, truths)}
    means = {group: likeness.mean(scores["after"], names) for group, names in (("identity right", world.IDENTITY), ("scene right", world.SCENE))}
    RunDir(run).write_json("likeness.json", {"by": f"the drawing nearest to each of {SCENES} pictures of new scenes", "scores": means})
    seconds, peak_gb = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    note = f"{seconds:.0f} s on this machine, peak memory {peak_gb:.1f} GB."
    _write(out, rows, [scene.caption for scene in scenes], scores, note)
    for group, names in (("identity", world.IDENTITY), ("scene", world.SCENE)):
        click.echo(f"{group:9} right: {likeness.mean(scores['before'], names):4.0%} before, {likeness.mean(scores['after'], names):4.0%} after")
    click.echo(f"{note}\npage: {out / 'index.html'}\nnext, with your own photos and a CUDA GPU:\n  lorabooth train photos.zip --trigger TOK")


def _train(out: Path) -> Path:
    """The run of the demo: the same stages as `lorabooth train`, with the new scenes as previews."""
    from lorabooth import stages

    config = stages.load("train.command", "recipe_config")(None, {"model": "mini", "trigger_word": TRIGGER})
    scenes = people.new_scenes(NAME, TRIGGER, SCENES)
    config = config.model_copy(update={"preview_prompts": tuple(scene.caption for scene in scenes), "preview_every": config.steps // 4})
    folder: Path = stages.load("train.command", "train_run")(people.DEMO_ZIP, config, out / "run").path
    return folder


def _generate(run: Path, scenes: list[people.Scene]) -> list[Image.Image]:
    """The scenes by the generator, with the LoRA file that training wrote."""
    from lorabooth import stages

    engine = stages.load("infer.engine", "Engine")("mini")
    request = stages.load("infer.request", "Request")
    choice = stages.load("infer.loras", "resolve")(str(run))
    prompts = [request(scene.caption, 128, 128, seed=42, num_inference_steps=20) for scene in scenes]
    return [next(engine.generate(r, (choice,))).image for r in prompts]


def _middle(run: Path) -> int:
    steps = sorted({int(f.name[5:11]) for f in (run / "samples").glob("step-*.png")})
    return steps[1]


def _samples(run: Path, prefix: str) -> list[Image.Image]:
    return [Image.open(run / "samples" / f"{prefix}-{i}.png").convert("RGB") for i in range(SCENES)]


def _write(out: Path, rows: list[Row], captions: list[str], scores: dict[str, dict[str, float]], note: str) -> None:
    from lorabooth.pages import write_page

    photos = [scene.image() for scene in people.photos(NAME, TRIGGER)]
    sheet = _sheet([Row("photos", photos[:SCENES]), *rows])
    sheet.save(out / "demo.png")
    write_page(out / "index.html", _page(photos, rows, captions, scores, note))


def _sheet(rows: list[Row]) -> Image.Image:
    """All rows as one picture with their titles."""
    from PIL import ImageDraw, ImageFont

    px, title_px = 128, 20
    sheet = Image.new("RGB", (SCENES * px, len(rows) * (px + title_px)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for y, row in enumerate(rows):
        draw.text((4, y * (px + title_px) + 2), row.title, fill="black", font=font)
        for x, picture in enumerate(row.pictures):
            sheet.paste(picture, (x * px, y * (px + title_px) + title_px))
    return sheet


def _page(photos: list[Image.Image], rows: list[Row], captions: list[str], scores: dict[str, dict[str, float]], note: str) -> str:
    from lorabooth.mini import likeness

    cells = "".join(
        f"<tr><th>{html.escape(row.title)}</th>" + "".join(f"<td>{_img(picture, row.title)}</td>" for picture in row.pictures) + "</tr>" for row in rows
    )
    words = "<tr class=scene><th></th>" + "".join(f"<td>{html.escape(c)}</td>" for c in captions) + "</tr>"
    names = [(a, scores["before"].get(a), scores["after"].get(a)) for a in world.ATTRIBUTES]
    table = "".join(f"<tr><td>{a.replace('_', ' ')}</td><td>{b:.0%}</td><td>{c:.0%}</td></tr>" for a, b, c in names if b is not None and c is not None)
    for title, group in (("identity, mean", world.IDENTITY), ("scene, mean", world.SCENE)):
        table += f"<tr><th>{title}</th><th>{likeness.mean(scores['before'], group):.0%}</th><th>{likeness.mean(scores['after'], group):.0%}</th></tr>"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>lorabooth demo</title><style>{STYLE}</style>"
        f"<h1>lorabooth demo</h1><p>A LoRA of a person the mini model had never seen, trained on this machine. {html.escape(note)}</p>"
        f"<h2>The photos it learned from</h2><table><tr>{_cells(photos[:6])}</tr>"
        f"<tr>{_cells(photos[6:])}</tr></table>"
        "<h2>The same words before, during and after training</h2><p>Clothes, colours, expressions and backgrounds that are in none of the photos.</p>"
        f"<table>{words}{cells}</table><h2>How much is right</h2><p>For each attribute, the drawing nearest to the picture, compared with the truth.</p>"
        f"<table><tr><th></th><th>before</th><th>after</th></tr>{table}</table>"
        "<h2>Next</h2><p>With 10-50 photos of your own in a zip, and a CUDA GPU:</p>"
        "<p><code>lorabooth train photos.zip --trigger TOK</code><br>"
        "<code>lorabooth generate &quot;a portrait of TOK at a conference&quot; --lora runs/TOK-photos</code></p></html>"
    )


def _cells(photos: list[Image.Image]) -> str:
    return "".join(f"<td>{_img(photo, 'training photo')}</td>" for photo in photos)


def _img(picture: Image.Image, alt: str) -> str:
    import base64
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="{html.escape(alt)}" width="112">'
