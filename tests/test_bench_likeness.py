"""Likeness beside the script: the arithmetic of the summary, and a training of each arm."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from lorabooth.mini import people, world
from scripts import bench_choices, bench_likeness
from scripts.bench_likeness import OURS, PEER
from train.command import RECIPES


def rows() -> list[dict]:
    found = []
    for arm, identity, seconds in ((OURS, 0.8, 10.0), (PEER, 0.7, 19.0)):
        for steps in (100, 200):
            for seed, more in ((0, 0.0), (1, 0.1)):
                row = {"arm": arm, "person": "ada", "seed": seed, "steps": steps, "seconds": seconds * steps / 100}
                found.append(row | {"identity": identity + more + steps / 1000 - 0.1, "scene": 0.5, "bleed": 0.2})
    return found


def test_means_are_over_people_and_seeds_and_time_is_compared():
    summary = bench_likeness.summary(rows(), [100, 200])
    told = {(row["arm"], row["steps"]): row for row in summary}
    assert told[OURS, 100]["identity"] == pytest.approx(0.85) and told[PEER, 200]["worst_identity"] == pytest.approx(0.8)
    assert "script_at_equal_time" not in told[OURS, 100], "the script had done no mark when ours had done 100 steps"
    assert told[OURS, 200]["script_at_equal_time"] == pytest.approx(0.75 + 0.1 * 1 / 19, abs=0.001), "20 s: a nineteenth of the way from 19 s to 38 s"
    assert told[OURS, 100]["over_script"] == {"identity": [pytest.approx(0.1), 0.0], "scene": [0.0, 0.0]}, "the same seeds stand beside each other"
    table = bench_likeness.table({"summary": summary})
    assert table.count("\n") == 5 and "| 85% (+10.0 ± 0.0) |" in table
    picture = ElementTree.fromstring(bench_likeness.plot({"summary": summary}))
    assert len(picture.findall("{*}polyline")) == 6


def test_there_are_eight_people_with_something_the_mini_model_never_saw():
    assert len(bench_likeness.PEOPLE) == 8
    for name in bench_likeness.PEOPLE:
        who = (people.HELD_OUT | people.MORE)[name]
        assert any(value in world.values(attribute, held_out=True) for attribute, value in who.items())
        assert all(value in world.values(attribute) for attribute, value in who.items())


def test_no_two_trainings_share_a_seed():
    seeds = [seed for name in bench_likeness.PEOPLE for seed in bench_likeness.seeds_of(name, 3)]
    assert len(set(seeds)) == 24
    assert bench_likeness.seeds_of("bo", 3)[:1] == bench_likeness.seeds_of("bo", 1), "what has been trained with fewer seeds is of use for more"


def test_people_that_there_are_not_are_named():
    done = CliRunner().invoke(bench_choices.bench, ["--people", "ada,zoe"])
    assert done.exit_code == 2 and "nobody is called zoe" in done.output, done.output


def test_a_rate_that_falls_to_the_end_is_measured_for_one_number_of_steps(tmp_path: Path):
    recipe = tmp_path / "linear.yaml"
    recipe.write_text("lr_scheduler: linear\n", encoding="utf-8")
    done = CliRunner().invoke(bench_likeness.bench, ["--people", "di", "--steps", "2,4", "--recipe", str(recipe), "--work", str(tmp_path / "work")])
    assert done.exit_code == 2 and "give --steps one" in done.output, done.output


@pytest.mark.slow
def test_both_arms_train_and_what_is_done_is_not_done_again(tmp_path: Path):
    arguments = ["--people", "di", "--seeds", "1", "--steps", "2,4", "--scenes", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    for _ in range(2):
        done = CliRunner().invoke(bench_likeness.bench, arguments)
        assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out.json").read_text())
    assert [(row["arm"], row["steps"]) for row in record["rows"]] == [(OURS, 2), (OURS, 4), (PEER, 2), (PEER, 4)]
    assert all(0 <= row[what] <= 1 for row in record["rows"] for what in ("identity", "scene", "bleed")) and (tmp_path / "out.svg").exists()


def test_each_choice_is_a_row_beside_the_recipe(tmp_path: Path):
    found = [{"choice": "" if row["arm"] == OURS else "lora_rank=4", **row} for row in rows()]
    summary = bench_choices.summary(found, ("", "lora_rank=4"), [100, 200])
    assert [(row["choice"], row["steps"]) for row in summary] == [("the recipe", 100), ("the recipe", 200), ("lora_rank=4", 100), ("lora_rank=4", 200)]
    assert summary[0]["identity"] == pytest.approx(0.85) and not summary[0]["over_recipe"]
    assert summary[2]["over_recipe"] == {"identity": [pytest.approx(-0.1), 0.0], "scene": [0.0, 0.0], "bleed": [0.0, 0.0]}
    told = bench_choices.table({"summary": summary}).splitlines()
    assert len(told) == 4 and all(line.count("|") == 9 for line in told) and "| 75% (-10.0 ± 0.0) |" in told[3], told
    assert bench_choices.parsed("lora_rank=4 seed=1") == {"lora_rank": "4", "seed": "1"}


def test_every_choice_that_the_benchmark_tries_is_one_of_the_recipe():
    for choice in bench_choices.CHOICES:
        bench_likeness.mini_recipe(None, bench_choices.parsed(choice))


def test_both_arms_are_given_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = {}

    def arm(name: str):
        return lambda who, seed, marks, folder, recipe: seen.update({name: recipe.learning_rate}) or iter(())

    monkeypatch.setattr(bench_likeness, "ARMS", {OURS: arm(OURS), PEER: arm(PEER)})
    changed = tmp_path / "recipe.yaml"
    changed.write_text((RECIPES / "mini.yaml").read_text().replace("learning_rate: 1.5e-3", "learning_rate: 1.0e-3"))
    recipes, work = [bench_likeness.mini_recipe(file, {}) for file in (None, changed)], tmp_path / "work"
    work.mkdir()
    for recipe in recipes:
        for name in (OURS, PEER):
            bench_likeness.measure(work, name, "ada", 0, [1], 1, recipe)
    assert seen == {OURS: 1e-3, PEER: 1e-3} and recipes[0].learning_rate == 1.5e-3
    assert len(list(work.iterdir())) == 4, "what was kept of one recipe is not taken for the other's"
