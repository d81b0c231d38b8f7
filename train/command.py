"""`lorabooth train`: photos and a trigger word in, a LoRA out. Each stage does only what is missing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from tqdm import tqdm

from lorabooth import stages
from lorabooth.config import TrainConfig, load_config
from lorabooth.errors import UserError
from lorabooth.photos import ingest
from lorabooth.runs import RunDir

Command = TypeVar("Command", bound=Callable[..., Any])
RECIPES = Path(__file__).parent.parent / "configs"


def config_options(command: Command) -> Command:
    """One option for every field of TrainConfig, with its sentence, unit and default."""
    for name, field in reversed(TrainConfig.model_fields.items()):
        flags = [f"--{name.replace('_', '-')}"] + (["--trigger"] if name == "trigger_word" else [])
        default = "" if field.is_required() or field.default is None else f" [default: {_show(field.default)}]"
        kind: Any = {bool: bool, int: int, float: float}.get(field.annotation, str) if name != "lora_alpha" else int  # type: ignore[arg-type]
        command = click.option(*flags, name, type=kind, multiple=name == "preview_prompts", default=None, help=(field.description or "") + default)(command)
    return command


def _show(value: Any) -> str:
    return " | ".join(value) if isinstance(value, tuple) else str(value) if value != "" else "none"


@click.command()
@click.argument("photos", type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="YAML file of settings; options given here win over it. [default: configs/mini.yaml for --model mini, else none]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [default: runs/TRIGGER-PHOTOS]")
@click.option("--json", "as_json", is_flag=True, help="Print the paths of the result as JSON.")
@config_options
def train(photos: Path, recipe: Path | None, out: Path | None, as_json: bool, **values: Any) -> None:
    """Train a LoRA from PHOTOS: a zip or a folder of 10-50 pictures of a person, with <name>.txt captions if you like.

    The same command again goes on where it stopped. Ctrl-C finishes the step at hand and saves it.

    \b
    Example, with a CUDA GPU:
      lorabooth train photos.zip --trigger TOK
    Example, without a GPU, on the mini model:
      lorabooth train photos.zip --trigger TOK --model mini
    """
    values["preview_prompts"] = values["preview_prompts"] or None
    config = recipe_config(recipe, values)
    run_dir = train_run(photos, config, out or default_folder(photos, config.trigger_word))
    report = run_dir.path / "report.html"
    if as_json:
        click.echo(json.dumps({"run": str(run_dir.path), "lora": str(run_dir.lora), "report": str(report)}))
        return
    click.echo(f"LoRA:   {run_dir.lora}\nreport: {report}")
    _say_licence(config.model)
    click.echo(f"next:   {stages.load('train.report', 'generate_command')(run_dir)}")


def recipe_config(recipe: Path | None, values: dict[str, Any]) -> TrainConfig:
    """The settings of a run; the mini model has a recipe of its own, since its pictures and layers are small."""
    if recipe is None and values.get("model") == "mini":
        recipe = RECIPES / "mini.yaml"
    return load_config(recipe, values)


def train_run(photos: Path, config: TrainConfig, folder: Path) -> RunDir:
    """All stages in order; what is there already is not done again. Returns the finished run."""
    _check_source(photos, folder)
    if not (folder / "manifest.jsonl").exists():
        stages.load("train.export", "check_model")(config)
    run_dir = RunDir.create(folder, config)
    with run_dir.locked():
        source = str(photos.resolve())
        if not (folder / "manifest.jsonl").exists():
            run_dir.write_json(
                "source.json", {"photos": source, "state": _state(photos)}
            )  # first: a kill between the two must not lose where the photos came from
            _say(ingest(photos, folder, lambda entries: tqdm(entries, desc="read photos", unit="file")).notes)
        elif (run_dir.read_json("source.json") or {}).get("state") != _state(photos):
            _say((f"{photos} has changed since this run took it in and is not read again; for the new photos start a run with --out FOLDER",))
    for stage in stages.STAGES:
        stages.run_stage(stage, run_dir)
    return run_dir


def _check_source(photos: Path, folder: Path) -> None:
    """Refuse a run folder that was started from other photos."""
    if not photos.exists():
        raise UserError(f"no such file or folder: {photos}", hint="give a zip or a folder of photos")
    record = RunDir(folder).read_json("source.json")
    if record and (folder / "manifest.jsonl").exists() and record["photos"] != str(photos.resolve()):
        raise UserError(f"the run {folder} was started from {record['photos']}, not from {photos}", hint="choose another folder with --out FOLDER")


def _state(photos: Path) -> list[list[Any]]:
    """Name, bytes and time of each file: differs where the photos may have changed."""
    files = sorted(file for file in photos.rglob("*") if file.is_file()) if photos.is_dir() else [photos]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def default_folder(photos: Path, trigger_word: str) -> Path:
    """runs/TRIGGER-PHOTOS, so that the same command finds its run again."""
    return Path("runs") / re.sub(r"[^\w.-]+", "-", f"{trigger_word}-{photos.resolve().stem}")[:60].strip("-.")


def _say_licence(model: str) -> None:
    """What the base model asks of those who use the LoRA."""
    from lorabooth.families import load_family

    licence = load_family(model).licence
    if licence.duties:
        click.echo(f"licence: {licence.name} ({licence.url}); it asks you to {', '.join(licence.duties)}")


def _say(notes: tuple[str, ...]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)
