"""Which device and precision this process computes with."""

from functools import cache

import torch
from torch import Tensor

from lorabooth.errors import UserError
from lorabooth.machine import has_kernels, is_wsl
from lorabooth.notes import note


def compute_device() -> torch.device:
    """The first CUDA device that this torch can use, else the CPU. It asks the GPU, and from then on this process holds some of its memory."""
    return torch.device("cuda" if torch.cuda.is_available() and _usable() else "cpu")


@cache
def _usable() -> bool:
    """Whether the GPU computes with this torch; a note where it does not. Under WSL its memory gets a limit."""
    capability = torch.cuda.get_device_capability()
    if not has_kernels(capability, torch.cuda.get_arch_list()):
        name = torch.cuda.get_device_name()
        note(f"torch {torch.__version__} has no code for {name} (compute capability {capability[0]}.{capability[1]}); this goes on on the CPU")
        return False
    if is_wsl():  # beyond what is free Windows gives a process host memory, many times slower, where it should fail and a lighter plan be taken
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(free / total)
    return True


def base_dtype(device: torch.device) -> torch.dtype:
    """bf16, but fp32 on the CPU, where bf16 is slow on most machines and fp32 makes runs repeatable to the bit."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU by way of pinned memory, or the host would wait until the GPU has done all it was given before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and tensor.device.type == "cpu" else tensor.to(device)


BF16_CAPABILITY = 8, 0
"""NVIDIA's compute capability from which bf16 is computed in hardware, and attention by fast kernels: Ampere's."""


def check_gpu(native_px: int, model: str) -> None:
    """A UserError at once where a model of FLUX's size would be loaded for a CPU: 48 GB in fp32, and hours a picture."""
    if native_px >= 512 and not torch.cuda.is_available():
        raise _needs_gpu(model)


def _needs_gpu(model: str) -> UserError:
    return UserError(f"{model} needs a CUDA GPU, and torch finds none that it can use", hint="lorabooth doctor says why; --model mini runs on a CPU")


def check_device(device: torch.device, native_px: int, model: str) -> None:
    """A UserError where a model of FLUX's size would run on a CPU, or on a GPU without bf16."""
    if native_px < 512:
        return
    if device.type == "cpu":
        raise _needs_gpu(model)
    if (found := torch.cuda.get_device_capability(device)) < BF16_CAPABILITY:
        name, needed = torch.cuda.get_device_name(device), ".".join(map(str, BF16_CAPABILITY))
        raise UserError(
            f"{model} is computed in bf16, which {name} (compute capability {found[0]}.{found[1]}) lacks", hint=f"{needed} is needed: RTX 30, A100 or newer"
        )


def free_gpu_bytes(device: torch.device) -> int:
    """What a GPU has free, with what this process only keeps for later."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def forget_pinned() -> None:
    """Give pinned host memory that is free back to the system: torch keeps it for later, and `empty_cache` does not know of it."""
    empty = getattr(torch._C, "_host_emptyCache", None)  # in builds with CUDA
    if empty:
        empty()


def check_memory(needed_bytes: int, what: str, hint: str) -> None:
    """A UserError at once where the free GPU memory cannot hold `needed_bytes`, instead of a failure minutes later."""
    if not torch.cuda.is_available():
        return
    free, _ = torch.cuda.mem_get_info()
    if free < needed_bytes:
        raise UserError(f"{what} needs {needed_bytes / 1e9:.0f} GB of GPU memory and {free / 1e9:.0f} GB are free", hint=hint)
