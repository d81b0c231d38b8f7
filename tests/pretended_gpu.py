"""`python tests/pretended_gpu.py MODULE [ARGUMENT ...]`: run a module as on a machine with a CUDA GPU, which there is not.

tests/pretended_gpu.cpp is the device; here are its build, and what of torch.cuda a torch without CUDA has not. LORABOOTH_PRETENDED_GB is its memory.
"""

import ctypes
import hashlib
import importlib.util
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = Path(__file__).parent.parent / "build" / "pretended_gpu"
LIBRARIES = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so")
COMPILER = "g++"


def torch_folder() -> Path:
    """Where torch is installed, without importing it: the device must be there first."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    return Path(spec.origin).parent


def built() -> Path:
    """The device as a library, compiled if this source was not yet for this torch: half a minute."""
    torch = torch_folder()
    about = SOURCE.read_bytes() + Path(__file__).read_bytes() + (torch / "version.py").read_bytes()
    library = BUILD / f"{hashlib.sha256(about).hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        includes = [f"-isystem{torch / 'include' / folder}" for folder in ("", "torch/csrc/api/include")]
        linked = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
        subprocess.run([COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", *includes, str(SOURCE), "-o", str(part), *linked], check=True)
        part.rename(library)
    return library


def load() -> ctypes.CDLL:
    """Put the device into this process, which has not imported torch yet: torch asks once whether there is CUDA."""
    assert "torch" not in sys.modules
    for name in LIBRARIES:
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    device = ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
    for name in ("held", "peak", "room", "copies"):
        getattr(device, f"pretended_{name}").restype = ctypes.c_int64
    device.pretended_set_room.argtypes = device.pretended_settle.argtypes = [ctypes.c_int64]
    device.pretended_is_there.restype = ctypes.c_bool
    return device


def streams(device: ctypes.CDLL) -> dict[str, Any]:
    """What torch.cuda has of streams and events."""
    import torch

    def wait_for_all(_device: object = None) -> None:
        device.pretended_settle(device.pretended_copies())

    class Event:
        """A moment of a stream; whoever waits for it has what other streams had been told to copy by then."""

        def __init__(self, **_: Any):
            self.seconds, self.copies = 0.0, 0

        def record(self, _stream: object = None) -> None:
            self.seconds, self.copies = time.perf_counter(), device.pretended_copies()

        def elapsed_time(self, other: "Event") -> float:
            return 1000 * (other.seconds - self.seconds)

        def wait(self, _stream: object = None) -> None:
            device.pretended_settle(self.copies)

        def synchronize(self) -> None:
            device.pretended_settle(self.copies)

    class Stream:
        """A stream; what one copies that is not the main one comes when somebody waits for it, and no sooner."""

        def __init__(self, *_: Any, **__: Any):
            self.device = torch.device("cuda", 0)

        def wait_stream(self, other: "Stream") -> None:
            if other is not main:
                wait_for_all()

        def wait_event(self, event: Event) -> None:
            event.wait()

        def record_event(self) -> Event:
            event = Event()
            event.record()
            return event

        def synchronize(self) -> None:
            wait_for_all()

    main = Stream()
    at_work = [main]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        at_work.append(chosen)
        device.pretended_beside(chosen is not main)
        try:
            yield
        finally:
            at_work.pop()
            device.pretended_beside(at_work[-1] is not main)

    return {
        "Event": Event, "Stream": Stream, "stream": stream, "current_stream": lambda _=None: at_work[-1], "default_stream": lambda _=None: main,
        "synchronize": wait_for_all,
    }  # fmt: skip


def install(total_bytes: int) -> None:
    """Make torch.cuda this device."""
    device = load()
    import torch

    assert device.pretended_is_there(), "torch had asked before"
    device.pretended_set_room(total_bytes)

    class Generator(torch.Generator):
        def __new__(cls, *_: Any, **__: Any) -> "Generator":
            return super().__new__(cls)

    def available() -> bool:
        """Not for bitsandbytes, which would load its CUDA library."""
        return not str(sys._getframe(1).f_globals.get("__name__")).startswith("bitsandbytes")

    about = SimpleNamespace(name="a pretended GPU", major=8, minor=9, total_memory=total_bytes, multi_processor_count=8, warp_size=32)
    known: dict[str, Any] = {
        "is_available": available, "is_initialized": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1, "current_device": lambda: 0,
        "set_device": lambda _: None, "is_bf16_supported": lambda *_: True,
        "get_device_name": lambda _=None: about.name, "get_device_capability": lambda _=None: (about.major, about.minor),
        "get_device_properties": lambda _=None: about, "empty_cache": lambda: None,
        "mem_get_info": lambda _=None: (device.pretended_room() - device.pretended_held(), total_bytes),
        "memory_allocated": lambda _=None: device.pretended_held(), "memory_reserved": lambda _=None: device.pretended_held(),
        "max_memory_allocated": lambda _=None: device.pretended_peak(), "max_memory_reserved": lambda _=None: device.pretended_peak(),
        "reset_peak_memory_stats": lambda _=None: device.pretended_reset_peak(),
        "set_per_process_memory_fraction": lambda share, _=None: device.pretended_set_room(int(share * total_bytes)),
        "set_sync_debug_mode": lambda mode: device.pretended_let_waiting_fail(mode == "error"),
        "manual_seed": lambda _: None, "manual_seed_all": lambda _: None,
    }  # fmt: skip
    for name, value in (known | streams(device)).items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]


if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # there is no compiler for this device
    install(int(float(os.environ.get("LORABOOTH_PRETENDED_GB", "8")) * 1e9))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
