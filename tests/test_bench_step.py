"""The step beside diffusers' script: what does not depend on the machine."""

import json

import pytest
from click.testing import CliRunner

from scripts import bench_step


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench") / "results" / "step.json"
    done = CliRunner().invoke(bench_step.bench, ["--steps", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())


def test_a_step_launches_little_more_than_half_of_the_scripts_operators(record: dict):
    for base in record["bases"].values():
        assert 0.3 < base["operator_ratio"] < 0.6
        assert all(row["operators"] > 1000 and 0 < row["p10_seconds"] <= row["median_seconds"] <= row["p90_seconds"] for row in base["arms"].values())


def test_both_arms_are_on_record_with_the_machine(record: dict):
    assert list(record["bases"]) == ["57 blocks, 16 wide", "mini"] and record["machine"]["versions"]["torch"]
    assert all(list(base["arms"]) == ["lorabooth", "diffusers' script"] for base in record["bases"].values())
    assert all(base["optimizer"] == "adamw" and base["lora_rank"] == 16 for base in record["bases"].values())
