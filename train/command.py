"""`lorabooth train`: photos and a trigger word in, a LoRA out. Each stage does only what is missing."""

import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from tqdm import tqdm

from lorabooth import consent, stages
from lorabooth.archive import check_kind
from lorabooth.arguments import Known, Location
from lorabooth.check.command import check_new_run
from lorabooth.config import HOSTED_NAMES, TrainConfig, known_values, load_config, read_recipe
from lorabooth.errors import UserError, is_utf8
from lorabooth.notes import note
from lorabooth.photos import Manifest, ingest
from lorabooth.push_command import token_option
from lorabooth.runs import RunDir, sha256_file
from train.ranks import alone

Command = TypeVar("Command", bound=Callable[..., Any])
PRIOR_RATE = 0.2
RECIPES = next(folder for folder in (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs") if folder.is_dir())
"""In an installed wheel beside this file, in a clone at its top."""


def config_options(command: Command) -> Command:
    """One option for every field of TrainConfig, with its sentence, unit and default."""
    for name, field in reversed(TrainConfig.model_fields.items()):
        names = [name, *(hosted for hosted, ours in HOSTED_NAMES.items() if ours == name), *(["trigger"] if name == "trigger_word" else [])]
        flags = [f"--{n.replace('_', '-')}" for n in names]
        default = "" if field.is_required() or field.default is None else f" [default: {_show(field.default)}]"
        types = get_args(field.annotation) or (field.annotation,)
        kind: Any = next((t for t in (bool, int, float) if t in types), Known(*known_values(name), otherwise="dir" if name == "model" else ""))
        command = click.option(*flags, name, type=kind, multiple=name == "preview_prompts", default=None, help=(field.description or "") + default)(command)
    return command


def _show(value: Any) -> str:
    return " | ".join(value) if isinstance(value, tuple) else str(value) if value != "" else "none"


@click.command()
@click.argument("photos", type=Location())
@click.option(
    "--recipe",
    type=Location(),
    help="YAML file of settings; options given here win over it. For the mini model, what it leaves open is as in configs/mini.yaml. [default: none]",
)
@click.option("--class-photos", type=Location(), help="Zip or folder of photos of others, which the LoRA shall leave as they are. [default: none]")
@click.option("--out", type=Location(), help="Folder of the run. [default: runs/TRIGGER-PHOTOS]")
@click.option("--consent", "consented", is_flag=True, help="Everyone in the photos has agreed. [default: asked once at a terminal, then remembered]")
@click.option("--json", "as_json", is_flag=True, help="Print the paths of the result as JSON.")
@click.option(
    "--launch", default="", help="What starts the training stage, for several GPUs: 'accelerate launch --num_processes 2'. [default: one process on one GPU]"
)
@click.option("--wandb-api-key", help="Log to wandb with this key, which is written nowhere. [default: WANDB_API_KEY, or the login of `wandb login`]")
@token_option
@config_options
def train(
    photos: Path,
    recipe: Path | None,
    class_photos: Path | None,
    out: Path | None,
    consented: bool,
    as_json: bool,
    launch: str,
    wandb_api_key: str | None,
    **values: Any,
) -> None:
    """Train a LoRA from PHOTOS: a zip, a tar or a folder of 10-50 pictures of a person, with <name>.txt captions if you like.

    The same command again goes on where it stopped. Ctrl-C finishes the step at hand and saves it.

    \b
    Example, with a CUDA GPU:
      lorabooth train photos.zip --trigger TOK
    Example, without a GPU, on the mini model:
      lorabooth train photos.zip --trigger TOK --model mini
    """
    stages.check_launch(launch)
    values["preview_prompts"] = values["preview_prompts"] or None
    if wandb_api_key:  # as in the hosted trainer, the key is what switches wandb on
        os.environ["WANDB_API_KEY"] = wandb_api_key
        sys.argv = [argument.replace(wandb_api_key, "...") for argument in sys.argv]  # wandb records the command line
        values["trackers"] = values["trackers"] or "tensorboard,wandb"
    config = recipe_config(recipe, values)
    if class_photos and not config.prior_rate:
        config = config.model_copy(update={"prior_rate": PRIOR_RATE})
    run_dir = train_run(photos, config, out or default_folder(photos, config.trigger_word), launch, class_photos, consented)
    report = run_dir.path / "report.html"
    page = _push(run_dir, config) if config.hf_repo_id else ""
    if as_json:
        click.echo(json.dumps({"run": str(run_dir.path), "lora": str(run_dir.lora), "report": str(report)} | ({"pushed": page} if config.hf_repo_id else {})))
        return
    click.echo(f"LoRA:   {run_dir.lora}\nreport: {report}")
    if page:
        click.echo(f"pushed: {page}")
    _say_licence(config.model)
    click.echo(f"next:   {stages.load('train.report', 'generate_command')(run_dir)}")


def _push(run_dir: RunDir, config: TrainConfig) -> str:
    """Push the finished run; the page, or "" and a note where that fails, which spoils no training."""
    from lorabooth.push import push

    try:
        return push(run_dir, config.hf_repo_id, config.hf_private).url
    except (UserError, OSError) as error:  # a full disk too
        why = error.message if isinstance(error, UserError) else str(error)
        note(f"not pushed to {config.hf_repo_id}: {why}; the LoRA is here, and this goes on with it: lorabooth push {shlex.quote(str(run_dir.path))}")
        return ""


def _check_push(repository: str) -> None:
    """Refuse a repository or a token that a push after the training would be refused for; where the hub cannot be asked, only a note."""
    from lorabooth import push
    from lorabooth.hub_write import Broken

    try:
        push.check(repository)
    except Broken as error:
        note(f"whether the LoRA can be pushed to {repository} is not known yet: {error.message}")


def recipe_config(recipe: Path | None, values: dict[str, Any]) -> TrainConfig:
    """The settings of a run. What a recipe leaves open is the mini model's own recipe, since its pictures and layers are small, or else the default."""
    given = (read_recipe(recipe) if recipe else {}) | {name: value for name, value in values.items() if value is not None}
    named = {HOSTED_NAMES.get(name, name) for name in given}
    named |= {"loraplus_lr_ratio"} if given.get("optimizer") == "prodigy" else set()  # which it cannot have
    named |= {"train_text_encoder"} if given.get("precompute_modulation") else set()
    beneath = read_recipe(RECIPES / "mini.yaml") if given.get("model") == "mini" else {}
    return load_config(None, {name: value for name, value in beneath.items() if name not in named} | given)


def train_run(photos: Path, config: TrainConfig, folder: Path, launch: str = "", class_photos: Path | None = None, consented: bool = False) -> RunDir:
    """All stages in order; what is there already is not done again. Returns the finished run.

    launch: as of `stages.run_stage`. consented: the people in the photos have agreed, and the user need not be asked.
    """
    if not is_utf8(os.path.abspath(folder)):  # neither TensorBoard nor safetensors writes there
        raise UserError(f"the folder {folder} has a name that is not text in UTF-8", hint="choose another folder with --out FOLDER")
    if config.prior_rate and not class_photos and not (RunDir(folder).others / "manifest.jsonl").exists():
        raise UserError(f"prior_rate is {config.prior_rate}, and there are no photos of others to train on", hint="give some with --class-photos")
    if config.hf_repo_id and not RunDir(folder).lora.exists():
        _check_push(config.hf_repo_id)
    sources = {folder: photos} | ({RunDir(folder).others: class_photos} if class_photos else {})
    for taken_into, source in sources.items():
        _check_source(source, taken_into, folder)
    if not launch:
        alone()
    if not RunDir(folder).begun:
        _check_trigger(config.trigger_word)
        stages.load("train.export", "check_model")(config)
    agreed = consent.obtain(config, RunDir(folder), consented)
    run_dir = RunDir.create(folder, config)
    with run_dir.locked():
        consent.record(run_dir, agreed)
        for taken_into, source in reversed(sources.items()):  # the run's own manifest last: it says that all is there
            _take_in(source, RunDir(taken_into), run_dir)
        Manifest.load(run_dir.path).check_held_out(config.validation_photos)
        check_new_run(run_dir)
    for stage in stages.STAGES:
        stages.run_stage(stage, run_dir, launch)
    return run_dir


def _check_trigger(word: str) -> None:
    """Refuse a word that prompts would read as a choice (infer/wildcards.py)."""
    if re.search(r"[{|}\\]|__", word):
        raise UserError(f"the trigger word {word} has one of {{ | }} \\ __ in it, which are wildcards in prompts", hint="choose another, such as TOK")


def _take_in(photos: Path, taken_into: RunDir, run: RunDir) -> None:
    """Ingest photos once, and remember where they came from."""
    folder, record = taken_into.path, taken_into.read_json("source.json")
    if (folder / "manifest.jsonl").exists():
        _check_unchanged(photos, taken_into, run)
        return
    if run.begun and (record is None or _digest(photos, run.path, record) != record.get("sha256")):  # somebody has deleted the manifest
        raise _changed(photos, run)
    folder.mkdir(exist_ok=True)
    taken_into.write_json("source.json", _source(photos, run.path))  # first: a kill between the two must not lose where the photos came from
    _say(ingest(photos, folder, lambda entries: tqdm(entries, desc="read photos", unit="file")).notes)


def _check_source(photos: Path, folder: Path, run_folder: Path) -> None:
    """Refuse a run folder that was started from other photos; an archive of another name is no other, nor is a folder."""
    check_kind(photos)
    record = RunDir(folder).read_json("source.json")
    if not record or not (folder / "manifest.jsonl").exists() or record["photos"] == str(photos.resolve()):
        return
    if record.get("sha256") != _digest(photos, run_folder, record):
        raise UserError(f"the run {folder} was started from {record['photos']}, not from {photos}", hint="choose another folder with --out FOLDER")


def _check_unchanged(photos: Path, taken_into: RunDir, run: RunDir) -> None:
    """Refuse to go on where the photos are not those that the run took in."""
    record = taken_into.read_json("source.json")
    if record is None:  # somebody has deleted it
        with tempfile.TemporaryDirectory() as folder:
            same = ingest(photos, Path(folder)).photos == Manifest.load(taken_into.path).photos
    else:  # by their times first, for they may be gigabytes
        same = record.get("state") == _state(photos, run.path) or record.get("sha256") in (None, _digest(photos, run.path, record))
    if not same:
        raise _changed(photos, run)
    if record is None or [record["photos"], record.get("state")] != [str(photos.resolve()), _state(photos, run.path)]:
        taken_into.write_json("source.json", _source(photos, run.path))


def _changed(photos: Path, run: RunDir) -> UserError:
    return UserError(f"{photos} has changed since the run {run.path} took it in", hint="put the old photos back, or start a new run with --out FOLDER")


def _source(photos: Path, folder: Path) -> dict[str, Any]:
    """What a run remembers of where its photos came from."""
    return {"photos": str(photos.resolve()), "state": _state(photos, folder), "sha256": _digest(photos, folder)}


def _state(photos: Path, folder: Path) -> list[list[Any]]:
    """Name, bytes and time of each file: differs where the photos may have changed."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in _files(photos, folder)]


def _digest(photos: Path, folder: Path, record: dict[str, Any] | None = None) -> str:
    """SHA-256 over the names and bytes of the files. record: the source that is compared with, whose name an archive takes: its own does not count."""
    name = Path(record["photos"]).name if record and photos.is_file() else ""
    lines = [f"{_content(file, photos)} {name or file.name}" for file in _files(photos, folder)]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _content(file: Path, photos: Path) -> str:
    """What tells a file's content from others'; the same for all those of a folder that cannot be read, which are left out when the photos are taken in."""
    try:
        return _hash(file, file.stat().st_size, file.stat().st_mtime_ns)
    except OSError:
        if file == photos:
            raise
        return "unreadable"


@cache
def _hash(file: Path, _size: int, _time: int) -> str:
    """The SHA-256 of a file in a state of it, read once: it may have gigabytes, and is asked for by the name it had and by the one it has."""
    return sha256_file(file)


def _files(photos: Path, folder: Path) -> list[Path]:
    """The zip, or the visible files in a folder of photos without those of the run itself, which may lie in it."""
    if not photos.is_dir():
        return [photos]
    return sorted(file for file in photos.resolve().rglob("*") if os.path.isfile(file) and file.name[0] != "." and not file.is_relative_to(folder.resolve()))


def default_folder(photos: Path, trigger_word: str) -> Path:
    """runs/TRIGGER-PHOTOS, so that the same command finds its run again."""
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", f"{trigger_word}-{photos.resolve().stem}")[:60].strip("-.") or "run")


def _say_licence(model: str) -> None:
    """What the base model asks of those who use the LoRA."""
    from lorabooth.families import load_family

    licence = load_family(model).licence
    if licence.duties:
        click.echo(f"licence: {licence.name} ({licence.url}); it asks you to {', '.join(licence.duties)}")


def _say(notes: tuple[str, ...]) -> None:
    for line in notes:
        note(line)
