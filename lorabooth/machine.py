"""Facts about this machine: processor, memory, GPUs, disk, libraries. It judges nothing, prints nothing and never uses the network.

`lorabooth doctor` turns the facts into advice; the benchmarks write them beside their figures.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement

NVIDIA_SMI_SECONDS = 20
"""A driver that hangs makes nvidia-smi hang too; a healthy one answers in one or two seconds."""

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where the limits are found that containers, SLURM and systemd set; the machine's own figures ignore them."""


HOST_SHARE = 0.8


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it; `usable`: torch was built for it."""

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int
    bf16: bool
    fp8: bool
    usable: bool = True


@dataclass(frozen=True)
class Torch:
    """The installed torch: `cuda` is the CUDA version it was built for, None in a CPU build; `error` says why it cannot be imported,
    `warning` why it cannot use a GPU.
    """

    version: str | None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says: the driver's version and the names of the GPUs it drives, whether torch can use them or not."""

    version: str | None
    gpu_names: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Machine:
    """All the facts that need no argument."""

    python: str
    platform: str
    cpu_cores: int
    memory_total_bytes: int
    memory_available_bytes: int
    driver: Driver
    torch: Torch
    libraries: dict[str, str | None]


def look_around() -> Machine:
    """Collect the facts. It imports torch, which takes a second or two."""
    total_bytes, available_bytes = memory_bytes()
    return Machine(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu_cores=cpu_cores(),
        memory_total_bytes=total_bytes,
        memory_available_bytes=available_bytes,
        driver=nvidia_driver(),
        torch=torch_build(),
        libraries={requirement.name: installed_version(requirement.name) for requirement in requirements()},
    )


def cpu_cores() -> int:
    """The cores this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory_bytes() -> tuple[int, int]:
    """Total and available memory, no more than is allowed by the limits of the control groups that this process is in."""
    memory, limits = psutil.virtual_memory(), list(_limits())
    return min([memory.total, *(limit for limit, _ in limits)]), max(0, min([memory.available, *(limit - used for limit, used in limits)]))


def pinnable_bytes() -> float:
    """What weights that a GPU reads may take of the host's free memory: the operating system needs the rest, and WSL 2 pins half of all at most."""
    total, available = memory_bytes()
    return min(available * HOST_SHARE, total / 2) if is_wsl() else available * HOST_SHARE


def is_wsl() -> bool:
    """Whether this is Linux in Windows."""
    return "microsoft" in platform.release().lower()


def has_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a torch built for these architectures (`torch.cuda.get_arch_list`) runs on a GPU: sm_86 from 8.6 up to 8.9, sm_90a on 9.0 alone, compute_90
    on all from 9.0 on, for which the driver compiles it (CUDA C++ Programming Guide, "Application Compatibility"). True where nothing is known."""
    known = [found for name in built_for if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name))]

    def runs(kind: str, major: int, minor: int, narrow: str) -> bool:
        if narrow or (major, minor) == capability:
            return (major, minor) == capability
        return (major, minor) < capability and (kind == "compute" or major == capability[0])

    return not known or any(runs(found[1], int(found[2]), int(found[3]), found[4]) for found in known)


def _limits() -> Iterator[tuple[int, int]]:
    """The limit in bytes, and what is used of it, of this process's control group and of each above it; cgroup v2 or v1 (Linux's admin-guide/cgroup-v2.rst).

    The kernel's cache of files that lie idle is not counted as used: it goes where room is wanted.
    """
    with suppress(OSError):  # not Linux
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            if controllers:
                root, used_name, limit_name, idle_name = CGROUPS / "memory", "memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"
            else:
                root, used_name, limit_name, idle_name = CGROUPS, "memory.current", "memory.max", "inactive_file"
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                with suppress(OSError, ValueError):  # a group that is not mounted here, one without a limit ("max")
                    limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
                    idle = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines()).get(idle_name, "0")
                    yield limit, used - int(idle)
                if folder == root:
                    break


def disk_free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or would be: it need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def nvidia_driver() -> Driver:
    """Ask nvidia-smi, which knows of GPUs that torch cannot use."""
    if shutil.which("nvidia-smi") is None:
        return Driver(version=None)
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=NVIDIA_SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Driver(version=None, error=f"nvidia-smi did not answer in {NVIDIA_SMI_SECONDS} s")
    rows = [line.split(", ", 1) for line in answer.stdout.splitlines() if ", " in line]
    if answer.returncode != 0 or not rows:
        return Driver(version=None, error=" ".join((answer.stdout + answer.stderr).split()))
    return Driver(version=rows[0][0], gpu_names=tuple(name for _, name in rows))


def torch_build() -> Torch:
    """Import torch and ask it for its build and the GPUs it can use."""
    version = installed_version("torch")
    try:
        import torch
    except (ImportError, OSError, ValueError) as error:  # OSError: one of its shared libraries is missing or of another build; ValueError: TORCH_LOGS
        return Torch(version=version, error=f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ...')}")
    with warnings.catch_warnings(record=True) as caught:  # torch tells an old driver by a warning
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    gpus = tuple(_gpu(number) for number in range(torch.cuda.device_count())) if usable else ()
    return Torch(version=str(torch.__version__), cuda=torch.version.cuda, gpus=gpus, warning=" ".join(str(warning.message) for warning in caught))


def _gpu(number: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(number)
    total_bytes = properties.total_memory
    try:
        free_bytes = torch.cuda.mem_get_info(number)[0]
    except RuntimeError:  # asking takes some memory itself: a full GPU, or one that another process holds alone
        free_bytes = 0
    capability = (properties.major, properties.minor)
    # In hardware: bf16 since Ampere (8.0), fp8 since Ada (8.9).
    usable = has_kernels(capability, torch.cuda.get_arch_list())
    name, shown = properties.name, f"{properties.major}.{properties.minor}"
    return Gpu(name, shown, total_bytes, free_bytes, bf16=usable and capability >= (8, 0), fp8=usable and capability >= (8, 9), usable=usable)


def requirements(extra: str = "") -> list[Requirement]:
    """What pyproject.toml asks for on this platform: the dependencies, or those of one extra only."""
    declared = [Requirement(line) for line in importlib.metadata.requires("lorabooth") or []]
    return [requirement for requirement in declared if _in_extra(requirement, extra)]


def _in_extra(requirement: Requirement, extra: str) -> bool:
    if requirement.marker is None:
        return extra == ""
    always = requirement.marker.evaluate({"extra": ""})
    return requirement.marker.evaluate({"extra": extra}) and (extra == "" or not always)


def installed_version(library: str) -> str | None:
    """The version of an installed library, without importing it."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
