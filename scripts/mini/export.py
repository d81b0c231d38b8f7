"""Stage 7: put the parts together as a diffusers pipeline folder."""

import shutil
from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from scripts.mini.base import new_transformer
from scripts.mini.common import Training


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler; the shift is set for 64 image tokens, the mini model's square picture."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=64, max_image_seq_len=256, base_shift=0.5, max_shift=1.15)


def export(out: Path, weights: Path, target: Path) -> None:
    """Write the pipeline with the averaged weights of a stage's state file."""
    clip, t5 = CLIPTokenizer.from_pretrained(out / "tokenizer"), T5Tokenizer.from_pretrained(out / "tokenizer_2")
    transformer = new_transformer()
    Training(transformer, weights, peak=0, steps=1).load_ema()
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    FluxPipeline(
        scheduler=new_scheduler(),
        vae=AutoencoderKL.from_pretrained(out / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder"),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel.from_pretrained(out / "text_encoder_2"),
        tokenizer_2=t5,
        transformer=transformer,
    ).save_pretrained(part)
    shutil.rmtree(target, ignore_errors=True)
    part.replace(target)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    assert size <= 40e6, f"the mini model is {size / 1e6:.1f} MB; at most 40 MB may be committed"
    print(f"{target}: {size / 1e6:.1f} MB")
