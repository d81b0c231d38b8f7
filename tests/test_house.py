"""Rules of the house that no linter knows."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
DECLARED = [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]

# The oldest versions without known security holes in what we use of them.
SECURITY_FLOORS = {"pillow": "12.3", "diffusers": "0.38", "transformers": "5.5"}

# Written apart, so that this file does not find itself.
MACHINE_PATHS = (b"/wo" + b"rk/", b"/fa" + b"rm/", b"/ro" + b"ot/")


def repository_files() -> list[Path]:
    """What git knows or would add; none outside a clone."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / name for name in answer.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("dependency", DECLARED)
def test_every_dependency_has_its_reason_above_it(dependency: str):
    lines = PYPROJECT.splitlines()
    places = [number for number, line in enumerate(lines) if line.strip() == f'"{dependency}",']
    assert places, f"{dependency} needs a line of its own in pyproject.toml"
    assert all(lines[number - 1].strip().startswith("# ") for number in places), f"say above {dependency} what it is for"


@pytest.mark.parametrize(("name", "floor"), SECURITY_FLOORS.items())
def test_security_floors(name: str, floor: str):
    (declared,) = [Requirement(line) for line in DECLARED if Requirement(line).name == name]
    assert not declared.specifier.contains("0.1") and any(part.operator == ">=" and part.version == floor for part in declared.specifier)


NEWEST_TRIED = {"torch": "2.14"}
"""Where that is not the version that is installed."""


def test_the_large_libraries_stop_at_the_tested_minor_version():
    """A release after the tested one broke a fresh install once."""
    tested = re.findall(r" ([a-z]+)==([0-9.]+)", (ROOT / "Dockerfile.cuda").read_text(encoding="utf-8"))
    assert {name for name, _ in tested} >= {"torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes"}
    for name, version in tested:
        (declared,) = [Requirement(line) for line in DECLARED if Requirement(line).name == name]
        major, minor = (int(part) for part in NEWEST_TRIED.get(name, version).split(".")[:2])
        assert declared.specifier.contains(version) and not declared.specifier.contains(f"{major}.{minor + 1}.0")


def test_an_installed_wheel_has_its_recipes(tmp_path: Path):
    """What pyproject.toml tells hatch to put into the wheel, without the mini model's weights; hatch itself is where wheels are built."""
    wheel = tomllib.loads(PYPROJECT)["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in {name: name for name in wheel["packages"]}.items() | wheel.get("force-include", {}).items():
        shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__", "model"), dirs_exist_ok=True)
    script = "from train.command import recipe_config; print(recipe_config(None, {'model': 'mini', 'trigger_word': 'TOK'}).train_text_encoder)"
    made = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert made.stdout == "True\n", made.stderr


def test_an_upload_to_the_index_is_refused():
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]


def test_makefile_has_the_documented_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*##", makefile, flags=re.MULTILINE))
    assert targets == {"help", "demo", "test", "check", "format", "clean"}


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    files = repository_files()
    if not files:
        pytest.skip("not a git clone")
    found = [str(file.relative_to(ROOT)) for file in files if any(path in file.read_bytes() for path in MACHINE_PATHS)]
    assert found == []
