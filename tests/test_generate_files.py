"""What `generate` reads and where it writes: nothing is overwritten, nothing half done is left, and what is no file is not read for ever."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from test_generate import FAST, PROMPT, one_problem

from infer import picture
from infer.request import size_like
from infer.writing import Numbers
from lorabooth.cli import main

# Written


def test_two_commands_into_one_folder_overwrite_nothing(tmp_path: Path):
    both = [Numbers(tmp_path, "png") for _ in range(2)]  # both have seen that the folder is empty
    written: list[tuple[Path, bytes]] = []

    def write(index: int) -> None:
        for i in range(50):
            data = f"{index}/{i}".encode()
            written.append((both[index].write(data), data))

    threads = [threading.Thread(target=write, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({file for file, _ in written}) == 100 and all(file.read_bytes() == data for file, data in written)
    assert sorted(tmp_path.iterdir()) == sorted(file for file, _ in written)


def test_numbers_go_on_behind_pictures_of_any_format(tmp_path: Path):
    for name in ("out-0.webp", "out-7.jpg", "out-x.png", "out-99999999999.png", "contact-sheet.png"):
        (tmp_path / name).touch()
    assert Numbers(tmp_path, "png").take().name == "out-8.png"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)], ids=["Ctrl-C", "kill", "a cluster"])
def test_an_interrupted_command_leaves_what_is_finished_and_nothing_else(number: signal.Signals, code: int, tmp_path: Path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "lorabooth", "generate", "a person", "--model", "mini", "-n", "64", "--live", "--format", "png", "--out", str(out)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"TQDM_MININTERVAL": "0"},
        preexec_fn=lambda: [signal.signal(kind, signal.SIG_DFL) for kind in (signal.SIGINT, signal.SIGTERM)],
    )  # fmt: skip
    assert process.stderr
    said = ""
    while not re.search(r" 40/1792", said):  # one picture is done, and the next has begun
        character = process.stderr.read(1)
        assert character, said
        said += character
    assert (out / "live.png").exists()
    process.send_signal(number)
    rest = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in rest
    assert (f"interrupted; the pictures that were finished are in {out}" in rest) == (number == signal.SIGINT)
    left = sorted(out.iterdir())
    assert left and all(re.fullmatch(r"out-\d+\.png", file.name) for file in left)
    assert all(picture.making_of(file) for file in left)


def test_an_interruption_while_libraries_are_loaded_does_not_promise_to_go_on(tmp_path: Path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "lorabooth", "generate", "a person", "--model", "mini", "--out", str(out)],
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while "libbitsandbytes" not in maps.read_text():  # torch is there, and diffusers half
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1]
    assert "Traceback" not in rest and "to go on" not in rest and "interrupted; no picture was finished" in rest
    assert process.returncode in (130, -signal.SIGINT)  # the latter of Python, where it came amid an `exec` of text (making a dataclass)


@pytest.mark.parametrize(("out", "words"), [("loop/x", "a link to itself"), ("/proc/x", "no such file"), ("/dev/null/x", "a file, not a folder")])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_drawn(out: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "loop").symlink_to("loop")
    assert main(["generate", PROMPT, *FAST, "--out", str(tmp_path / out)]) == 2
    assert words in one_problem(capsys)


def test_a_contact_sheet_that_has_no_room_costs_no_name_of_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        assert main(["generate", "a person", *FAST, "-n", "3", "--out", str(tmp_path)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    answer = capsys.readouterr()
    assert answer.out.split() == [str(tmp_path / f"out-{i}.webp") for i in range(3)]
    assert f"allows: {tmp_path / 'contact-sheet.png'}" in answer.err and "Traceback" not in answer.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out-0.webp", "out-1.webp", "out-2.webp"]


def test_a_picture_that_has_no_room_costs_no_name_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    write = Numbers.write

    def fill(numbers: Numbers, data: bytes) -> Path:
        if (tmp_path / "out-0.webp").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(numbers.take()))
        return write(numbers, data)

    monkeypatch.setattr(Numbers, "write", fill)
    assert main(["generate", "a person", *FAST, "-n", "3", "--out", str(tmp_path)]) == 2
    answer = capsys.readouterr()
    assert answer.out == f"{tmp_path / 'out-0.webp'}\n" and f"the disk is full: {tmp_path / 'out-1.webp'}\n" in answer.err
    assert [file.name for file in tmp_path.iterdir()] == ["out-0.webp"]


# Read


@pytest.mark.parametrize("option", ["--prompts", "--image", "--lora", "--wildcards"])
def test_what_is_no_file_is_not_read_for_ever(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [] if option == "--prompts" else [PROMPT]
    assert main(["generate", *words, *FAST, option, "/dev/zero", "--out", str(tmp_path / "out")]) == 2
    assert "/dev/zero" in one_problem(capsys)


def test_prompts_may_come_from_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reading, writing = os.pipe()
    os.write(writing, b"a person\na person, smiling\n")
    os.close(writing)
    assert main(["generate", "--prompts", f"/dev/fd/{reading}", *FAST, "--json", "--out", str(tmp_path)]) == 0
    os.close(reading)
    files = json.loads(capsys.readouterr().out)
    assert [file.get("contact_sheet", False) for file in files] == [False, False, True]


def test_a_picture_of_the_users_in_the_place_of_the_live_one_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "live.png").write_bytes(b"mine")
    assert main(["generate", "a person", *FAST, "--live", "--out", str(tmp_path)]) == 0
    assert "live-1.png" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["live.png", "out-0.webp"] and (tmp_path / "live.png").read_bytes() == b"mine"


def test_more_loras_than_a_picture_can_tell_of_are_refused(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("generate", "grid"):
        assert main([command, "TOK", *(f"--lora={tiny_run}",) * 33, "--out", str(tmp_path / "out")]) == 2
        assert "33 LoRAs are given; the limit is 32" in one_problem(capsys)


def test_an_earlier_contact_sheet_is_kept(tmp_path: Path):
    sheet, command = tmp_path / "contact-sheet.png", ["generate", "a person", *FAST, "-n", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    before = sheet.read_bytes()
    assert main(command) == main(command) == 0
    assert sheet.read_bytes() == before and sorted(file.name for file in tmp_path.glob("contact-sheet*")) == [
        "contact-sheet-1.png", "contact-sheet-2.png", "contact-sheet.png",
    ]  # fmt: skip


def test_a_panorama_to_start_from_becomes_as_large_as_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for size, expected in (((3000, 200), (1536, 96)), ((100, 400), (384, 1536)), ((4000, 20), (1536, 64)), ((600, 400), (1248, 832))):
        assert size_like(Image.new("RGB", size), "1", 1024) == expected
    Image.new("RGB", (3000, 200), "teal").save(tmp_path / "wide.png")
    arguments = ["--model", "mini", "--steps", "2", "--format", "png", "--image", str(tmp_path / "wide.png")]
    assert main(["generate", "a person", *arguments, "--out", str(tmp_path)]) == 0
    with Image.open(capsys.readouterr().out.strip()) as image:
        assert image.size == (496, 64)


def test_a_mask_may_be_of_another_size_and_not_of_another_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "start.png")
    for size in ((64, 64), (64, 32)):
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        mask.save(tmp_path / f"{size[1]}.png")
    start = ["generate", "a person", "--model", "mini", "--steps", "4", "--format", "png", "--image", str(tmp_path / "start.png"), "--out", str(tmp_path)]
    assert main([*start, "--mask", str(tmp_path / "64.png")]) == 0
    with Image.open(capsys.readouterr().out.strip()) as image:
        made = np.asarray(image)
    assert (made[:, 66:] == noise[:, 66:]).all() and (made[:, :60] != noise[:, :60]).mean() > 0.9
    assert main([*start, "--mask", str(tmp_path / "32.png")]) == 2
    assert "another shape than the picture: width / height is 2.00 and 1.00" in one_problem(capsys)


# What files of strangers ask for


def of_base(run: Path, file: Path, base: str) -> str:
    """The LoRA of a run, saying that it was trained on another base."""
    save_file(load_file(run / "lora.safetensors"), file, {"lorabooth.base": base})
    return str(file)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("somebody/flux", "say so: --model somebody/flux"),
        ("black-forest-labs/../../etc", "name cannot be used"),
        ("x" * 50_000 + "/y", "name cannot be used"),
        ("\x1b[31m", "name cannot be used"),
        ("a-folder", "say where it is with --model FOLDER"),
    ],
    ids=["somebody's", "a path", "long", "an escape", "a folder"],
)
def test_a_base_that_a_file_names_is_loaded_only_where_everybody_knows_it(
    base: str, words: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora = of_base(tiny_run, tmp_path / "a.safetensors", base)
    for command in ("generate", "grid"):
        assert main([command, PROMPT, "--lora", lora, *FAST[2:], "--out", str(tmp_path / "out")]) == 2
        said = one_problem(capsys)
        assert words in said and len(said) < 600
    assert main(["generate", PROMPT, "--lora", lora, *FAST, "--out", str(tmp_path / "out")]) == 0


def test_the_filter_reports_to_nobody(tmp_path: Path):
    code = "from infer.filter import ContentFilter; from PIL import Image; print(ContentFilter().score(Image.new('RGB', (64, 64))))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment | {"HOME": str(tmp_path)})
    assert not list(tmp_path.rglob("*onnxruntime*"))


# The plan


def test_the_plan_of_flux_dev_needs_neither_the_hub_nor_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = ["generate", "--model", "black-forest-labs/FLUX.1-dev", "--vram-gb", "24"]
    assert main(asked) == 0
    native = capsys.readouterr().out
    assert "a picture of 1024 x 1024 px in 28 steps" in native
    assert main([*asked, "--megapixels", "0.25", "--steps", "10"]) == 0
    small = capsys.readouterr().out
    assert "a picture of 512 x 512 px in 10 steps" in small
    seconds = [float(re.findall(r"time: about ([\d.]+) s", text)[0]) for text in (native, small)]
    assert seconds[1] < seconds[0] / 4
    assert main(["plan", "--model", "black-forest-labs/FLUX.1-dev", "--vram-gb", "24"]) == 0
    for command in (["generate", "--plan"], ["plan"]):
        assert main([*command, "--model", "mini"]) == 2
        assert "torch finds no CUDA GPU here; say how much memory the GPU has with --vram-gb 24" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["nan", "0", "inf", "-3"])
def test_a_memory_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]):
    for command in ("generate", "plan"):
        assert main([command, "--vram-gb", size]) == 2
        assert size in capsys.readouterr().err
