"""Decoding in a process of its own: what crashes, hangs or fills memory there costs one photo, not the run.

Beneath Pillow are a dozen libraries of C that read the bytes of strangers. `python -m lorabooth.decoder` is the
process; requests and answers are frames on its standard streams, each a length in 8 bytes and then that many bytes:

    request: name, bytes of the file
    answer:  {"left_out": reason}, or {"size": [width, height], "masked": bool, "changes": [...]}, pixels (RGB), opacity (L, if masked)
"""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO

from PIL import Image

from lorabooth.decoding import Decoded, decode
from lorabooth.entry import LeftOut, size_text

MEMORY_BYTES_LIMIT = 3 << 30
"""Addresses the process may have; a picture of 100 megapixels takes 0.2 to 2.3 GiB, by its format."""
SECONDS_LIMIT = 120
"""For one photo; the largest take a few seconds."""

PIPE_BYTES = 1 << 20
"""What Linux lets anyone ask for; with the usual 64 KiB a picture takes two hundred turns from one process to the other."""
LENGTH = struct.Struct(">Q")


class Decoder:
    """The process, started for the first photo, and again after one that ended it. To be used in a `with`."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES_LIMIT, seconds: int = SECONDS_LIMIT):
        self.memory_bytes, self.seconds = memory_bytes, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def decode(self, name: str, data: bytes) -> Decoded:
        """As `decoding.decode`, in the process. Raises LeftOut, also where the process did not survive."""
        if self._process and self._process.poll() is not None:  # killed between two photos
            self._end()
        process = self._process = self._process or _started(self.memory_bytes)
        assert process.stdin and process.stdout
        try:
            with _watch(process, self.seconds) as late:
                _send(process.stdin, name.encode("utf-8", "replace"), data)
                answer = json.loads(_receive(process.stdout))
                if "left_out" in answer:
                    raise LeftOut(answer["left_out"])
                size = tuple(answer["size"])
                image = Image.frombytes("RGB", size, _receive(process.stdout))
                opacity = Image.frombytes("L", size, _receive(process.stdout)) if answer["masked"] else None
        except (EOFError, BrokenPipeError):
            raise LeftOut(self._cause(late)) from None
        except BaseException as error:
            if not isinstance(error, LeftOut):  # Ctrl-C in the middle of an answer: the next one would be taken for its rest
                self._end()
            raise
        return Decoded(image, opacity, tuple(answer["changes"]))

    def _cause(self, late: threading.Event) -> str:
        """Why the process ended, as the end of a sentence about the photo; the next photo gets a new one."""
        assert self._process
        code = self._process.wait()
        self._end()
        if late.is_set():
            return f"takes over {self.seconds} seconds to decode, which is the limit"
        return f"cannot be decoded: its decoder ended by {signal.Signals(-code).name}" if code < 0 else "cannot be decoded: its decoder failed"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()  # closes the pipes and waits


def _started(memory_bytes: int) -> subprocess.Popen[bytes]:
    # -P: the current folder may be the photos, where a stranger's zip was unpacked; nothing in it is to be imported.
    command = [sys.executable, "-P", "-m", "lorabooth.decoder", str(memory_bytes)]
    # glibc reserves addresses for each thread of a decoder, which on a large machine would use up the limit.
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    # In a session of its own, so that Ctrl-C is for the command alone.

    def start(pipe_bytes: int) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, pipesize=pipe_bytes, env=environment, start_new_session=True)

    try:
        process = start(PIPE_BYTES)
    except PermissionError:  # a user whose pipes hold as much as they may
        process = start(-1)
    assert process.stdout
    if process.stdout.read(1) != b"+":
        raise RuntimeError(f"the decoder did not start (exit code {process.wait()})")
    return process


@contextmanager
def _watch(process: subprocess.Popen[bytes], seconds: int) -> Iterator[threading.Event]:
    """Kill the process after this time, which sets the event. Seconds are counted, so that one suspended with Ctrl-Z is not late when it goes on."""
    done, late = threading.Event(), threading.Event()

    def wait() -> None:
        if not any(done.wait(1) for _ in range(seconds)):
            late.set()
            process.kill()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield late
    finally:
        done.set()
        thread.join()


def _send(stream: IO[bytes], *frames: bytes) -> None:
    for frame in frames:
        stream.write(LENGTH.pack(len(frame)))
        stream.write(frame)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    """One frame. Raises EOFError."""
    head = stream.read(LENGTH.size)
    frame = stream.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""
    if len(head) < LENGTH.size or len(frame) < LENGTH.unpack(head)[0]:
        raise EOFError
    return frame


def _answer(name: str, data: bytes, memory_bytes: int) -> list[bytes]:
    try:
        decoded = decode(name, data)
    except LeftOut as reason:
        return [json.dumps({"left_out": str(reason)}).encode()]
    except MemoryError:
        return [json.dumps({"left_out": f"takes over {size_text(memory_bytes)} of memory to decode, which is the limit"}).encode()]
    head = {"size": decoded.image.size, "masked": decoded.opacity is not None, "changes": decoded.changes}
    return [json.dumps(head).encode(), decoded.image.tobytes(), *([decoded.opacity.tobytes()] if decoded.opacity else [])]


def main() -> None:
    """Answer requests until there are none."""
    memory_bytes = int(sys.argv[1])
    if sys.platform == "linux":  # elsewhere the limit is refused, or taken and not kept
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        allowed = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the photo
    # What the libraries print must not get between the frames, nor into the terminal.
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    answers.write(b"+")
    answers.flush()
    while True:
        try:
            name, data = _receive(requests).decode(), _receive(requests)
        except EOFError:
            return
        _send(answers, *_answer(name, data, memory_bytes))


if __name__ == "__main__":
    main()
