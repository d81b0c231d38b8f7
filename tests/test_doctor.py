"""The doctor tells facts, problems and ways out; it needs no network and shows no token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorabooth import doctor, machine

CANARY = "hf_secret_canary"
CUDA_TORCH = machine.Torch(version="2.13.0", cuda="13.0")
H200 = machine.Gpu("NVIDIA H200", "9.0", total_bytes=140 * 2**30, free_bytes=139 * 2**30, bf16=True, fp8=True)

# Run in the doctor's process before anything else: whoever opens a connection or asks a name server fails loudly.
NO_NETWORK = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("the doctor used the network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from lorabooth.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run_doctor(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    command = [sys.executable, "-c", NO_NETWORK, "doctor", *arguments]
    variables = clean | {"HF_HOME": str(folder)} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, check=False)


def facts(torch: machine.Torch, driver: machine.Driver | None = None, **libraries: str | None) -> machine.Machine:
    """This machine with another torch, driver or library."""
    installed = {requirement.name: machine.installed_version(requirement.name) for requirement in machine.requirements()}
    return machine.Machine("3.11.9", "Linux", 8, 32 * 2**30, 16 * 2**30, driver or machine.Driver(None), torch, installed | libraries)


def test_json_is_for_programs_and_needs_no_network(tmp_path: Path):
    done = run_doctor(tmp_path, "--json", HF_TOKEN=CANARY)
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert set(findings) == {
        *("lorabooth", "python", "platform", "cpu_cores", "memory_total_bytes", "memory_available_bytes", "driver", "torch"),
        *("libraries", "optional", "disk", "hub_login", "models", "can", "problems"),
    }
    assert findings["memory_total_bytes"] >= findings["memory_available_bytes"] > 0
    assert findings["torch"]["version"].startswith(findings["libraries"]["torch"]), "torch of the package index says which CUDA it is for in the latter only"
    assert findings["hub_login"] == "HF_TOKEN"
    assert CANARY not in done.stdout + done.stderr


def test_text_is_for_people_and_shows_no_token(tmp_path: Path):
    done = run_doctor(tmp_path, HF_TOKEN=CANARY)
    assert done.returncode == 0, done.stderr
    for words in ("torch", "CPU", "disk", "hub       token from HF_TOKEN", "This machine can", "roblems"):
        assert words in done.stdout
    assert CANARY not in done.stdout + done.stderr


def test_login_kept_in_a_file_is_found_and_not_shown(tmp_path: Path):
    assert json.loads(run_doctor(tmp_path, "--json").stdout)["hub_login"] is None
    (tmp_path / "token").write_text(CANARY)
    done = run_doctor(tmp_path, "--json")
    assert json.loads(done.stdout)["hub_login"] == str(tmp_path / "token")
    assert CANARY not in done.stdout + done.stderr


def test_missing_and_old_libraries_are_essential():
    missing, old = doctor.library_problems(facts(CUDA_TORCH, peft=None, pillow="11.0.0"))
    assert missing.what == "peft is not installed" and "pip install" in missing.fix and missing.essential
    assert old.what.startswith("pillow 11.0.0 is installed") and old.essential


def test_torch_that_cannot_be_imported_is_essential():
    (problem,) = doctor.library_problems(facts(machine.Torch(version="2.13.0", error="OSError: libcudart.so.13")))
    assert problem.essential and "libcudart" in problem.what and problem.fix.endswith("--force-reinstall torch")


@pytest.mark.parametrize(
    ("name", "value", "what", "fix"),
    [
        ("TORCH_LOGS", "garbage", "torch cannot be imported: ValueError: Invalid log settings: garbage", "unset TORCH_LOGS"),
        ("PYTHONOPTIMIZE", "2", "Python runs without docstrings", "unset PYTHONOPTIMIZE"),
    ],
)
def test_a_variable_with_which_no_model_can_be_loaded_is_essential(tmp_path: Path, name: str, value: str, what: str, fix: str):
    done = run_doctor(tmp_path, "--json", **{name: value})
    [problem] = [problem for problem in json.loads(done.stdout)["problems"] if problem["essential"]]
    assert done.returncode == 1 and problem["what"].startswith(what) and problem["fix"].startswith(fix) and done.stderr == ""


def test_a_gpu_that_torch_cannot_use_is_explained(monkeypatch: pytest.MonkeyPatch):
    driver = machine.Driver("535.10", ("NVIDIA RTX A6000",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (cpu_build,) = doctor.gpu_problems(driver, machine.Torch(version="2.13.0+cpu"))
    assert "CPU build" in cpu_build.what
    (old_driver,) = doctor.gpu_problems(driver, CUDA_TORCH)
    assert "update the NVIDIA driver" in old_driver.fix and "13.0" in old_driver.fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (hidden,) = doctor.gpu_problems(driver, CUDA_TORCH)
    assert "CUDA_VISIBLE_DEVICES" in hidden.what


def test_a_gpu_without_bf16_is_named():
    turing = machine.Gpu("RTX 2080", "7.5", 8 * 2**30, 8 * 2**30, bf16=False, fp8=False)
    (problem,) = doctor.gpu_problems(machine.Driver("580.1", ("RTX 2080",)), machine.Torch("2.13.0", "13.0", (turing,)))
    assert "RTX 2080" in problem.what and "8.0" in problem.fix


def test_gated_model_and_full_disk_matter_only_with_a_gpu():
    places = {name: {"path": "/cache", "free_bytes": 10 * 10**9} for name in ("current folder", "model cache")}
    models = {"mini": "present", doctor.FLUX_DEV: "absent"}
    assert doctor.place_problems(machine.Torch("2.13.0"), places, models, None) == []
    login, room = doctor.place_problems(machine.Torch("2.13.0", "13.0", (H200,)), places, models, None)
    assert "hf auth login" in login.fix and "34 GB" in room.what


def test_abilities_follow_the_gpu():
    models = {"mini": "present", doctor.FLUX_DEV: "absent"}
    assert len(doctor.abilities(facts(machine.Torch("2.13.0+cpu")), models)) == 1
    assert any("FLUX.1-dev" in sentence for sentence in doctor.abilities(facts(machine.Torch("2.13.0", "13.0", (H200,))), models))


def test_flux_in_the_cache_is_told_from_a_partial_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert doctor.flux_dev_in_cache() == "absent"
    repository = tmp_path / "models--black-forest-labs--FLUX.1-dev"
    snapshot = repository / "snapshots" / "abc"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    index = json.dumps({"weight_map": {"a.weight": "shard-1.safetensors"}})
    for name in (*doctor.FLUX_DEV_FILES, *doctor.FLUX_DEV_INDEXES):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(index)
    (snapshot / "text_encoder_2" / "shard-1.safetensors").write_text("weights")
    assert doctor.flux_dev_in_cache() == "partial"
    (snapshot / "transformer" / "shard-1.safetensors").write_text("weights")
    assert doctor.flux_dev_in_cache() == "complete"
    for damaged in ("", "{bad", "{}", "[]"):
        (snapshot / doctor.FLUX_DEV_INDEXES[0]).write_text(damaged)
        assert doctor.flux_dev_in_cache() == "partial"


def test_disk_space_of_a_folder_that_does_not_exist_yet(tmp_path: Path):
    assert machine.disk_free_bytes(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize(
    ("script", "driver"),
    [
        ("echo '580.82.07, NVIDIA H200'; echo '580.82.07, NVIDIA H200'", machine.Driver("580.82.07", ("NVIDIA H200", "NVIDIA H200"))),
        ("echo 'NVIDIA-SMI has failed'; exit 9", machine.Driver(None, error="NVIDIA-SMI has failed")),
    ],
)
def test_the_driver_is_asked_through_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, driver: machine.Driver):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.nvidia_driver() == driver


@pytest.mark.parametrize(
    ("kind", "limit", "used", "idle"),
    [("0::", "memory.max", "memory.current", "inactive_file"), ("4:cpu,memory:", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")],
)
def test_a_container_or_job_has_no_more_memory_than_the_tightest_limit_above_it(
    kind: str, limit: str, used: str, idle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path if kind == "0::" else tmp_path / "memory"
    (root / "slurm" / "job_7" / "step_0").mkdir(parents=True)
    (tmp_path / "own").write_text(f"9:name=systemd:/elsewhere\n{kind}/slurm/job_7/step_0\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    for folder, allowed in ((root, "9000000"), (root / "slurm" / "job_7", "1000000"), (root / "slurm" / "job_7" / "step_0", "max")):
        (folder / limit).write_text(f"{allowed}\n")
        (folder / used).write_text("700000\n")
        (folder / "memory.stat").write_text(f"anon 1\n{idle} 200000\n")
    assert machine.memory_bytes() == (1_000_000, 500_000)
    (root / "slurm" / "job_7" / limit).write_text("max\n")
    assert machine.memory_bytes() == (9_000_000, 8_500_000)
    (root / limit).unlink()
    assert machine.memory_bytes()[0] > 9_000_000
