"""Which GPU a process computes on, and how much of a host's memory is for it: what there is no such machine for is told to torch and to the program."""

from collections.abc import Iterator

import pytest
import torch

from lorabooth import device, doctor, machine
from lorabooth.errors import UserError
from lorabooth.quantized import small, wide

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_90a", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def volta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A V100, for which CUDA 13 has no code, beside a torch of CUDA 13."""
    answers = {"is_available": True, "get_device_capability": (7, 0), "get_arch_list": CUDA_13, "get_device_name": "Tesla V100"}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    device._usable.cache_clear()
    yield
    device._usable.cache_clear()


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 0), CUDA_13, False), ((7, 5), CUDA_13, True), ((8, 9), CUDA_13, True), ((9, 0), ["sm_90a"], True), ((10, 3), CUDA_13, True),
        ((11, 0), CUDA_13[:-1], False), ((12, 1), CUDA_13, True), ((13, 0), CUDA_13, True), ((13, 0), CUDA_13[:-1], False), ((9, 5), ["sm_90a"], False),
        ((8, 0), ["sm_86"], False), ((9, 4), ["gfx942"], True), ((7, 0), [], True),
    ],
)  # fmt: skip
def test_code_for_a_gpu_is_known_by_nvidias_rules(capability: tuple[int, int], built_for: list[str], runs: bool):
    assert machine.has_kernels(capability, built_for) is runs


@pytest.mark.usefixtures("volta")
def test_a_gpu_that_torch_has_no_code_for_leaves_mini_on_the_cpu_and_refuses_flux(capsys: pytest.CaptureFixture[str]):
    assert device.compute_device() == device.compute_device() == torch.device("cpu")
    assert capsys.readouterr().err.count("has no code for Tesla V100 (compute capability 7.0); this goes on on the CPU") == 1
    device.check_device(device.compute_device(), 128, "mini")
    with pytest.raises(UserError, match="needs a CUDA GPU, and torch finds none that it can use"):
        device.check_device(device.compute_device(), 1024, "FLUX.1-dev")


def test_doctor_names_a_gpu_that_torch_has_no_code_for():
    v100 = machine.Gpu("Tesla V100", "7.0", 16 * 2**30, 16 * 2**30, bf16=False, fp8=False, usable=False)
    (problem,) = doctor.gpu_problems(machine.Driver("580.1", ("Tesla V100",)), machine.Torch("2.13.0", "13.0", (v100,)))
    assert "no code for Tesla V100 (compute capability 7.0)" in problem.what


def test_under_wsl_half_of_the_memory_is_pinned_at_most_and_the_gpu_has_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda: (32 * 10**9, 30 * 10**9))
    assert machine.pinnable_bytes() == 24 * 10**9
    monkeypatch.setattr(machine.platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    assert machine.pinnable_bytes() == 16 * 10**9
    limits: list[float] = []
    answers = {"is_available": True, "get_device_capability": (8, 9), "get_arch_list": CUDA_13, "mem_get_info": (6 * 10**9, 8 * 10**9)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    device._usable.cache_clear()
    try:
        assert device.compute_device() == device.compute_device() == torch.device("cuda") and limits == [0.75]
    finally:
        device._usable.cache_clear()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_weight_is_made_wide_in_the_precision_asked_for_and_no_step_coarser(precision: str):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    stored, scale = small(weight, precision)
    for dtype in (torch.float32, torch.bfloat16):
        made = wide(stored, scale, dtype)
        values = stored.view(torch.float8_e4m3fn) if precision == "fp8" else stored
        assert made.dtype == dtype and torch.equal(made, values.to(dtype) * scale.to(dtype))
