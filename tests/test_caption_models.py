"""Captions by models: tiny ones of random weights with real classes and processors, through the whole stage; and every way in which one can be broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer, Repository, client
from PIL import Image

from captioning import choose, models, vision
from captioning.caption import run
from captioning.models import FAMILIES, fitting_precision
from captioning.styles import prompt_of
from captioning.vision import VisionCaptioner
from lorabooth.captions import has_trigger
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.home import cache_folder
from lorabooth.photos import ingest
from lorabooth.runs import RunDir
from tests import tiny_captioners
from tests.test_captioning import captions

SIZES = ((64, 64), (40, 90), (90, 40), (64, 100), (50, 50))


@pytest.fixture(autouse=True)
def short_answers_and_an_empty_memory(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(vision, "NEW_TOKENS", 24)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each family."""
    top = tmp_path_factory.mktemp("models")
    for kind in FAMILIES:
        tiny_captioners.write(kind, top / kind)
    return top


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), range(len(SIZES)))


def write_photos(folder: Path, numbers: range) -> Path:
    """Photos of noise, of several shapes; the same number is the same photo."""
    folder.mkdir(exist_ok=True)
    for i in numbers:
        width, height = SIZES[i % len(SIZES)]
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"photo{i:03d}.png")
    return folder


def make_run(folder: Path, photos: Path, model: Path | str, **config: object) -> Path:
    RunDir.create(folder, TrainConfig.model_validate({"trigger_word": "TOK", "model": "mini", "caption_model": str(model)} | config))
    ingest(photos, folder)
    return folder


def captioner(model: Path, precision: str = "auto") -> VisionCaptioner:
    return VisionCaptioner(str(model), prompt_of(TrainConfig(trigger_word="TOK")), precision)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_of_photos_is_captioned_as_each_of_them_alone(written: Path, photos: Path, kind: str):
    files = sorted(photos.iterdir())
    ours = captioner(written / kind)
    together = ours.caption(files)
    assert together == [ours.caption([file])[0] for file in files]
    assert len(set(together)) == len(files), "the photos are not seen"
    assert together == captioner(written / kind).caption(files), "greedy: the same photos, the same words"
    assert type(ours.loaded.model).__name__ == FAMILIES[kind].model


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_in_4_bits_only_the_language_model_is_rounded(written: Path, photos: Path, kind: str):
    ours = captioner(written / kind, "nf4")
    kinds = {name: type(module).__name__ for name, module in ours.loaded.model.named_modules() if isinstance(module, torch.nn.Linear)}
    small = {name for name, linear in kinds.items() if linear == "Linear4bit"}
    assert small == {name for name in kinds if ".language_model." in name} and len(small) == 14
    [linear] = [module for name, module in ours.loaded.model.named_modules() if name.endswith("layers.0.mlp.up_proj") and "language" in name]
    assert linear.weight.quant_state.quant_type == "nf4" and linear.weight.quant_state.nested
    assert len(ours.caption(sorted(photos.iterdir()))) == len(SIZES)


@pytest.mark.parametrize(
    ("wanted", "free_gb", "gpu", "chosen"),
    [
        ("auto", 24, True, "bf16"),
        ("auto", 8, True, "nf4"),
        ("nf4", 24, True, "nf4"),
        ("auto", 24, False, "nf4"),
        ("auto", 48, False, "bf16"),
        ("bf16", 48, False, "bf16"),
    ],
)
def test_4_bits_are_chosen_where_memory_is_short(wanted: str, free_gb: float, gpu: bool, chosen: str):
    assert fitting_precision(wanted, 14.1e9, free_gb * 1e9, gpu) == chosen


@pytest.mark.parametrize(("wanted", "free_gb"), [("auto", 6), ("bf16", 16)])
def test_a_model_that_does_not_fit_is_refused_with_the_figures(wanted: str, free_gb: float):
    with pytest.raises(UserError, match=rf"needs \d+\.\d GB of memory and {free_gb}\.0 GB are free"):
        fitting_precision(wanted, 14.1e9, free_gb * 1e9, gpu=True)


def test_the_whole_path_keeps_the_rules_and_says_nothing_needless(written: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = make_run(tmp_path / "run", photos, written / "llava", autocaption_prefix="portrait of TOK,", autocaption_suffix="noise")
    assert [note for note in run(folder) if "the template stands in" not in note] == []
    texts, family = captions(folder), load_family("mini")
    assert len(texts) == len(SIZES) and len(set(texts)) > 1
    for text in texts:
        assert has_trigger(text, "TOK") and text.startswith("portrait of TOK,") and text.endswith("noise") and family.cut(text) == ""
    said = capfd.readouterr().err
    assert "caption photos: 100%" in said and "photo/s" in said and "generation flags" not in said and "temperature" not in said
    assert run(folder) == [] and "caption photos" not in capfd.readouterr().err, "a second run has nothing to do"


def test_a_new_run_captions_only_the_photos_that_are_new(written: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = Path(shutil.copytree(written / "llava", tmp_path / "llava"))
    first = make_run(tmp_path / "first", write_photos(tmp_path / "few", range(3)), model)
    run(first)
    kept = {file: file.stat().st_mtime_ns for file in cache_folder("captions").rglob("*.txt")}
    assert len(kept) == 3 and cache_folder("captions").stat().st_mode & 0o077 == 0
    second = make_run(tmp_path / "second", write_photos(tmp_path / "more", range(4)), model, trigger_word="ohwx")
    run(second)
    assert [text.replace("ohwx", "TOK") for text in captions(second)[:3]] == captions(first)
    assert len(list(cache_folder("captions").rglob("*.txt"))) == 4 and all(file.stat().st_mtime_ns == at for file, at in kept.items())
    # Weights that are damaged and look as before: nothing is captioned anew, so they are not read.
    weights = model / "model.safetensors"
    state = weights.stat()
    weights.write_bytes(bytes(state.st_size))
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    third = make_run(tmp_path / "third", tmp_path / "more", model)
    assert not any("cannot write captions" in note for note in run(third))
    assert captions(third)[:3] == captions(first)


def test_another_prompt_or_model_is_another_caption(written: Path, tmp_path: Path):
    configs = [{}, {"class_phrase": "a man"}, {"subject": "object"}, {"autocaption_prefix": "P"}, {"caption_precision": "nf4"}]
    prompts = [(prompt_of(config), config.caption_precision) for config in (TrainConfig.model_validate({"trigger_word": "TOK"} | c) for c in configs)]
    keys = [VisionCaptioner(str(written / kind), *prompt).key for kind in ("llava", "qwen2_vl") for prompt in prompts]
    assert len(set(keys)) == len(keys)
    suffix = TrainConfig(trigger_word="ohwx", autocaption_suffix="S")
    assert VisionCaptioner(str(written / "llava"), prompt_of(suffix)).key == keys[0]


def test_a_memory_that_cannot_be_used_hinders_nothing(written: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = make_run(tmp_path / "run", photos, written / "llava")
    run(folder)
    assert len(captions(folder)) == len(SIZES)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_kill_loses_at_most_the_batch_at_hand(written: Path, tmp_path: Path, number: int, code: int):
    folder = make_run(tmp_path / "run", write_photos(tmp_path / "many", range(80)), written / "llava_onevision")
    # A shell's background job, as CI may be, ignores SIGINT and so do its children.
    process = subprocess.Popen(
        [sys.executable, "-m", "captioning", str(folder)], stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    end = time.monotonic() + 120
    while len(list((folder / "captions").glob("*.txt"))) < 8:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, f"{len(captions(folder))} captions: {said}"
    assert "Traceback" not in said
    assert number != signal.SIGINT or "run the same command again to go on" in said
    kept = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (folder / "captions").glob("*.txt")}
    assert 8 <= len(kept) < 80, "it was over before the signal came"
    run(folder)
    texts = captions(folder)
    assert len(texts) == 80 and all(has_trigger(text, "TOK") for text in texts)
    assert {name: ((folder / "captions" / name).read_bytes(), (folder / "captions" / name).stat().st_mtime_ns) for name in kept} == kept


def broken(model: Path, how: str) -> None:
    config = json.loads((model / "config.json").read_text())
    weights = model / "model.safetensors"
    if how == "no config":
        (model / "config.json").unlink()
    elif how == "unknown type":
        (model / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "weights missing":
        other = json.loads((model / "config.json").read_text())
        other["text_config"]["num_hidden_layers"] = 3
        (model / "config.json").write_text(json.dumps(other))
    elif how == "pickle":
        weights.rename(model / "pytorch_model.bin")
    elif how == "no chat template":
        (model / "chat_template.jinja").unlink()
    elif how == "another processor":
        settings = json.loads((model / "processor_config.json").read_text())
        (model / "processor_config.json").write_text(json.dumps(settings | {"patch_size": 7}))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no config", "it has no config.json"),
        ("unknown type", "it is of the type 'blip'; known are llava, llava_next"),
        ("truncated", "it cannot be loaded"),
        ("weights missing", "its files lack 9 of the model's weights"),
        ("pickle", "it cannot be loaded"),
        ("no chat template", "it fails: Cannot use apply_chat_template"),
        ("another processor", "it fails: "),
    ],
)
def test_a_broken_model_is_one_note_and_the_next_captioner_goes_on(written: Path, photos: Path, tmp_path: Path, how: str, reason: str):
    model = Path(shutil.copytree(written / "llava", tmp_path / "llava"))
    broken(model, how)
    folder = make_run(tmp_path / "run", photos, model)
    failed, template = run(folder)
    assert failed.startswith(f"llava cannot write captions: {reason}") and failed.endswith("; the template does it instead") and "\n" not in failed
    assert template.startswith("5 captions are the template")
    assert captions(folder) == ["a photo of TOK, a person"] * len(SIZES)


def test_a_model_that_cannot_be_had_is_one_note(photos: Path, tmp_path: Path):
    folder = make_run(tmp_path / "run", photos, "someone/not-on-this-machine")
    failed, _ = run(folder)
    assert failed == (
        "someone/not-on-this-machine cannot write captions: someone/not-on-this-machine is not on this machine and the hub cannot be reached; "
        "the template does it instead"
    )


@pytest.mark.parametrize("name", ["nonsense", "./models/llava", "a/b/c", ""])
def test_what_is_no_model_reference_is_refused(photos: Path, tmp_path: Path, name: str):
    folder = make_run(tmp_path / "run", photos, name)
    with pytest.raises(UserError, match="unknown caption_model"):
        run(folder)


def test_the_order_of_choice(monkeypatch: pytest.MonkeyPatch):
    def names(**config: str) -> list[str]:
        return [captioner.name for captioner in choose.captioners(TrainConfig.model_validate({"trigger_word": "TOK"} | config))]

    template = "the template"
    assert names() == names(caption_model="template") == [template]
    assert names(caption_model="someone/llava") == ["someone/llava", template]
    monkeypatch.setattr(choose, "_has_gpu", lambda: True)
    assert names() == [choose.LLAVA, choose.QWEN, template]
    assert names(model="mini") == names(caption_model="template") == [template]
    assert names(caption_model=choose.QWEN) == [choose.QWEN, choose.LLAVA, template]


def test_where_memory_runs_out_fewer_photos_are_captioned_at_once(written: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = sorted(photos.iterdir())
    expected, tight = captioner(written / "llava").caption(files), captioner(written / "llava")
    generate, sizes, limit = tight.loaded.model.generate, [], 2

    def with_little_memory(**inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(tight.loaded.model, "generate", with_little_memory)
    assert tight.caption(files) == expected
    assert sizes == [5, 4, 2, 2, 1] and (sizes.clear(), tight.caption(files), sizes)[2] == [2, 2, 1]
    limit = 0
    with pytest.raises(UserError, match="used up by a single photo"):
        tight.caption(files)
    assert "loaded" not in vars(tight), "the next captioner needs the memory"


def test_an_old_repository_of_llava_gets_from_the_model_what_its_processor_lacks(written: Path, photos: Path, tmp_path: Path):
    model = Path(shutil.copytree(written / "llava", tmp_path / "llava"))
    settings = json.loads((model / "processor_config.json").read_text())
    lacking = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    (model / "processor_config.json").write_text(json.dumps({name: value for name, value in settings.items() if name not in lacking}))
    files = sorted(photos.iterdir())
    assert captioner(model).caption(files) == captioner(written / "llava").caption(files)


def test_a_photo_that_is_not_square_is_seen_whole(tmp_path: Path):
    Image.new("RGB", (300, 100), "red").save(tmp_path / "wide.png")
    square = vision._squared(vision._opened(tmp_path / "wide.png"))
    assert square.size == (300, 300) and square.getpixel((2, 150)) == square.getpixel((297, 150)) == (255, 0, 0)
    assert square.getpixel((150, 10)) == vision.CLIP_MEAN
    Image.new("RGB", (4000, 2000)).save(tmp_path / "large.png")
    assert vision._opened(tmp_path / "large.png").size == (1024, 512)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


def test_a_model_of_the_hub_arrives_without_code_and_runs_none(server: HubServer, written: Path, photos: Path, tmp_path: Path):
    ran = tmp_path / "code-of-the-repository-ran"
    model = Path(shutil.copytree(written / "llava", tmp_path / "llava"))
    (model / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForImageTextToText": "modeling_evil.Evil"}}))
    server.repositories = {"someone/tiny-llava": Repository(model)}
    folder = make_run(tmp_path / "run", photos, "someone/tiny-llava")
    program = "import json, sys, pathlib; from captioning.caption import run; print(json.dumps(run(pathlib.Path(sys.argv[1]))))"
    notes = client(server, tmp_path / "home", program, str(folder), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert not any("cannot write captions" in note for note in notes)
    assert len(captions(folder)) == len(SIZES) and not ran.exists()
    arrived = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert {"config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"} <= arrived
    assert not arrived & {"modeling_evil.py", "pytorch_model.bin"}


def test_nothing_of_transformers_that_would_run_a_repositorys_code_is_used():
    for module in (models, vision):
        assert module.__file__ is not None
        assert "trust_remote_code=True" not in Path(module.__file__).read_text()
