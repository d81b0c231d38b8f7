"""Pictures out of the mini model: the right files, the same bytes for the same request, and a sentence for each mistake."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from infer import picture
from infer.engine import Engine
from infer.loras import LoraChoice, resolve, split_weight
from infer.request import ASPECT_RATIOS, Request, size_for
from lorabooth.cli import main
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1 import tiny
from lorabooth.lora import LoraSpec, save_lora, tensors
from lorabooth.lora_file import LoraFile

PROMPT = "a portrait of TOK, smiling"
FAST = ("--model", "mini", "--steps", "2", "--width", "64", "--height", "64")
CPU = torch.device("cpu")
AI_MARK = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("mini")


@pytest.fixture(scope="module")
def loras(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraChoice, LoraChoice]:
    """The trained LoRA, and one on other layers with random weights, so large that each shows in a picture."""
    transformer = load_family("mini").transformer(CPU, torch.float32)
    spec = LoraSpec(2, 2, "attention")
    spec.attach(transformer, seed=3)
    generator = torch.Generator().manual_seed(4)
    state = {key: t + 0.05 * torch.randn(t.shape, generator=generator) for key, t in tensors(transformer).items()}
    file = tmp_path_factory.mktemp("loras") / "style.safetensors"
    save_lora(file, state, spec, {"lorabooth.base": "mini"})
    return resolve(str(tiny_run)), resolve(str(file))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a FLUX model of another width."""
    folder = tiny(tmp_path_factory.mktemp("tiny") / "model")
    transformer = load_family(str(folder)).transformer(CPU, torch.float32)
    spec = LoraSpec(2, 2, "attention")
    spec.attach(transformer, seed=0)
    file = folder.parent / "foreign.safetensors"
    save_lora(file, tensors(transformer), spec, {"lorabooth.base": "somebody/tiny"})
    return file


def request(**changes: int | float | str) -> Request:
    return Request(**({"prompt": PROMPT, "width_px": 64, "height_px": 64, "seed": 7, "num_inference_steps": 2} | changes))  # type: ignore[arg-type]


def pixels(engine: Engine, *loras: LoraChoice, **changes: int | float | str) -> np.ndarray:
    return np.asarray(next(engine.generate(request(**changes), loras)).image, dtype=np.int16)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


# Files


def test_one_picture_is_one_file_that_says_how_it_was_made(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number, form in enumerate(("webp", "png", "jpg")):
        assert main(["generate", PROMPT, "--lora", f"{tiny_run}:0.8", "--seed", "7", *FAST[2:], "--format", form, "--out", str(tmp_path)]) == 0
        file = tmp_path / f"out-{number}.{form}"
        assert capsys.readouterr().out == f"{file}\n"
        with Image.open(file) as image:
            assert (image.format, image.size) == ({"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}[form], (64, 64))
            xmp = image.info["XML:com.adobe.xmp"] if form == "png" else image.info["xmp"].decode()
        assert AI_MARK in xmp
        made = picture.making_of(file)
        assert made["prompt"] == PROMPT and (made["seed"], made["width"], made["num_inference_steps"], made["model"]) == (7, 64, 2, "mini")
        [lora] = made["loras"]
        assert lora == {"name": "tiny", "sha256": LoraFile.read(tiny_run / "lora.safetensors").sha256, "weight": 0.8}
        assert str(tiny_run) not in json.dumps(made), "a path of this machine would travel with the picture"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out-0.webp", "out-1.png", "out-2.jpg"]


def test_parameters_are_where_other_programs_look_for_them(tmp_path: Path):
    making = picture.Making(request(prompt="a café, 漢字 🙂"), 7, "mini", ())
    for form in ("png", "jpg", "webp"):
        file = tmp_path / f"a.{form}"
        picture.write(file, Image.new("RGB", (64, 64)), making)
        assert picture.making_of(file)["prompt"] == "a café, 漢字 🙂"
        with Image.open(file) as image:
            comment = image.getexif().get_ifd(0x8769).get(0x9286, b"")
            text = image.info["parameters"] if form == "png" else comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
        assert text.startswith("a café, 漢字 🙂\nNegative prompt: \nSteps: 2, Sampler: Euler,") and "Seed: 7, Size: 64x64" in text


def test_a_picture_of_others_has_no_record(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert picture.making_of(tmp_path / "a.png") == {}


def test_several_pictures_have_a_sheet_and_each_equals_the_single_one_of_its_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", PROMPT, *FAST, "-n", "3", "--seed", "7", "--out", str(tmp_path / "three"), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)
    assert [Path(file["file"]).name for file in files] == ["out-0.webp", "out-1.webp", "out-2.webp", "contact-sheet.png"]
    assert [file["seed"] for file in files[:3]] == [7, 8, 9]
    with Image.open(files[3]["file"]) as sheet:
        assert sheet.width == 3 * 64 and sheet.height > 64
    assert AI_MARK in Path(files[3]["file"]).read_text(errors="replace")
    for name in ("out-0.webp", "out-1.webp"):  # the same request again gives the same bytes, too, in a file of its own
        assert main(["generate", PROMPT, *FAST, "--seed", "9", "--out", str(tmp_path / "one")]) == 0
        single, third = tmp_path / "one" / name, tmp_path / "three" / "out-2.webp"
        assert pixels_of(single) == pixels_of(third) and picture.making_of(single) == picture.making_of(third)
        assert single.read_bytes() == third.read_bytes()
    assert pixels_of(tmp_path / "three" / "out-0.webp") != pixels_of(tmp_path / "three" / "out-1.webp")


def pixels_of(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


# LoRAs


def test_two_loras_with_weights_both_count(engine: Engine, loras: tuple[LoraChoice, LoraChoice]):
    person, style = loras
    base, first, second, both = pixels(engine), pixels(engine, person), pixels(engine, style), pixels(engine, person, style)
    pictures = [base, first, second, both, pixels(engine, LoraChoice(person.file, 0.5), style)]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert difference(one, other) > 4
    assert difference(both, pixels(engine, style, person)) <= 2, "the order of LoRAs must not matter but for rounding"


def test_weight_zero_is_no_lora(engine: Engine, loras: tuple[LoraChoice, LoraChoice]):
    assert difference(pixels(engine), pixels(engine, LoraChoice(loras[0].file, 0.0))) <= 1


def test_a_picture_does_not_depend_on_what_ran_before(loras: tuple[LoraChoice, LoraChoice]):
    engine = Engine("mini")
    base, person = pixels(engine), pixels(engine, loras[0])
    for used in ((loras[1],), loras, (LoraChoice(loras[0].file, -1.0),)):
        pixels(engine, *used)
        assert difference(base, pixels(engine)) == 0
        assert difference(person, pixels(engine, loras[0])) == 0


def test_two_requests_whose_outputs_alternate_do_not_mix(engine: Engine, loras: tuple[LoraChoice, LoraChoice]):
    wanted = [np.asarray(o.image).tobytes() for o in engine.generate(request(num_outputs=2), (loras[0],))]
    going = engine.generate(request(num_outputs=2), (loras[0],))
    first = np.asarray(next(going).image).tobytes()
    pixels(engine)
    assert [first, np.asarray(next(going).image).tobytes()] == wanted


def test_a_lora_that_cannot_be_applied_leaves_none_of_the_others_on(loras: tuple[LoraChoice, LoraChoice], tmp_path: Path):
    engine = Engine("mini")
    base = pixels(engine)
    for name, state in bad_loras(loras[0].file.path).items():
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=name):
            pixels(engine, loras[0], LoraChoice(LoraFile.read(tmp_path / f"{name}.safetensors"), 1.0))
        assert difference(base, pixels(engine)) == 0


def bad_loras(good: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What people really give: LoRAs of Stable Diffusion XL in two formats, and damaged ones."""
    state = load_file(good)
    some = next(key for key in state if ".lora_B." in key)
    sdxl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    return {
        "sdxl-kohya": {f"{sdxl}.{end}": torch.zeros(4, 4) for end in ("lora_down.weight", "lora_up.weight", "alpha")},
        "sdxl-diffusers": {f"unet.down_blocks.1.attentions.0.to_q.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"},
        "half": {key: t for key, t in state.items() if ".lora_A." in key},
        "ranks": state | {some: torch.zeros(state[some].shape[0], 1)},
        "scalar": {some: torch.tensor(1.0)},
    }


def test_a_lora_of_another_model_is_one_sentence_with_exit_code_2(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", PROMPT, *FAST, "--lora", str(foreign), "--out", str(tmp_path / "out")]) == 2
    lines = one_problem(capsys)
    assert "foreign.safetensors does not fit mini" in lines and "somebody/tiny" in lines
    assert not (tmp_path / "out").exists()


def test_loras_of_two_models_name_both(foreign: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", PROMPT, "--lora", str(foreign), "--lora", str(tiny_run)]) == 2
    lines = one_problem(capsys)
    assert "somebody/tiny" in lines and "mini" in lines


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (b'{"a.lora_A.weight": {"data_offsets": [0, 0]}}', "no shape"),
        (b'{"__metadata__": [1], "a.lora_A.weight": {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]}}', "metadata is a list"),
        (b'{"a.lora_A.weight": {"dtype": "F32", "shape": 3, "data_offsets": [0, 0]}}', "shape is a number"),
        (b"[" * 100_000, "deep"),
        (b"[]", "list"),
        (b"{", "cut"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_header_is_one_sentence(tmp_path: Path, header: bytes, name: str):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"a\.safetensors"):
        LoraFile.read(file)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("runs/tok:0.8", ("runs/tok", 0.8)), ("a:b:-1", ("a:b", -1.0)), ("runs/tok", ("runs/tok", 1.0)), ("a:.5", ("a", 0.5)), ("o/n:x", ("o/n:x", 1.0))],
)
def test_a_weight_stands_behind_the_last_colon(reference: str, expected: tuple[str, float]):
    assert split_weight(reference) == expected


def test_a_folder_whose_name_ends_like_a_weight_is_a_folder(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(tiny_run, tmp_path / "tok:2")
    monkeypatch.chdir(tmp_path)
    assert resolve("tok:2").weight == 1.0 and resolve("tok:2:0.5").weight == 0.5


# Sizes


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_aspect_ratios_are_scaled_to_the_model(ratio: str):
    for native_px in (128, 1024):
        width, height = size_for(ratio, native_px)
        assert width % 16 == height % 16 == 0
        assert request(width_px=width, height_px=height)
        wide, high = map(int, ratio.split(":"))
        # To the nearest multiple of 16, which is coarse for the mini model.
        assert abs(width / height - wide / high) / (wide / high) < (0.04 if native_px == 1024 else 0.2)
        assert (width > height) == (wide > high) and 0.7 < width * height / native_px**2 < 1.2


def test_an_aspect_ratio_gives_a_picture_of_its_size(tmp_path: Path):
    assert main(["generate", PROMPT, "--model", "mini", "--steps", "1", "--seed", "5", "--aspect-ratio", "9:16", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "out-0.webp") as image:
        assert image.size == size_for("9:16", 128) == (96, 160)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--width", "256"), (256, 256)),
        (("--height", "96"), (96, 96)),
        (("--height", "96", "--aspect-ratio", "16:9"), (160, 96)),  # 16:9 is 160 x 96 on the mini model
        (("--width", "64", "--aspect-ratio", "9:21"), (64, 160)),
        (("--width", "64", "--height", "128", "--aspect-ratio", "1:1"), (64, 128)),
    ],
)
def test_a_side_that_is_not_given_follows_the_other(given: tuple[str, ...], expected: tuple[int, int], tmp_path: Path):
    assert main(["generate", PROMPT, "--model", "mini", "--steps", "1", "--seed", "5", *given, "--format", "png", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "out-0.png") as image:
        assert image.size == expected


# Notices


def test_a_random_seed_is_printed_and_makes_the_picture_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    seeds = []
    for _ in range(2):
        assert main(["generate", PROMPT, *FAST, "--out", str(tmp_path / "a")]) == 0  # out-0, then out-1 beside it
        seeds += re.findall(r"Using seed: (\d+)", capsys.readouterr().err)
    assert len(set(seeds)) == 2
    assert main(["generate", PROMPT, *FAST, "--seed", seeds[-1], "--out", str(tmp_path / "b")]) == 0
    assert "Using seed" not in capsys.readouterr().err
    assert (tmp_path / "a" / "out-1.webp").read_bytes() == (tmp_path / "b" / "out-0.webp").read_bytes()


def test_a_prompt_that_is_cut_is_noticed(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", PROMPT, *FAST, "--lora", str(tiny_run), "--seed", "1", "--out", str(tmp_path)]) == 0
    assert "note:" not in capsys.readouterr().err
    assert main(["generate", "TOK " + "in a red hoodie " * 20, *FAST, "--lora", str(tiny_run), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert re.search(r"note: the prompt is too long for this model; it will not see: .*red hoodie.* \.\.\.\n", said)


# Mistakes


def one_problem(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on standard error: one sentence, with at most one line of advice under it."""
    captured = capsys.readouterr()
    said = captured.err.replace("\r", "\n").splitlines()
    lines = [line for line in said if line.strip() and not line.startswith(("Using seed", "note:")) and not re.search(r"\d%\|", line)]
    assert len(lines) in (1, 2) and lines[0].startswith("lorabooth"), captured.err
    assert len(lines) == 1 or lines[1].startswith("  "), captured.err
    assert "Traceback" not in captured.err and not captured.out
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--aspect-ratio", "7:5"], ["'7:5'", "16:9"]),
        (["--steps", "0"], ["0", "from 1 to 50"]),
        (["--steps", "51"], ["51", "from 1 to 50"]),
        (["-n", "0"], ["0", "from 1 to 64"]),
        (["--guidance", "99"], ["99", "from 0 to 10"]),
        (["--guidance", "nan"], ["nan", "from 0 to 10"]),
        (["--seed", "-1"], ["-1", "to 4,294,967,295"]),
        (["--seed", str(2**32)], ["from 0 to"]),
        (["--width", "100", "--height", "64"], ["100", "multiple of 16"]),
        (["--width", "64", "--height", "8"], ["8", "from 64 to 1,536"]),
        (["--width", "0"], ["width", "from 64 to 1,536"]),
        (["--height", "8"], ["height is 8", "from 64 to 1,536"]),
        (["--seed", str(10**400)], ["seed is too large"]),
        (["--detail-faces", "2"], ["needs --detail"]),
        (["--blocks-to-swap", "99999"], ["99999", "57"]),
        (["--format", "gif"], ["'gif'", "webp"]),
        (["--quality", "101"], ["101", "0<=x<=100"]),
        (["--lora", "runs/none"], ["runs/none"]),
        (["--lora", "./none.safetensors"], ["./none.safetensors", "run folder"]),
        (["--lora", "none.safetensors:9"], ["weight", "9", "from -2 to 3"]),
        (["--model", "nobody"], ["'nobody'", "mini"]),
    ],
    ids=lambda value: " ".join(value) if value and str(value[0]).startswith("-") else "",
)
def test_a_bad_value_is_one_sentence_with_exit_code_2(arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", PROMPT, "--model", "mini", *arguments, "--out", str(tmp_path / "out")]) == 2
    said = one_problem(capsys)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


# Characters, not tokens: a program may send a file by mistake, and a jpg's EXIF ends at 64 kB.
@pytest.mark.parametrize("prompt", ["", "  ", "word " * 20_000, "a \udcff b"], ids=["empty", "spaces", "100 kB", "not Unicode"])
def test_a_prompt_that_cannot_be_used_is_one_sentence(prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", prompt, *FAST, "--format", "jpg", "--out", str(tmp_path / "out")]) == 2
    assert "prompt" in one_problem(capsys)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_lora_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, weights, cut = tmp_path / "notes.txt", tmp_path / "weights.safetensors", tmp_path / "cut.safetensors"
    text.write_text("Remember to buy a GPU.")
    save_file({"a": torch.zeros(3)}, weights)
    cut.write_bytes(weights.read_bytes()[:-1])
    for file, words in ((text, "not a safetensors file"), (weights, "holds no LoRA"), (cut, "cut short"), (tmp_path, "several LoRA files")):
        assert main(["generate", PROMPT, *FAST, "--lora", str(file)]) == 2
        assert words in one_problem(capsys)


def test_a_run_that_has_not_ended_says_so(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run / "config.json", tmp_path / "run")
    assert main(["generate", PROMPT, "--lora", str(tmp_path / "run")]) == 2
    assert "has no LoRA yet" in one_problem(capsys)


def test_a_file_in_place_of_the_output_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").write_text("x")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        assert main(["generate", PROMPT, *FAST, "--seed", "1", "--out", str(out)]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "step/s" not in line]
        assert any(line.startswith("lorabooth: ") for line in said) and "Traceback" not in " ".join(said)
