"""The captions benchmark: the whole of it on a tiny model."""

import json
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from click.testing import CliRunner
from transformers import LlavaConfig, LlavaForConditionalGeneration

from captioning import vision
from scripts import bench_captions, random_llava


def test_a_tiny_model_is_timed_in_both_precisions_at_every_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vision, "NEW_TOKENS", 16)
    monkeypatch.setattr(bench_captions, "NEW_TOKENS", 16)
    out = tmp_path / "results" / "captions.json"
    done = CliRunner().invoke(bench_captions.bench, ["--tiny", "--rounds", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert [(row["precision"], row["batch"]) for row in record["rows"]] == [("bf16", 1), ("bf16", 8), ("nf4", 1), ("nf4", 8)]
    for row in record["rows"]:
        assert 0 < row["p10_seconds"] <= row["seconds"] <= row["p90_seconds"]
        assert row["photos_per_second"] == row["batch"] / row["seconds"] and row["new_tokens_per_second"] == 16 * row["photos_per_second"]
    assert record["gpu"] is None and record["new_tokens"] == 16 and record["machine"]["versions"]["transformers"]
    assert "| nf4 | 8 |" in done.output and "on the CPU" in done.output


def test_a_precision_that_fails_is_a_row_and_the_other_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def rows(_: Path, __: list[Path], precision: str, *___: object):
        if precision == "nf4":
            raise RuntimeError("no kernel for it")
        yield {"precision": precision, "batch": 1, "seconds": 1.0}

    monkeypatch.setattr(bench_captions, "time_precision", rows)
    monkeypatch.setattr(bench_captions, "table", str)
    out = tmp_path / "captions.json"
    assert CliRunner().invoke(bench_captions.bench, ["--tiny", "--rounds", "2", "--out", str(out)]).exit_code == 0
    kept, failed = json.loads(out.read_text())["rows"]
    assert kept["seconds"] == 1 and failed == {"precision": "nf4", "failed": "RuntimeError: no kernel for it"}


def test_the_large_model_has_the_size_of_llava_1_5_7b():
    config = LlavaConfig(
        text_config=random_llava.SEVEN_B.text | {"model_type": "llama"}, vision_config=random_llava.SEVEN_B.vision | {"model_type": "clip_vision_model"}
    )
    with init_empty_weights():
        model = LlavaForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == 7_063_427_072  # as the hub counts it


def test_a_prompt_has_about_as_many_tokens_as_llavas_own_tokenizer_makes():
    words = random_llava.tokenizer()
    for _, instruction in random_llava.STYLES.values():
        assert len(words(instruction).input_ids) < 2 * len(instruction.split())


def test_without_a_gpu_the_true_size_is_refused():
    done = CliRunner().invoke(bench_captions.bench, [])
    assert done.exit_code == 1 and "finds no CUDA GPU" in done.output
