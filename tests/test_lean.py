"""The transformer's layers in training: the results of diffusers' and PEFT's, with less kept and fewer operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorabooth import flow
from lorabooth.families.flux1 import Conditioning, Flux1
from lorabooth.lora import LoraSpec
from lorabooth.quantized import put_blocks
from lorabooth.sizes import blocks_of
from scripts.bench_train import Operators, kept_bytes
from train.lean import LeanLora
from train.lean_blocks import LeanDoubleBlock, LeanSingleBlock, lean, norm_rope, norms

CPU = torch.device("cpu")
FAMILY = Flux1("mini")


def with_lora(spec: LoraSpec, dtype: torch.dtype = torch.float32, precision: str = "fp32") -> tuple[FluxTransformer2DModel, list[Tensor]]:
    """The mini model's transformer with a LoRA that does something."""
    transformer, generator = FAMILY.transformer(CPU, dtype), torch.Generator().manual_seed(2)
    put_blocks(blocks_of(transformer), precision, 0, CPU)
    parameters = spec.attach(transformer, seed=0)
    for parameter in parameters:
        parameter.data = (parameter.data + torch.randn(parameter.shape, generator=generator) * 0.05).to(dtype)
    return transformer.train(), parameters


def velocity(transformer: FluxTransformer2DModel, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two pictures of one size at two noise levels."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 5, transformer.config.joint_attention_dim, generator=generator).to(dtype)
    conditioning = Conditioning(embeds, torch.randn(2, transformer.config.pooled_projection_dim, generator=generator).to(dtype))
    x = flow.pack(torch.randn(2, 16, 8, 12, generator=generator)).to(dtype)
    return FAMILY.velocity(transformer, x, torch.tensor([0.6, 0.2]), 1.0, conditioning, flow.image_ids(8, 12))


def gradients(transformer: FluxTransformer2DModel, parameters: list[Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[Tensor, ...]]:
    result = velocity(transformer, dtype)
    return result, torch.autograd.grad(result.float().square().mean(), parameters)


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp8"])
@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear", r".*proj_out|.*ff\.net\.2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("remake", [True, False], ids=["remade", "kept"])
def test_output_and_gradients_are_those_of_diffusers_and_peft(targets: str, options: dict[str, Any], precision: str, remake: bool):
    transformer, parameters = with_lora(LoraSpec(4, 8, targets, **options), precision=precision)
    theirs, their_gradients = gradients(transformer, parameters)
    lean(transformer, remake)
    ours, our_gradients = gradients(transformer, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(our_gradients) == len(their_gradients) > 0 and all(g.abs().max() > 0 for g in their_gradients)
    for mine, right in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


def test_in_bf16_it_is_as_near_to_the_exact_gradients_as_diffusers_and_peft():
    transformer, parameters = with_lora(LoraSpec(4, 4, "attention+ff"))
    exact = torch.cat([g.flatten() for g in gradients(transformer, parameters)[1]])

    def distance(change: Callable[[nn.Module], None]) -> float:
        rounded, rounded_parameters = with_lora(LoraSpec(4, 4, "attention+ff"), torch.bfloat16)
        change(rounded)
        found = torch.cat([g.flatten().float() for g in gradients(rounded, rounded_parameters, torch.bfloat16)[1]])
        return float((found - exact).norm() / exact.norm())

    theirs, ours = distance(lambda _: None), distance(lambda model: lean(model, remake=True))
    assert 0 < ours < 1.1 * theirs < 0.2, f"{ours} from the exact gradients, {theirs} without"


def test_every_layer_that_can_be_lean_is():
    transformer, _ = with_lora(LoraSpec(4, 4, "attention+ff"))
    lean(transformer, remake=True)
    assert all(isinstance(block, LeanDoubleBlock) for block in transformer.transformer_blocks)
    assert all(isinstance(block, LeanSingleBlock) for block in transformer.single_transformer_blocks)
    for name, module in transformer.named_modules():
        assert isinstance(module, LeanLora) == hasattr(module, "lora_A"), name
    kinds = {type(module).__name__ for module in transformer.modules()}
    assert "LeanFeedForward" in kinds and "FeedForward" not in kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_and_rotation_are_those_of_diffusers(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, 6, 2, 3, 8, generator=generator).to(dtype).requires_grad_()
    modules = [nn.RMSNorm(8, eps=1e-2).requires_grad_(False) for _ in range(2)]
    for module in modules:
        module.weight.data = torch.rand(8, generator=generator).to(dtype) + 0.5
    angles = torch.rand(6, 4, generator=generator).repeat_interleave(2, 1) * 6
    rotary, weights = (angles.cos(), angles.sin()), torch.randn(2, 2, 6, 3, 8, generator=generator)
    theirs = [apply_rotary_emb(module(x), rotary, sequence_dim=1) for module, x in zip(modules, pair.unbind(2), strict=True)]
    ours = norm_rope((pair,), (norms(*modules),), rotary, 1e-2)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.03}
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == right.dtype == dtype
        torch.testing.assert_close(mine, right, **tolerance)
    grads = [torch.autograd.grad((torch.stack(list(result)).float() * weights).sum(), pair)[0] for result in (ours, theirs)]
    torch.testing.assert_close(*grads, **tolerance)


def test_a_third_less_is_kept_and_fewer_operators_are_launched():
    counts: list[tuple[int, int]] = []
    for change in (lambda _: None, lambda model: lean(model, remake=True)):
        transformer, _ = with_lora(LoraSpec(4, 4, "attention+ff"), torch.bfloat16)
        change(transformer)
        with Operators() as operators, kept_bytes(transformer) as kept, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            velocity(transformer, torch.bfloat16).float().square().mean().backward()
        counts.append((sum(kept.values()), sum(operators.counts.values())))
    (their_bytes, theirs), (our_bytes, ours) = counts
    assert our_bytes < 0.7 * their_bytes, f"{our_bytes} bytes, {their_bytes} without"
    assert ours < 0.8 * theirs, f"{ours} operators, {theirs} without"
