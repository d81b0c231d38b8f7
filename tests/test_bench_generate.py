"""Pictures beside FluxPipeline: what does not depend on the machine."""

import json
from importlib.metadata import version

import pytest
import torch
from click.testing import CliRunner
from PIL import ImageChops

from lorabooth.families import load_family
from scripts import bench_generate


def test_every_arm_and_every_swap_are_on_record(tmp_path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "results" / "generate.json"
    done = CliRunner().invoke(bench_generate.bench, ["--rounds", "1", "--steps", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert [row["arm"] for row in record["pictures"]] == [arm.name for arm in bench_generate.CPU_ARMS]
    assert all(0 < row["spread"][0] <= row["seconds_a_picture"] * row["pictures"] <= row["spread"][1] for row in record["pictures"])
    assert list(record["swaps"]) == ["FluxPipeline", "merged", "beside the weights"] and all(row["median_ms"] > 0 for row in record["swaps"].values())
    assert "| FluxPipeline | " in done.output and record["machine"]["versions"]["torch"] == version("torch")


def test_ours_and_the_pipeline_draw_the_same_picture(tmp_path):
    family, cpu = load_family("mini"), torch.device("cpu")
    conditioning = family.encode_prompts(family.text_encoders(cpu, torch.float32), [bench_generate.PROMPT])
    shared = bench_generate.Bench(family, cpu, conditioning, tmp_path, steps=2)
    shared.write_loras()
    for theirs, ours in ((0, 2), (1, 3)):
        [right], [output] = (bench_generate.CPU_ARMS[i].build(shared)() for i in (theirs, ours))
        assert max(high for _, high in ImageChops.difference(right, output.image).getextrema()) <= 1
