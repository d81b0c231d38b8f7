"""The command line's promises: quick, helpful, and never a traceback for a problem the user can solve."""

import errno
import importlib.util
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pytest
from PIL import Image

from lorabooth import cli
from lorabooth.errors import UserError
from lorabooth.runs import write_durable

HEAVY = ("torch", "diffusers", "transformers", "pydantic", "huggingface_hub")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorabooth", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False)


def modules_after(arguments: list[str], **environment: str) -> set[str]:
    """Which heavy modules are loaded once the command line has run in a process of its own."""
    program = f"""
import contextlib, io, json, sys
from lorabooth.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main({arguments!r})
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | environment, check=True, timeout=120)
    return set(json.loads(done.stdout))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Puts a command `fail` into the table that raises what it is given."""

    def put(error: BaseException) -> None:
        @click.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(sys.modules[__name__], "fail", fail, raising=False)
        monkeypatch.setitem(cli.COMMANDS, "fail", (f"{__name__}:fail", "Fails."))

    return put


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "TOK", "--width", "100"),
        ("generate", "TOK", "--model", "mimi"),
        ("generate", "TOK", "--lora", "none"),
        ("grid", "TOK", "--lora", "none"),
        ("plan", "--model", "mimi"),
        ("loras", "info", "none"),
        ("reproduce", "none.png"),
    ],
    ids=" ".join,
)
def test_what_can_be_refused_at_once_waits_for_no_imports(arguments: tuple[str, ...]):
    assert not modules_after(list(arguments)) & {"torch", "diffusers", "transformers"}


def test_the_libraries_are_set_apart_from_garbage_once_and_a_terminal_is_told_what_is_waited_for():
    program = """
import gc, io, sys, types
from lorabooth.imports import heavy_imports

class Terminal(io.StringIO):
    def isatty(self):
        return True

sys.stderr = Terminal()
for _ in range(2):
    with heavy_imports():
        assert not gc.isenabled()
        sys.modules["torch"] = types.ModuleType("torch")
    print(gc.isenabled(), gc.get_freeze_count() > 0)
    gc.unfreeze()
print(repr(sys.stderr.getvalue()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    first, later, told = done.stdout.splitlines()
    assert (first, later) == ("True True", "True False"), "what is alive later is not set apart"
    assert told == repr("loading torch, diffusers and transformers, some seconds ...\r\x1b[K")


def test_help_lists_every_command_and_imports_nothing_heavy():
    assert modules_after(["--help"]) == set()
    done = run("--help")
    assert done.returncode == 0
    for name, (_, line) in cli.COMMANDS.items():
        assert name in done.stdout and line in done.stdout


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "demo"])
def test_the_help_of_a_command_imports_neither_torch_nor_what_needs_it(command: str):
    assert not modules_after([command, "--help"]) & {"torch", "diffusers", "transformers"}


def test_completing_command_names_imports_nothing_heavy():
    # Not `sys.modules`: click ends the process after it has answered the shell.
    program = f"""
import atexit, sys
from lorabooth.cli import main
atexit.register(lambda: print([name for name in {HEAVY!r} if name in sys.modules]))
main([])
"""
    environment = os.environ | {"_LORABOOTH_COMPLETE": "bash_complete", "COMP_WORDS": "lorabooth do", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True, timeout=120)
    assert done.stdout.split() == ["plain,doctor", "[]"]


def test_version():
    assert run("--version").stdout.startswith("lorabooth 0.")


def test_no_command_shows_the_help():
    done = run()
    assert done.returncode == 2
    assert "Commands:" in done.stderr


def test_misspelt_command_names_the_nearest():
    done = run("doctr")
    assert done.returncode == 2
    assert "doctor" in done.stderr and "Traceback" not in done.stderr


def test_misspelt_option_names_the_nearest():
    done = run("doctor", "--jsno")
    assert done.returncode == 2
    assert "--json" in done.stderr and "lorabooth doctor --help" in done.stderr


def test_missing_argument_is_one_sentence_and_one_hint():
    done = run("completion")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2


def test_user_error_is_a_message_and_a_hint(failing, capsys):
    failing(UserError("there are no photos in it.zip", hint="put at least one JPEG in"))
    assert cli.main(["fail"]) == 2
    assert capsys.readouterr().err == "lorabooth: there are no photos in it.zip\n  put at least one JPEG in\n"


def test_developers_can_ask_for_the_traceback(failing, capsys, monkeypatch):
    monkeypatch.setenv("LORABOOTH_TRACEBACK", "1")
    failing(UserError("no photos"))
    assert cli.main(["fail"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full: /somewhere/file"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.ESTALE, "the network disk no longer has this file: /somewhere/file"),
    ],
)
def test_failures_of_the_machine_are_explained(failing, capsys, code, words):
    failing(OSError(code, os.strerror(code), "/somewhere/file"))
    assert cli.main(["fail"]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize("fault", [OSError(errno.EBADF, "bad file descriptor"), ValueError("a fault of ours")])
def test_faults_of_the_program_keep_their_traceback(failing, fault):
    failing(fault)
    with pytest.raises(type(fault)):
        cli.main(["fail"])


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), click.Abort()])
def test_interruption_says_how_to_go_on(failing, capsys, interruption):
    failing(interruption)
    assert cli.main(["fail"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_real_ctrl_c_ends_the_process_with_130(tmp_path: Path):
    (tmp_path / "sleeper.py").write_text("import time, click\n@click.command()\ndef sleep():\n    print('asleep', flush=True)\n    time.sleep(60)\n")
    # A shell's background job, as CI may be, ignores SIGINT and so do its children.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{listening}; import sys; from lorabooth import cli; cli.COMMANDS['sleep'] = ('sleeper:sleep', 'Sleeps.'); sys.exit(cli.main(['sleep']))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said and "Traceback" not in said


def test_a_closed_pipe_is_no_traceback():
    process = subprocess.Popen([sys.executable, "-m", "lorabooth", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.wait(timeout=60)
    assert said == ""


@pytest.mark.parametrize("command", [["--help"], ["loras"]])
def test_an_output_that_was_closed_before_the_start_is_no_traceback(command: list[str], tmp_path: Path):
    arguments = shlex.join([sys.executable, "-m", "lorabooth", *command])
    done = subprocess.run(["sh", "-c", f"{arguments} >&-"], stderr=subprocess.PIPE, text=True, timeout=120, env=os.environ | {"HF_HOME": str(tmp_path)})
    assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr


def test_a_closed_standard_error_and_a_name_that_is_no_text_cost_no_picture(tmp_path: Path):
    """What is opened next would have the closed one's number, so that the decoder's answers went where its noise goes."""
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "start.png")
    picture = ["generate", "a person", "--model", "mini", "--steps", "2", "--width", "64", "--image", str(tmp_path / "start.png"), "--out", str(tmp_path)]
    arguments = shlex.join([sys.executable, "-m", "lorabooth", *picture]) + "/out$(printf '\\377')"
    done = subprocess.run(["sh", "-c", f"{arguments} 2>&-"], stdout=subprocess.PIPE, timeout=120, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and done.stdout.strip() == bytes(tmp_path) + b"/out\xff/out-0.webp" and Path(os.fsdecode(done.stdout.strip())).exists()


def test_no_folder_for_temporary_files_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    assert cli.guarded(lambda _: tempfile.mkdtemp() and None, []) == 2
    assert capsys.readouterr().err == "lorabooth: there is no folder for temporary files that can be written to\n  set TMPDIR to one\n"


def test_a_file_that_may_not_grow_is_one_sentence(capsys):
    def work(arguments: list[str]) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            write_durable(Path(arguments[0]), bytes(2000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with tempfile.TemporaryDirectory() as folder:
        assert cli.guarded(work, [f"{folder}/large"]) == 2 and not os.listdir(folder)
    assert capsys.readouterr().err.startswith(f"lorabooth: a file grew larger than the disk or ulimit -f allows: {folder}/large\n  raise that limit")


def test_other_entry_points_are_guarded_too(capsys):
    def work(arguments: list[str]) -> None:
        raise UserError(f"no stage {arguments[0]}")

    assert cli.guarded(work, ["dance"]) == 2
    assert capsys.readouterr().err == "lorabooth: no stage dance\n"


def test_exit_codes_of_commands_reach_the_shell(monkeypatch):
    @click.command()
    @click.pass_context
    def three(ctx: click.Context) -> None:
        ctx.exit(3)

    monkeypatch.setattr(sys.modules[__name__], "three", three, raising=False)
    monkeypatch.setitem(cli.COMMANDS, "three", (f"{__name__}:three", "Three."))
    assert cli.main(["three"]) == 3


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_and_how_to_keep_it(shell):
    done = run("completion", shell)
    assert done.returncode == 0
    assert "_LORABOOTH_COMPLETE" in done.stdout
    assert f"lorabooth completion {shell} >" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(name):
    module = cli.COMMANDS[name][0].split(":")[0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    done = run(name, "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout and f"lorabooth {name}" in done.stdout


def test_threads_sleep_where_they_would_spin_unless_the_user_says_otherwise():
    program = "import os; from lorabooth.cli import guarded; guarded(lambda _: print(os.environ['GOMP_SPINCOUNT']), [])"
    for given, seen in ((None, "1000"), ("7", "7")):
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | ({"GOMP_SPINCOUNT": given} if given else {})
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == seen


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("TORCH_LOGS", "garbage", "torch cannot be imported with TORCH_LOGS=garbage"), ("PYTHONOPTIMIZE", "2", "Python runs without docstrings")],
)
@pytest.mark.parametrize(
    "command", [["plan"], ["generate", "a person", "--model", "mini"], ["train", "PHOTOS", "--trigger", "TOK", "--model", "mini"]], ids=" ".join
)
def test_a_variable_with_which_no_model_can_be_loaded_is_named_at_once(command: list[str], name: str, value: str, said: str, demo_photos: Path, tmp_path: Path):
    arguments = [str(demo_photos) if word == "PHOTOS" else word for word in command] + ([] if command == ["plan"] else ["--out", str(tmp_path / "out")])
    done = run(*arguments, **{name: value})
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"lorabooth: {said}") and len(done.stderr.splitlines()) == 2, done.stderr
    assert not (tmp_path / "out").exists() and run("--help", **{name: value}).returncode == 0


def test_windows_is_sent_to_wsl_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.main(["doctor"]) == 2
    assert "WSL 2" in capsys.readouterr().err


def completed(line: str) -> list[str]:
    """What the shell is told for a line of which the last word is being typed, and whether torch was loaded for it."""
    program = "import atexit, sys\nfrom lorabooth.cli import main\natexit.register(lambda: print('torch' in sys.modules))\nmain([])"
    environment = os.environ | {"_LORABOOTH_COMPLETE": "bash_complete", "COMP_WORDS": f"lorabooth {line}", "COMP_CWORD": str(len(line.split(" ")))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True, timeout=120)
    *answers, torch_is_loaded = done.stdout.splitlines()
    assert torch_is_loaded == "False"
    return answers


@pytest.mark.parametrize(
    "line",
    [
        "generate TOK --lora runs/TO", "grid TOK --lora runs/TO", "reproduce a.png --lora runs/TO", "diff a runs/TO", "diff runs/TO", "convert runs/TO",
        "convert a runs/TO", "loras info runs/TO", "pull runs/TO", "pull a --out runs/TO", "generate TOK --out runs/TO",
    ],
)  # fmt: skip
def test_where_a_lora_or_a_path_is_wanted_the_shell_completes_files(line: str):
    assert completed(line) == ["file,runs/TO"]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("train p --optimizer ada", ["adamw8bit", "adamw", "adam8bit", "adam", "adagrad", "adafactor"]),
        ("train p --subject o", ["object"]),
        ("check p --subject s", ["style"]),
        ("plan --precision n", ["nf4"]),
        ("train p --lr-scheduler co", ["constant", "cosine"]),
        ("train p --targets a", ["attention", "attention+ff", "all-linear"]),
        ("train p --gradient-checkpointing a", ["auto", "all"]),
        ("train p --trackers w", ["wandb"]),
        ("train p --model m", ["mini"]),
        ("generate TOK --model b", ["black-forest-labs/FLUX.1-dev"]),
        ("generate TOK --template he", ["headshot"]),
        ("generate TOK --aspect-ratio 16", ["16:9"]),
    ],
)
def test_values_that_have_names_are_completed(line: str, values: list[str]):
    assert completed(line) == [f"plain,{value}" for value in values]


def test_a_base_model_may_be_a_folder():
    assert completed("train p --model ./fl") == ["dir,./fl"]


def test_a_wrong_value_of_a_setting_is_refused_in_the_words_of_a_recipe(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "photos", "--trigger", "TOK", "--optimizer", "sgd"]) == 2
    assert capsys.readouterr().err.startswith("lorabooth: optimizer: should be 'auto', 'adamw8bit'")


@pytest.mark.parametrize(
    "command",
    [
        "demo --out",
        "train p --trigger TOK --out",
        "generate TOK --out",
        "grid TOK --out",
        "pull a --out",
        "convert a --format kohya --out",
        "check p --fix",
        "train",
    ],
)
def test_an_empty_path_is_no_folder(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), ""]) == 2
    assert "it is empty" in capsys.readouterr().err and not list(tmp_path.iterdir())
