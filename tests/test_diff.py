"""`lorabooth diff`: the same function in any two formats, what differs by name, and figures that are those of the whole matrices."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_formats as formats
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_formats import Pairs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabooth.cli import main
from lorabooth.comparison import compare, compared, cosine, difference, norm, overall
from lorabooth.families.flux1 import TARGETS, Flux1
from lorabooth.layout import Layout, sizes_of
from lorabooth.lora import LoraSpec
from lorabooth.lowrank import Additions, LowRank

FAMILY = Flux1("mini")
LAYOUT = Layout(sizes_of(FAMILY.empty_transformer()))
TO_Q = "transformer_blocks.0.attn.to_q"


def drawn_pairs(seed: int = 0, rank: int = 4) -> Pairs:
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in LoraSpec(rank, rank, TARGETS["all-linear"]).module_names(FAMILY.empty_transformer()):
        outputs, inputs = LAYOUT.sizes[name]
        found[name] = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    return found


def of_mini(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors, **metadata: str) -> Path:
    """The same file with the base in its metadata, which other trainers' files do not name."""
    with safe_open(path, "pt") as opened:
        told = opened.metadata() or {}
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, told | {"lorabooth.base": "mini"} | metadata)
    return path


def diff(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["diff", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def diff_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code, out, _ = diff(capsys, *arguments, "--json")
    return code, json.loads(out)


@pytest.mark.parametrize("writer", formats.WRITERS)
def test_one_lora_in_two_formats_is_the_same(writer: Callable[[Path, Pairs], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs = drawn_pairs()
    first, second = of_mini(formats.diffusers(tmp_path / "a.safetensors", pairs)), of_mini(writer(tmp_path / "b" / "b.safetensors", pairs))
    code, found = diff_json(capsys, first, second)
    assert (code, found["same"], found["only_in_a"], found["only_in_b"]) == (0, True, [], [])
    assert found["largest"] < 1e-6 and found["cosine"] == pytest.approx(1) and len(found["layers"]) == len(pairs)
    code, out, _ = diff(capsys, first, second)
    assert code == 0 and out.splitlines()[-1].startswith("the same function")


def test_kohya_and_bfl_are_the_same_to_the_rounding_of_the_coarser(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs = drawn_pairs()
    kohya = of_mini(formats.kohya(tmp_path / "k.safetensors", pairs))
    for dtype, least in ((torch.bfloat16, 1e-3), (torch.float16, 1e-4)):
        bfl = of_mini(formats.comfyui(tmp_path / "c.safetensors", pairs), lambda tensors, dtype=dtype: {name: t.to(dtype) for name, t in tensors.items()})
        code, found = diff_json(capsys, kohya, bfl)
        assert code == 0 and least < found["largest"] < found["tolerance"] < 0.02, dtype


def test_a_changed_layer_is_named_and_the_others_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs = drawn_pairs()
    down, up = pairs[TO_Q]
    other = pairs | {TO_Q: (down, up * 1.1)}
    code, out, _ = diff(capsys, of_mini(formats.kohya(tmp_path / "a.safetensors", pairs)), of_mini(formats.comfyui(tmp_path / "b.safetensors", other)))
    assert code == 1 and out.splitlines()[-1] == "different"
    rows = [line for line in out.splitlines() if line.startswith("transformer.")]
    assert rows[0].split()[:2] == [f"transformer.{TO_Q}", "9.09e-02"] and all(float(row.split()[1]) < 1e-6 for row in rows[1:])


def test_layers_of_only_one_are_listed_but_not_those_that_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs, names = drawn_pairs(), list(drawn_pairs())
    first = {name: both for name, both in pairs.items() if name != names[0]}
    second = {name: both for name, both in pairs.items() if name != names[1]} | {names[2]: (pairs[names[2]][0], torch.zeros_like(pairs[names[2]][1]))}
    first.pop(names[2])
    files = of_mini(formats.diffusers(tmp_path / "a.safetensors", first)), of_mini(formats.diffusers(tmp_path / "b.safetensors", second))
    code, found = diff_json(capsys, *files)
    assert code == 1 and found["only_in_a"] == [f"transformer.{names[1]}"] and found["only_in_b"] == [f"transformer.{names[0]}"]
    code, out, _ = diff(capsys, *files)
    assert f"1 only in A: transformer.{names[1]}" in out and f"1 only in B: transformer.{names[0]}" in out


def test_weights_count_and_metadata_that_differs_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = of_mini(formats.diffusers(tmp_path / "a.safetensors", drawn_pairs()), **{"modelspec.trigger_phrase": "TOK", "same": "1"})
    second = of_mini(formats.diffusers(tmp_path / "b.safetensors", drawn_pairs()), **{"modelspec.trigger_phrase": "\x1b[2JINK" + "x" * 100_000, "same": "1"})
    code, found = diff_json(capsys, f"{first}:0.5", second)
    assert code == 1 and found["difference"] == pytest.approx(0.5) and found["cosine"] == pytest.approx(1)
    assert found["metadata"].keys() == {"modelspec.trigger_phrase"}
    code, out, _ = diff(capsys, first, second)
    assert code == 0 and "TOK" in out and "?[2JINK" in out and "\x1b" not in out and max(map(len, out.splitlines())) < 400


def test_the_scales_of_a_dora_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = f"transformer.{TO_Q}"

    def file(stem: str, *scales: Tensor) -> Path:
        tensors = {f"{name}.lora_A.weight": torch.ones(2, 224), f"{name}.lora_B.weight": torch.ones(224, 2)}
        return of_mini(formats.write(tmp_path / f"{stem}.safetensors", tensors | {f"{name}.lora_magnitude_vector": scale for scale in scales}))

    plain, dora, other = file("plain"), file("dora", torch.ones(224)), file("other", torch.full((224,), 1.25))
    assert diff(capsys, dora, dora)[0] == 0
    code, found = diff_json(capsys, dora, other)
    assert code == 1 and found["layers"][0]["magnitude"] == pytest.approx(0.2) and found["layers"][0]["relative"] == 0
    code, out, _ = diff(capsys, plain, dora)
    assert code == 1 and "DORA SCALES" in out


def test_what_cannot_be_compared_is_one_sentence_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good = of_mini(formats.diffusers(tmp_path / "a.safetensors", drawn_pairs()))
    nan = of_mini(formats.write(tmp_path / "n.safetensors", {f"transformer.{TO_Q}.lora_A.weight": torch.full((2, 224), torch.nan)}))
    wide = formats.write(tmp_path / "w.safetensors", {f"transformer.{TO_Q}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"})
    for other, words in ((nan, "not finite"), (wide, "does not fit mini"), (tmp_path / "none.safetensors", "no LoRA at")):
        code, out, err = diff(capsys, good, other)
        assert (code, out) == (2, "") and words in err and "Traceback" not in err


# Figures


def low_rank(outputs: int, inputs: int, rank: int, seed: int, size: float) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inputs, generator=generator) * size, torch.randn(outputs, rank, generator=generator))


SIZES = st.sampled_from([1e-6, 1e-3, 1.0, 1e3])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 50), st.integers(0, 50), st.integers(0, 9), SIZES, SIZES)
def test_figures_are_those_of_the_whole_matrices(outputs: int, inputs: int, rank: int, other_rank: int, seed: int, size: float, other_size: float):
    one, other = low_rank(outputs, inputs, rank, seed, size), low_rank(outputs, inputs, other_rank, seed + 1, other_size)
    a, b = (part.up.double() @ part.down.double() for part in (one, other))
    found, larger = compare("x", one, other), max(float(a.norm()), float(b.norm()))
    assert found.relative == pytest.approx(float((a - b).norm()) / larger if larger else 0.0, rel=1e-9, abs=1e-12)
    assert (found.first, found.second) == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-9)
    assert found.inner == pytest.approx(float((a * b).sum()), rel=1e-9, abs=1e-9 * float(a.norm() * b.norm()))
    assert norm(one) == pytest.approx(float(a.norm()), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-13, 1e-2), st.integers(0, 9))
def test_a_small_difference_of_large_matrices_is_not_lost_in_rounding(share: float, seed: int):
    # The same change plus a small one, as one LoRA of more rank: in squares of norms nothing of it would be left below 1e-8.
    one, extra = low_rank(64, 48, 8, seed, 1.0), low_rank(64, 48, 1, seed + 20, 1.0)
    more = LowRank(torch.cat([one.down, extra.down]).double(), torch.cat([one.up.double(), share * extra.up.double()], 1))
    right = share * norm(extra) / norm(one)
    assert compare("x", one, more).relative == pytest.approx(right, rel=1e-2)


def test_all_layers_together():
    first, second = low_rank(6, 5, 2, 0, 1.0), low_rank(6, 5, 2, 1, 1.0)
    one, other = Additions({"a": first, "b": second}, {}, ()), Additions({"a": LowRank(first.down, -first.up)}, {"c": second}, ())
    layers = compared(one, other)
    assert [layer.name for layer in layers] == ["transformer.a", "transformer.b", "text_encoder.c"]
    assert [layer.relative for layer in layers] == pytest.approx([2, 1, 1])
    size = (norm(first) ** 2 + norm(second) ** 2) ** 0.5
    assert cosine(layers) == pytest.approx(-((norm(first) / size) ** 2))
    assert overall(layers) == pytest.approx((4 * norm(first) ** 2 + 2 * norm(second) ** 2) ** 0.5 / size)
    assert difference(one, one) == 0 and difference(one, other) == pytest.approx(2)
    assert compared(Additions({}, {}, ()), Additions({}, {}, ())) == [] and cosine([]) != cosine([])
