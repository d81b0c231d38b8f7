"""The process that decodes: what ends it costs one photo, and the next one gets a new process."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorabooth import decoder, photos
from lorabooth.decoder import Decoder
from lorabooth.decoding import decode
from lorabooth.entry import LeftOut
from lorabooth.photos import ingest


def picture(size: tuple[int, int] = (24, 16), mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, kind)
    return file.getvalue()


def process_of(running: Decoder) -> int:
    assert running._process
    return running._process.pid


def test_what_comes_back_is_what_decode_gives_here():
    masked = Image.open(io.BytesIO(picture())).convert("RGBA")
    masked.putpixel((0, 0), (1, 2, 3, 40))
    file = io.BytesIO()
    masked.save(file, "PNG", icc_profile=b"junk")
    with Decoder() as running:
        for data in (picture(), file.getvalue(), picture((3000, 20), kind="JPEG")):
            there, here = running.decode("a.png", data), decode("a.png", data)
            assert np.array_equal(there.image, here.image) and there.changes == here.changes
            assert (there.opacity is None) == (here.opacity is None)
            if there.opacity and here.opacity:
                assert np.array_equal(there.opacity, here.opacity) and there.changes
        first = process_of(running)
        with pytest.raises(LeftOut, match="is damaged or not a picture"):
            running.decode("a.png", b"junk")
        assert process_of(running) == first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_nothing_is_started_where_there_is_nothing_to_decode():
    with Decoder() as running:
        assert running._process is None


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_costs_one_photo(number: signal.Signals):
    large = picture((600, 600))
    with Decoder() as running:
        running.decode("a.png", picture())
        first = process_of(running)
        os.kill(first, signal.SIGSTOP)  # so that it dies with the photo in its hands
        threading.Timer(0.3, os.kill, (first, number)).start()
        if number != signal.SIGKILL:  # the others wait until it goes on
            threading.Timer(0.5, os.kill, (first, signal.SIGCONT)).start()
        with pytest.raises(LeftOut, match=f"^cannot be decoded: its decoder ended by {number.name}$"):
            running.decode("b.png", large)
        assert running.decode("c.png", picture()).image.size == (24, 16)
        assert process_of(running) != first


def test_a_process_killed_between_two_photos_costs_none():
    with Decoder() as running:
        running.decode("a.png", picture())
        os.kill(process_of(running), signal.SIGKILL)
        assert running._process
        running._process.wait()
        assert running.decode("b.png", picture()).image.size == (24, 16)


def test_a_decoder_that_hangs_is_ended_and_the_next_photo_goes_on():
    with Decoder(seconds=1) as running:
        running.decode("a.png", picture())
        os.kill(process_of(running), signal.SIGSTOP)
        # More than a pipe holds: it hangs while the photo is sent.
        with pytest.raises(LeftOut, match="takes over 1 seconds to decode, which is the limit"):
            running.decode("b.png", picture((600, 600)))
        assert running.decode("c.png", picture()).image.size == (24, 16)


def test_a_picture_that_takes_too_much_memory_is_named_with_the_limit():
    with Decoder(memory_bytes=400 << 20) as running:
        with pytest.raises(LeftOut, match="takes over 400 MiB of memory to decode, which is the limit"):
            running.decode("b.png", flat_png(9000))
        assert running.decode("c.png", picture()).image.size == (24, 16)


def flat_png(side_px: int) -> bytes:
    """A large RGBA picture that is a small file."""
    file = io.BytesIO()
    Image.new("RGBA", (side_px, side_px), (1, 2, 3, 4)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_a_decoder_that_cannot_start_is_no_fault_of_the_photo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Decoder() as running, pytest.raises(RuntimeError, match="did not start"):
        running.decode("a.png", picture())


def test_code_among_the_photos_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("json.py", "struct.py", "PIL.py", "lorabooth.py"):
        (tmp_path / name).write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    with Decoder() as running:
        assert running.decode("a.png", picture()).image.size == (24, 16)


def test_ctrl_c_in_the_middle_of_an_answer_leaves_no_rest_of_it(monkeypatch: pytest.MonkeyPatch):
    with Decoder() as running:
        running.decode("a.png", picture())
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "_receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                running.decode("b.png", picture((48, 48)))
        assert running.decode("c.png", picture()).image.size == (24, 16)


def interrupted(_: object) -> bytes:
    raise KeyboardInterrupt


def test_a_run_goes_on_after_a_crash_and_names_the_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.png").write_bytes(picture())
    decode_there = Decoder.decode

    def crash_at_b(running: Decoder, name: str, data: bytes):
        if name == "b.png":
            os.kill(process_of(running), signal.SIGSTOP)
            threading.Timer(0.2, os.kill, (process_of(running), signal.SIGKILL)).start()
        return decode_there(running, name, data)

    monkeypatch.setattr(photos.Decoder, "decode", crash_at_b)
    manifest = ingest(folder, tmp_path / "run")
    assert [photo.original for photo in manifest.photos] == ["a.png", "c.png"]
    assert "b.png cannot be decoded: its decoder ended by SIGKILL: left out" in manifest.notes


def test_under_a_lower_limit_of_the_machine_the_decoder_works():
    """As clusters have it: addresses, which a process may not raise again."""
    code = "import io; from PIL import Image; from lorabooth.decoder import Decoder; file = io.BytesIO(); Image.new('RGB', (9, 9)).save(file, 'PNG')\n"
    code += "with Decoder() as running: print(running.decode('a.png', file.getvalue()).image.size)"
    done = subprocess.run(["sh", "-c", 'ulimit -v 3000000; exec "$@"', "sh", sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "(9, 9)\n", done.stderr


def test_a_user_whose_pipes_hold_as_much_as_they_may_gets_smaller_ones(monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Limited(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, pipesize: int, **options: Any) -> None:
            asked.append(pipesize)
            if pipesize > 0:
                raise PermissionError
            super().__init__(*arguments, pipesize=pipesize, **options)

    monkeypatch.setattr(decoder.subprocess, "Popen", Limited)
    with Decoder() as running:
        assert running.decode("a.png", picture()).image.size[0] > 0
    assert asked == [decoder.PIPE_BYTES, -1]
