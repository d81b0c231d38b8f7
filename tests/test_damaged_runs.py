"""Files of a finished run that are damaged: what only tells is left out, what counts is named in one sentence, and nothing else stops."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorabooth import checkpoints
from lorabooth.cli import main
from lorabooth.errors import UserError
from lorabooth.runs import RunDir, write_new
from tests.test_processes import untrained
from train import export, fit
from train.checkpoint import save_checkpoint


@pytest.mark.parametrize("line", [b"\xff\xfe", b"null", b"5", b"[]", b'{"step": [1]}', b'{"step": "x", "loss": 1}', b'{"step": 9, "loss": null}'])
def test_a_line_of_metrics_that_is_none_is_left_out(run: RunDir, line: bytes):
    before = run.history()
    run.metrics.write_bytes(run.metrics.read_bytes() + line + b"\n")
    assert run.history() == before
    export.run(run)


@pytest.mark.parametrize("content", [b"", b"\xff", b"5", b'{"fit": "x"}', b'{"fit"'])
def test_times_that_are_damaged_begin_anew(run: RunDir, tiny_command: list[str], content: bytes):
    (run.path / "timings.json").write_bytes(content)
    assert main([*tiny_command, "--out", str(run.path)]) == 0
    assert json.loads((run.path / "timings.json").read_bytes()).keys() >= {"encode", "fit", "export"}


@pytest.mark.parametrize(
    ("name", "content"), [("source.json", b""), ("source.json", b"[1]"), ("base.json", b"\xff"), ("consent.json", b'{"x": 1}'), ("check.json", b'{"photos"')]
)
def test_a_record_that_is_damaged_is_named(run: RunDir, tiny_command: list[str], capsys: pytest.CaptureFixture[str], name: str, content: bytes):
    (run.path / name).write_bytes(content)
    run.lora.unlink()
    shutil.rmtree(run.checkpoints)
    capsys.readouterr()
    assert main([*tiny_command, "--out", str(run.path)]) == 2
    assert f"{name} is damaged\n  delete that file" in capsys.readouterr().err
    (run.path / name).unlink()
    assert main([*tiny_command, "--out", str(run.path)]) == 0 and run.lora.exists()


@pytest.mark.parametrize("content", [b"", b"null", b"5", b"[]", b'{"optimizer": {}, "sha256": 3}'])
def test_a_checkpoint_without_a_record_is_none(run: RunDir, content: bytes):
    [_, last] = checkpoints.folders(run)
    (last / "state.json").write_bytes(content)
    assert checkpoints.verified(last) is None and not fit.finished(run)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: data[:60] + bytes(40) + data[100:]])
def test_a_picture_that_is_damaged_is_left_out_of_the_report(run: RunDir, damage: object, capsys: pytest.CaptureFixture[str]):
    for file in (run.samples / "step-000004-0.png", sorted(run.photos.iterdir())[0]):
        file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    export.run(run)
    assert capsys.readouterr().err.count("cannot be shown") >= 2
    assert "modelspec.thumbnail" not in export.metadata(run) and 'src=""' not in (run.path / "report.html").read_text()


def test_a_checkpoint_of_another_recipe_is_refused(tiny_run: Path, tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "other"
    assert main([*tiny_command, "--lora-rank", "2", "--out", str(other)]) == 0
    run = untrained(tiny_run, tmp_path / "run")
    shutil.copytree(other / "checkpoints", run.checkpoints)
    with pytest.raises(UserError, match="is of a run with another recipe"):
        export.run(run)
    shutil.rmtree(checkpoints.folders(run)[-1])
    with pytest.raises(UserError, match="is of a run with another recipe"):
        fit.run(run)


def test_weights_that_are_not_finite_never_become_a_checkpoint(tiny_run: Path, tmp_path: Path):
    run = untrained(tiny_run, tmp_path / "run")
    trainer = fit.start(run, run.config, fit.load_family("mini"), fit.Accelerator(cpu=True))
    for broken in (trainer.state.parameters, trainer.state.ema):
        with torch.no_grad():
            kept, broken[3][0, 0] = broken[3][0, 0].clone(), float("nan")
        with pytest.raises(UserError, match="not finite after step 0"):
            save_checkpoint(run, trainer.state)
        with torch.no_grad():
            broken[3][0, 0] = kept
    assert not run.checkpoints.exists()
    save_checkpoint(run, trainer.state)
    assert checkpoints.folders(run)


def test_a_result_never_takes_the_place_of_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "lora.safetensors"
    write_new(file, b"one")
    write_new(file, b"one")
    assert "is there already, the same" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is another"):
        write_new(file, b"two")
    assert file.read_bytes() == b"one" and list(tmp_path.iterdir()) == [file]
