"""The choice of an attention kernel: by what it computes first, by its speed second."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from lorabooth import attention
from lorabooth.attention import Trial, fastest, trials
from lorabooth.compiled import try_compiled
from lorabooth.families import load_family

CPU = torch.device("cpu")
HERE = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
"""Of these a CPU has the last two."""


def test_kernels_that_are_not_here_are_left_out_and_the_others_are_right():
    found = trials(CPU, torch.bfloat16, heads=2, width=32, tokens=96, candidates=HERE)
    assert [trial.backend for trial in found] == [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    assert all(0 < trial.error < attention.TOLERANCE and trial.seconds > 0 for trial in found)


def test_a_kernel_with_wrong_gradients_is_not_taken_however_fast(monkeypatch: pytest.MonkeyPatch):
    right = F.scaled_dot_product_attention

    def wrong_gradients(*inputs: torch.Tensor) -> torch.Tensor:
        out = right(*inputs)
        return out if inputs[0].dtype == torch.float32 else out.detach() + 0.5 * (out - out.detach())

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", wrong_gradients)
    found = trials(CPU, torch.bfloat16, heads=2, width=32, tokens=96, candidates=HERE)
    assert all(trial.error == pytest.approx(0.5, abs=0.01) for trial in found) and fastest(found) is None
    good = Trial(SDPBackend.EFFICIENT_ATTENTION, 0.004, 1.0)
    without = trials(CPU, torch.bfloat16, heads=2, width=32, tokens=96, gradients=False, candidates=HERE)
    assert all(trial.error < attention.TOLERANCE for trial in without), "where pictures are made nobody asks for gradients"
    assert fastest([*found, good, Trial(SDPBackend.MATH, 0.003, 2.0)]) == good.backend


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_kernel_is_tried_on_whole_tiles_and_on_rests_and_a_gradient_that_is_no_number_counts(wrong: int, monkeypatch: pytest.MonkeyPatch):
    right, sizes = F.scaled_dot_product_attention, set[tuple[int, int]]()

    def with_nan(*inputs: torch.Tensor) -> torch.Tensor:
        if inputs[0].dtype == torch.float32:
            return right(*inputs)
        sizes.add((inputs[0].shape[2], inputs[1].shape[2]))
        copies = [t.clone() for t in inputs]
        if inputs[1].shape[2] == 448:
            copies[wrong].register_hook(lambda gradient: gradient * float("nan"))
        return right(*copies)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", with_nan)
    found = trials(CPU, torch.bfloat16, heads=2, width=32, tokens=1000, candidates=(SDPBackend.MATH,))
    assert [trial.error for trial in found] == [torch.inf] and fastest(found) is None
    assert sizes == {(512, 512), (384, 512), (500, 500), (375, 500), (448, 448), (336, 448), (1000, 1000)}


def test_the_recipe_and_the_base_say_what_is_tried(monkeypatch: pytest.MonkeyPatch):
    used: list[SDPBackend] = []
    monkeypatch.setattr(attention, "use", used.append)
    monkeypatch.setattr(attention, "trials", lambda *sizes: trials(*sizes, candidates=HERE))
    name = attention.choose_kernel(128, load_family("mini"), CPU)
    assert [backend.name.lower() for backend in used] == [name] and name in ("flash_attention", "math")
    monkeypatch.setattr(attention, "trials", lambda *_: [])
    assert attention.choose_kernel(1024, load_family("mini"), CPU) == "torch's own choice" and len(used) == 1


@pytest.fixture
def torchs_own() -> Iterator[list[int]]:
    """What torch would take first, without a choice; and the choice undone."""
    yield torch._C._get_sdp_priority_order()
    attention._in_use.close()


@pytest.mark.parametrize("backend", attention.CANDIDATES)
def test_the_chosen_kernel_comes_first_and_the_vaes_wide_head_has_one_too(backend: SDPBackend, torchs_own: list[int]):
    for other in attention.CANDIDATES:  # which is forgotten
        attention.use(other)
    attention.use(backend)
    others = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    assert _cur_sdpa_kernel_backends(with_priority=True) == list(dict.fromkeys((backend, *others)))
    assert attention.in_use() == backend.name.lower()
    attention._in_use.close()
    assert attention.in_use() == "any"
    assert torch._C._get_sdp_priority_order() == torchs_own and set(attention.CANDIDATES) < set(_cur_sdpa_kernel_backends(with_priority=True))


def test_compiled_code_has_a_folder_for_each_kernel(torchs_own: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as it is once torch's compiler has been imported
    folders = []
    for chosen in (lambda: None, lambda: attention.use(SDPBackend.FLASH_ATTENTION)):
        chosen()
        assert try_compiled([], None, lambda: None, "this test")
        folders.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).relative_to(tmp_path))
    assert folders == [Path("lorabooth/compiled/any"), Path("lorabooth/compiled/flash_attention")]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/the/users/own")
    assert try_compiled([], None, lambda: None, "this test") and os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/the/users/own"


@pytest.mark.gpu
def test_on_a_gpu_one_is_found_and_used(torchs_own: list[int]):
    backend = fastest(trials(torch.device("cuda"), torch.bfloat16, heads=24, width=128, tokens=1536))
    assert backend is not None
    attention.use(backend)
    assert _cur_sdpa_kernel_backends(with_priority=True)[0] == backend
