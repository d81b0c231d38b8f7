"""Training on several GPUs and machines: two real processes here; SLURM and more GPUs than none cannot exist here and are stubs that record."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from lorabooth.cli import main
from lorabooth.runs import RunDir
from tests.test_processes import terminated, torchrun
from train.checkpoint import verified

ROOT = Path(__file__).parent.parent


@pytest.mark.slow  # the next test starts the same processes
def test_the_whole_command_trains_in_two_processes(tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = RunDir(tmp_path / "run")
    assert main([*tiny_command, "--batch-size", "1", "--launch", shlex.join(torchrun()), "--out", str(run.path)]) == 0
    assert run.lora.exists() and [row["step"] for row in run.history() if "loss" in row] == [1, 2, 3, 4]


def test_a_sigterm_to_the_command_reaches_both_and_is_saved(tiny_command: list[str], tmp_path: Path):
    run = RunDir(tmp_path / "run")
    long = [
        "--batch-size",
        "1",
        "--steps",
        "9999",
        "--checkpoint-every",
        "9999",
        "--preview-every",
        "0",
        "--launch",
        shlex.join(torchrun()),
        "--out",
        str(run.path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "lorabooth", *tiny_command, *long], stderr=subprocess.PIPE, text=True, env=environment)
    said = terminated(process, run)
    assert process.returncode == 130 and "run the same command again" in said, said
    [checkpoint] = run.checkpoints.iterdir()
    assert verified(checkpoint)


def test_a_launcher_that_is_not_there_is_named(tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*tiny_command, "--launch", "nosuchthing -n 2", "--out", str(tmp_path / "run")]) == 2
    assert "--launch nosuchthing -n 2: there is no command nosuchthing" in capsys.readouterr().err
    assert main([*tiny_command, "--launch", "'accelerate launch", "--out", str(tmp_path / "run")]) == 2
    assert "a quote in it is not closed" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_rank_that_a_container_left_behind_is_not_heeded_by_a_training_of_one_process(tiny_command: list[str], tmp_path: Path):
    left = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    command = [sys.executable, "-m", "lorabooth", *tiny_command, "--preview-every", "0", "--out", str(tmp_path / "run")]
    said = subprocess.run(command, env=os.environ | left, capture_output=True, text=True, check=True, timeout=120).stderr
    assert "note: RANK, LOCAL_RANK, WORLD_SIZE in the environment: not heeded" in said and (tmp_path / "run" / "lora.safetensors").exists()


@pytest.mark.parametrize("left", [{"RANK": "1", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "3"}], ids=str)
def test_one_of_several_processes_with_no_place_to_meet_is_told_so(tiny_run: Path, left: dict[str, str]):
    stage = [sys.executable, "-m", "train", "fit", str(tiny_run)]
    done = subprocess.run(stage, env=os.environ | left, capture_output=True, text=True, check=False, timeout=120)
    names = list(left)
    assert done.returncode == 2 and done.stderr == (
        f"lorabooth: {', '.join(names)} in the environment, as of one of several processes, but no MASTER_ADDR\n  unset {' '.join(names)}\n"
    )


@pytest.mark.parametrize(("name", "machines", "kind"), [("ddp", 1, "MULTI_GPU"), ("fsdp2", 1, "FSDP"), ("two_nodes", 2, "MULTI_GPU")])
def test_accelerate_reads_the_shipped_configs(name: str, machines: int, kind: str):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.num_machines == machines and config.mixed_precision == "no" and str(config.distributed_type).endswith(kind)


DOCTOR = """[ "$1" != doctor ] || {{ for ((i = 0; i < {gpus}; i++)); do echo '"compute_capability": "8.9",'; done; exit; }}\n"""
"""What `lorabooth doctor --json` says on a machine with GPUs, as far as that is asked for."""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder of commands that write down how they were called; srun goes on to what it was told to start, on the second of two nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    record = f'#!/usr/bin/env bash\n{sys.executable} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@" > "{tmp_path}/$(basename "$0").json"\n'
    commands = {
        "lorabooth": record.replace("\n", "\n" + DOCTOR.format(gpus=3), 1),
        "accelerate": record,
        "scontrol": "#!/usr/bin/env bash\nprintf 'first\\nsecond\\n'\n",
        "srun": '#!/usr/bin/env bash\nshift\nSLURM_NODEID=1 exec "$@"\n',
    }
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def called(folder: Path, name: str) -> list[str]:
    return json.loads((folder / f"{name}.json").read_text())


def launched(script: str, stubs: Path, **environment: str) -> tuple[list[str], list[str]]:
    """What a launcher calls lorabooth with, and then what accelerate is called with by the training stage."""
    variables = os.environ | environment | {"PATH": f"{stubs}:{os.environ['PATH']}"}
    subprocess.run([ROOT / "scripts" / "launch" / script, "my photos.zip", "--trigger", "TOK"], env=variables, check=True, timeout=60)
    arguments = called(stubs.parent, "lorabooth")
    starter = shlex.split(arguments[arguments.index("--launch") + 1])
    subprocess.run([*starter, "-m", "train", "fit", "a run"], env=variables, check=True, timeout=60)
    return arguments, called(stubs.parent, "accelerate")


def test_a_workstation_trains_on_all_its_gpus(stubs: Path):
    command, accelerate = launched("workstation.sh", stubs)
    assert command[:4] == ["train", "my photos.zip", "--trigger", "TOK"]
    config = str(ROOT / "configs" / "accelerate" / "ddp.yaml")
    assert accelerate == ["launch", "--config_file", config, "--num_processes", "3", "-m", "train", "fit", "a run"]


def test_a_workstation_without_a_gpu_is_told_so(stubs: Path):
    (stubs / "lorabooth").write_text("#!/usr/bin/env bash\n" + DOCTOR.format(gpus=0))
    variables = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}"}
    ended = subprocess.run([ROOT / "scripts" / "launch" / "workstation.sh", "photos.zip"], env=variables, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "torch sees no GPU here" in ended.stderr and not (stubs.parent / "lorabooth.json").exists()


def test_slurm_starts_every_node_with_its_own_number_and_ends_the_steps_not_srun(stubs: Path):
    assert "#SBATCH --signal=TERM@" in (ROOT / "scripts" / "launch" / "slurm.sbatch").read_text(), "srun would kill its tasks"
    command, accelerate = launched("slurm.sbatch", stubs, SLURM_JOB_NODELIST="x", SLURM_GPUS_ON_NODE="4", SLURM_NNODES="2", SLURM_JOB_ID="100123")
    assert command[:4] == ["train", "my photos.zip", "--trigger", "TOK"]
    assert accelerate[-4:] == ["-m", "train", "fit", "a run"]
    options = dict(zip(accelerate[2:-4:2], accelerate[3:-4:2], strict=True))
    assert accelerate[:2] == ["launch", "--multi_gpu"] and options == {
        "--mixed_precision": "no",
        "--num_machines": "2",
        "--num_processes": "8",
        "--machine_rank": "1",
        "--main_process_ip": "first",
        "--main_process_port": "10123",
    }
