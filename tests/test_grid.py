"""Grids: the right LoRA in each cell, nothing made twice, and a page that shows strangers' words as words."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFont
from safetensors.torch import load_file

from infer import columns, grid_page, picture
from infer.columns import weights_of
from infer.engine import Engine, Output
from infer.grid import Grid
from infer.loras import LoraChoice, resolve
from infer.request import Request
from lorabooth import checkpoints
from lorabooth.cli import main
from lorabooth.errors import UserError
from lorabooth.runs import RunDir

FAST = ("--steps", "1", "--width", "64", "--height", "64")
NASTY = "<script>alert('x')</script> & \"quoted\" TOK"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[float, ...]]]:
    """What the engine is asked for: prompt and weights, in order."""
    asked = []
    generate = Engine.generate

    def noted(self: Engine, request: Request, loras: tuple[LoraChoice, ...] = (), *others: object):
        asked.append((request.prompt, tuple(choice.weight for choice in loras)))
        return generate(self, request, loras, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "generate", noted)
    return asked


def cells(out: Path) -> dict[tuple[int, int], Path]:
    record = json.loads((out / "grid.json").read_text())
    return {(entry["row"], entry["column"]): out / entry["file"] for entry in record["pictures"]}


def test_weights(tiny_run: Path, tmp_path: Path, made: list, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "grid"
    command = ["grid", "a person", NASTY, "--lora", str(tiny_run), *FAST, "--out", str(out)]
    assert main([*command, "--weights", "0,0.5,1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == [str(out / name) for name in ("index.html", "grid.png", "grid.json")]
    assert "note: put the trigger word TOK into the prompt: TOK\n" in captured.err.replace(" (--as-written leaves prompts alone)", "")
    assert made == [(prompt, weights) for weights in ((), (0.5,), (1.0,)) for prompt in ("TOK", NASTY)], "column by column"
    assert "6/6" in captured.err and "6 pictures made" in captured.err

    record = json.loads((out / "grid.json").read_text())
    assert record["prompts"] == ["TOK", NASTY] and record["columns"] == ["no LoRA", "weight 0.5", "weight 1"]
    assert [(entry["row"], entry["column"]) for entry in record["pictures"]] == [(r, c) for r in range(2) for c in range(3)]
    for entry in record["pictures"]:
        assert entry["making"] == picture.making_of(out / entry["file"]) and entry["making"]["seed"] == 42
    assert str(tmp_path) not in (out / "grid.json").read_text() + (out / "index.html").read_text()

    made.clear()
    assert main([*command, "--weights", "0.5..1+0.25"]) == 0
    assert made == [("TOK", (0.75,)), (NASTY, (0.75,))], "only the new column"
    assert "2 pictures made, 6 were there" in capsys.readouterr().err


def test_what_is_made_is_kept_unless_it_is_damaged_or_made_otherwise(tiny_run: Path, tmp_path: Path, made: list, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "grid"
    command = ["grid", "TOK", "--lora", str(tiny_run), "--weights", "1", *FAST, "--out", str(out)]
    assert main(command) == 0
    before = {place: file.read_bytes() for place, file in cells(out).items()}
    made.clear()
    capsys.readouterr()
    assert main(command) == 0
    assert made == [] and "0 pictures made, 2 were there" in capsys.readouterr().err
    cells(out)[0, 0].write_bytes(before[0, 0][:-40])
    cells(out)[0, 1].write_bytes(before[0, 0])
    assert main(command) == 0
    assert made == [("TOK", ()), ("TOK", (1.0,))] and before == {place: file.read_bytes() for place, file in cells(out).items()}
    made.clear()
    assert main([*command, "--seed", "1"]) == 0
    assert len(made) == 2
    assert main([*command, "--seed", "1", "--guidance", "2"]) == 0
    assert len(made) == 4


def test_an_interrupted_grid_goes_on(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list):
    command = ["grid", "TOK", "TOK, smiling", "--lora", str(tiny_run), "--weights", "1", *FAST, "--out", str(tmp_path)]
    draw = Engine.make
    with monkeypatch.context() as patch:

        def stops(*arguments: Any) -> list[Output]:
            if len(made) == 3:
                raise KeyboardInterrupt
            return draw(*arguments)

        patch.setattr(Engine, "make", stops)
        assert main(command) == 130
    made.clear()
    assert main(command) == 0
    assert made == [("TOK", (1.0,)), ("TOK, smiling", (1.0,))]


def test_the_cells_are_what_generate_makes(tiny_run: Path, tmp_path: Path):
    assert main(["grid", "TOK", "--lora", str(tiny_run), "--weights", "0.5", *FAST, "--out", str(tmp_path / "grid")]) == 0
    assert main(["generate", "TOK", "--lora", f"{tiny_run}:0.5", *FAST, "--seed", "42", "--quality", "92", "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "out-0.webp").read_bytes() == cells(tmp_path / "grid")[0, 1].read_bytes()


def test_checkpoints(tiny_run: Path, tmp_path: Path, made: list, capsys: pytest.CaptureFixture[str]):
    run, out = tmp_path / "run", tmp_path / "grid"
    shutil.copytree(tiny_run, run)
    shutil.copytree(run / "checkpoints" / "step-000002", run / "checkpoints" / "step-000003")
    (run / "checkpoints" / "step-000003" / "ema.safetensors").write_bytes(b"torn")
    assert main(["grid", "[trigger], smiling", "--checkpoints", str(run), *FAST, "--out", str(out)]) == 0
    assert "note: step-000003 is damaged and left out" in capsys.readouterr().err
    assert json.loads((out / "grid.json").read_text())["columns"] == ["no LoRA", "step 2", "step 4"]
    assert made == [("TOK, smiling", ()), ("TOK, smiling", (1.0,)), ("TOK, smiling", (1.0,))]
    last, exported = load_file(out / "loras" / "step-000004.safetensors"), load_file(tiny_run / "lora.safetensors")
    assert last.keys() == exported.keys() and all(torch.equal(last[key], exported[key]) for key in last)
    assert len({file.read_bytes() for file in cells(out).values()}) == 3
    before = resolve(str(out / "loras" / "step-000002.safetensors")).file.sha256
    made.clear()
    assert main(["grid", "[trigger], smiling", "--checkpoints", str(run), *FAST, "--out", str(out)]) == 0
    assert made == [] and resolve(str(out / "loras" / "step-000002.safetensors")).file.sha256 == before, "the same file again, or all is made again"


def test_checkpoints_that_go_away(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunDir(tmp_path / "run")
    shutil.copytree(tiny_run, run.path)
    whole = checkpoints.verified

    def dropped(folder: Path) -> dict | None:
        record = whole(folder)
        if folder.name == "step-000002":
            shutil.rmtree(folder)
        return record

    monkeypatch.setattr(checkpoints, "verified", dropped)
    found, damaged = columns.checkpoint_columns(run, tmp_path / "loras")
    assert [column.label for column in found] == ["no LoRA", "step 4"] and damaged == ["step-000002"]


def test_the_page_asks_no_network_and_shows_words_as_words(tiny_run: Path, tmp_path: Path):
    assert main(["grid", NASTY, "--lora", str(tiny_run), "--weights", "1", *FAST, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 2 and all((tmp_path / link).is_file() for link in links)
    assert not re.search(r"https?:|//", re.sub(r"base64,[^\"]+", "", page)) and page.count('src="data:image/webp;base64,') == 2
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (grid_page.LABEL_PX + 2 * 262, 262 + 32) and "trainedAlgorithmicMedia" in sheet.info["XML:com.adobe.xmp"]


@pytest.mark.parametrize("readable", [True, False], ids=["font of the machine", "font of pillow"])
def test_labels_fit_their_places(readable: bool, monkeypatch: pytest.MonkeyPatch):
    if not readable:
        monkeypatch.setattr(grid_page, "FONTS", ())
    font, legible = grid_page.label_font()
    for text in ("short", "word " * 200, "w" * 900, "café 漢字 🙂 " * 30, ""):
        lines = grid_page.wrapped(legible(text), font, 260, 5)
        assert len(lines) <= 5 and all(font.getlength(line) <= 260 for line in lines)
        assert not lines or "".join(lines).removesuffix("...").replace(" ", "") in legible(text).replace(" ", "")
    assert grid_page.plain("café 漢") == "cafe ?"
    assert isinstance(font, ImageFont.FreeTypeFont)


def test_a_large_grid_is_a_sheet_that_can_be_opened(tmp_path: Path):
    rows = [Request(f"hat {i}", 64, 64, i) for i in range(400)]
    grid = Grid(rows, [columns.NO_LORA], "mini", tmp_path)
    for cell in grid.cells:
        picture.write(cell.file, Image.new("RGB", (64, 64)), cell.making)
    assert max(grid_page.sheet(grid, "many").size) <= 16_100
    with pytest.raises(UserError, match="400 prompts x 2 columns make 800 pictures; the limit is 400"):
        Grid(rows, [columns.NO_LORA] * 2, "mini", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,0.6,0.8,1,1.2", [0, 0.6, 0.8, 1, 1.2]),
        ("0..1.2+0.2", [0, 0.2, 0.4, 0.6, 0.8, 1, 1.2]),
        ("-1..1+.5, 3,1.0", [-1, -0.5, 0, 0.5, 1, 3]),
        ("1..1+1", [1]),
    ],
)
def test_weights_and_ranges(text: str, expected: list[float]):
    assert weights_of(text) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a grid needs a LoRA"),
        (["--checkpoints", "none"], "not a lorabooth run"),
        (["--checkpoints", "RUN", "--weights", "1"], "does not go together"),
        (["--lora", "RUN:0.8"], "is what a grid varies"),
        (["--lora", "RUN", "--weights", "0"], "a weight other than 0"),
        (["--lora", "RUN", "--weights", "a"], "'a' in --weights is not a weight"),
        (["--lora", "RUN", "--weights", ""], "'' in --weights"),
        (["--lora", "RUN", "--weights", "nan"], "'nan' in --weights"),
        (["--lora", "RUN", "--weights", "4"], "from -2 to 3"),
        (["--lora", "RUN", "--weights", "0..1+0"], "from..to+step"),
        (["--lora", "RUN", "--weights", "1..0+1"], "from..to+step"),
        (["--lora", "RUN", "--weights", "0..3+0.000001"], "at most 50 steps"),
        (["--lora", "RUN", "--weights", ",".join(str(i / 100) for i in range(60))], "60 weights are given; the limit is 50"),
        (["--lora", "RUN", "--width", "65"], "multiple of 16"),
        (["--lora", "RUN", "--weights", f"{'9' * 400}..{'9' * 400}+1"], "are no range"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(arguments: list[str], words: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = [argument.replace("RUN", str(tiny_run)) for argument in arguments]
    assert main(["grid", "TOK", *given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("lorabooth") and len(said.splitlines()) <= 2 and not (tmp_path / "out").exists()


def test_a_run_without_checkpoints(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run / "config.json", tmp_path / "run")
    assert main(["grid", "TOK", "--checkpoints", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "it has no checkpoint yet" in capsys.readouterr().err
