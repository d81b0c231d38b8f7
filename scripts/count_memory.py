"""Memory of a training step on a FLUX.1-dev of the true size, counted without a GPU: `python -m scripts.count_memory`.

On torch's meta device a tensor has a shape and no values. The step is train/fit.py's own, beside diffusers' script's (scripts/peer.py, photos and captions
encoded ahead), and every tensor's bytes are counted while it lives: weights, optimiser, activations, gradients, temporaries. Not counted, in either: what
the allocator cannot use and libraries' workspaces (the reserve in train/plan.py). Autocast, which the script has and which makes some tensors wider, is left
out, so that the script is counted too low. Nothing is compiled: what the compiler fuses is not known before there is code for a GPU.
"""

import json
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import click
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from lorabooth.families.flux1 import Conditioning
from lorabooth.sizes import GB, blocks_of
from lorabooth.speed import RTX_4090
from scripts.bench_startup import machine_record
from scripts.bench_train import SETTINGS
from scripts.gpu_check import Case, write_run
from scripts.peer import Batch, Peer
from scripts.random_flux import DEV, RandomFlux, Size, random_conditioning, write_model
from train import fit
from train.plan import MemoryPlan, estimate
from train.planning import shapes_of

META = torch.device("meta")
PRECISIONS = ("bf16", "int8")
RECOMPUTED = {"nothing": 0.0, "half of the blocks": 0.5, "all blocks": 1.0}


class Weightless(RandomFlux):
    """A FLUX.1 without weights."""

    def transformer(self, device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
        """The transformer on the meta device, wherever it is wanted."""
        return torch.nn.Module.to(self.empty_transformer(), dtype).eval().requires_grad_(False)


class Counted(TorchDispatchMode):
    """Bytes of the meta device's tensors: those that live, and the most that ever did."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.living: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is read back has no value here: the first will do.
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return args[0].new_zeros((1, args[0].ndim), dtype=torch.long)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.count(tensor)
        return made

    def count(self, tensor: Tensor) -> None:
        """Count the memory that a tensor lies in, once."""
        memory = tensor.untyped_storage()
        key, size = memory._cdata, memory.nbytes()
        if key in self.living:
            return

        def freed(_: Any) -> None:
            del self.living[key]
            self.now -= size

        self.living[key] = weakref.ref(memory, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class FusedNorm(torch.autograd.Function):
    """What a GPU's RMS norm makes and keeps: its input and a factor for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


@contextmanager
def counting() -> Iterator[Counted]:
    """Count what is made inside. Attention, RMS norms and our AdamW are the fused kernels of a GPU, which keep less than the single operators that
    this device would take."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return cast(Tensor, torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0])

    with ExitStack() as as_on_a_gpu:
        as_on_a_gpu.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        as_on_a_gpu.enter_context(patch.object(F, "rms_norm", lambda x, *_: FusedNorm.apply(x)))
        as_on_a_gpu.enter_context(patch("torch.optim.adam._device_dtype_check_for_fused"))
        yield as_on_a_gpu.enter_context(Counted())


def peak(make: Callable[[], Callable[[], Any]]) -> int:
    """The most bytes at any time of two steps; in the first the optimiser has no state yet."""
    with counting() as counted:
        step = make()
        counted.peak = counted.now  # the model was made in fp32, which no GPU sees
        for _ in range(2):
            step()
    return counted.peak


def our_step(
    family: Weightless, size: Size, folder: Path, px: int, settings: dict[str, Any], plan: MemoryPlan
) -> tuple[Callable[[], Callable[[], Any]], float]:
    """How to make ours by a plan, and the bytes that the plan expects, without its reserve. What a plan has in host memory is on this device, too."""
    run = write_run(folder, family, size, torch.bfloat16, Case("count", px, settings | {"compile_blocks": False}))
    expected = estimate(plan, shapes_of(run.config, family), run.config, RTX_4090)
    here = cast(Accelerator, SimpleNamespace(device=META, num_processes=1, process_index=0, is_main_process=True))

    def make() -> Callable[[], Any]:
        trainer = fit.start(run, run.config, family, here, plan)
        return lambda: fit.train_step(trainer)

    return make, expected.bytes - expected.items["reserve"]


def script_step(family: Weightless, size: Size, px: int, settings: dict[str, Any], recompute: bool) -> Callable[[], Callable[[], Any]]:
    """How to make the script's. recompute: its --gradient_checkpointing."""
    count, one, side = settings["batch_size"], random_conditioning(size, torch.bfloat16), px // 8

    def make() -> Callable[[], Any]:
        prompts = Conditioning(one.embeds.repeat(count, 1, 1).to(META), one.pooled.repeat(count, 1).to(META))
        batch = Batch(torch.empty(count, 16, side, side, device=META, dtype=torch.bfloat16), prompts)
        peer = Peer(family, settings, lambda: batch, device=META)
        if recompute:
            peer.plain.enable_gradient_checkpointing()
        return peer.step

    return make


def rows(family: Weightless, size: Size, folder: Path, sides: list[int], batches: list[int]) -> list[dict[str, Any]]:
    """Every setting: GB counted for ours, what the plan expects, and GB counted for the script, where it has the setting."""
    blocks = len(blocks_of(family.empty_transformer()))
    asked = [(px, batch, precision, what) for px in sides for batch in batches for precision in PRECISIONS for what in RECOMPUTED]
    found = []
    for i, (px, batch, precision, what) in enumerate(tqdm(asked, unit="setting")):
        settings = SETTINGS | {"batch_size": batch, "precision": precision}
        make, expected = our_step(family, size, folder / f"run{i}", px, settings, MemoryPlan(precision, round(RECOMPUTED[what] * blocks), 0, False))
        row = {"px": px, "batch": batch, "precision": precision, "recomputed": what, "lorabooth": peak(make) / GB, "planned": expected / GB}
        if precision == "bf16" and RECOMPUTED[what] in (0, 1):
            row["script"] = peak(script_step(family, size, px, settings, RECOMPUTED[what] == 1)) / GB
        found.append(row)
    return found


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| pictures | base | recomputed | lorabooth | its plan expects | script, encoded ahead | ours over it |", "|---" * 7 + "|"]
    for row in record["rows"]:
        script, ratio = (f"{row['script']:.1f} GB", f"{row['lorabooth'] / row['script']:.2f}") if "script" in row else ("-", "-")
        figures = f"{row['lorabooth']:.1f} GB | {row['planned']:.1f} GB | {script} | {ratio}"
        lines.append(f"| {row['px']} px, batch {row['batch']} | {row['precision']} | {row['recomputed']} | {figures} |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/memory.json"), show_default=True, help="Where the figures go.")
@click.option("--px", "sides", default="512,1024", show_default=True, help="Sides of the pictures in px, by commas.")
@click.option("--batch-size", "batches", default="1,4", show_default=True, help="Photos a step, by commas.")
def main(out: Path, sides: str, batches: str) -> None:
    """Count the memory of training steps and write it as JSON.

    \b
    Example:
      python -m scripts.count_memory --px 1024 --batch-size 1
    """
    with tempfile.TemporaryDirectory() as folder:
        family = Weightless(write_model(Path(folder) / "model", DEV).model)
        found = rows(family, DEV, Path(folder), *([int(n) for n in numbers.split(",")] for numbers in (sides, batches)))
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine_record(0.0), "model": DEV.name, "settings": SETTINGS, "rows": found}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(table(record))


if __name__ == "__main__":
    main()
