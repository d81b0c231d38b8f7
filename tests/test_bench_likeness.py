"""Likeness beside the script: the arithmetic of the summary, and a training of each arm."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from lorabooth.mini import people, world
from scripts import bench_likeness
from scripts.bench_likeness import OURS, PEER


def rows() -> list[dict]:
    found = []
    for arm, identity, seconds in ((OURS, 0.9, 10.0), (PEER, 0.7, 19.0)):
        for steps in (100, 200):
            for seed, more in ((0, 0.0), (1, 0.1)):
                row = {"arm": arm, "person": "ada", "seed": seed, "steps": steps, "seconds": seconds * steps / 100}
                found.append(row | {"identity": identity + more, "scene": 0.5, "bleed": 0.2})
    return found


def test_means_are_over_people_and_seeds_and_time_is_compared():
    summary = bench_likeness.summary(rows(), [100, 200])
    told = {(row["arm"], row["steps"]): row for row in summary}
    assert told[OURS, 100]["identity"] == pytest.approx(0.95) and told[PEER, 200]["worst_identity"] == pytest.approx(0.7)
    assert told[OURS, 200]["same_time"] == 100 and told[OURS, 100]["same_time"] == 0, "the script had done no mark when ours had done 100 steps"
    assert bench_likeness.table({"summary": summary}).count("\n") == 5
    picture = ElementTree.fromstring(bench_likeness.plot({"summary": summary}))
    assert len(picture.findall("{*}polyline")) == 6


def test_there_are_eight_people_with_something_the_mini_model_never_saw():
    assert len(bench_likeness.PEOPLE) == 8
    for name in bench_likeness.PEOPLE:
        who = (people.HELD_OUT | people.MORE)[name]
        assert any(value in world.values(attribute, held_out=True) for attribute, value in who.items())
        assert all(value in world.values(attribute) for attribute, value in who.items())


@pytest.mark.slow
def test_both_arms_train_and_what_is_done_is_not_done_again(tmp_path: Path):
    arguments = ["--people", "di", "--seeds", "1", "--steps", "2,4", "--scenes", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    for _ in range(2):
        done = CliRunner().invoke(bench_likeness.bench, arguments)
        assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out.json").read_text())
    assert [(row["arm"], row["steps"]) for row in record["rows"]] == [(OURS, 2), (OURS, 4), (PEER, 2), (PEER, 4)]
    assert all(0 <= row[what] <= 1 for row in record["rows"] for what in ("identity", "scene", "bleed")) and (tmp_path / "out.svg").exists()
