"""A pipeline as FLUX.1-dev's repository on the hub holds it, which diffusers 0.30 and transformers 4.43 wrote, and later versions write otherwise.

Transformer and T5 are in several files with an index; CLIP's tensors have `text_model.` before their names and its tokenizer is `vocab.json` and
`merges.txt`; configs name folders and repositories of their authors; and beside the components lie the same weights once more, for other programs.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

OTHERS = ("flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg")
"""24 GB that no component needs."""
CLIP_ORIGIN = "openai/clip-vit-large-patch14"


def dev_layout(source: Path, folder: Path) -> Path:
    """Write the pipeline in `source` so into `folder`, with the same weights to the bit."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for part, of, size in (("transformer", FluxTransformer2DModel, "20KB"), ("text_encoder_2", T5EncoderModel, "10KB")):
        shutil.rmtree(folder / part)
        of.from_pretrained(source / part).save_pretrained(folder / part, max_shard_size=size)
    _change(folder / "transformer/config.json", {"_diffusers_version": "0.30.0.dev0", "_name_or_path": "../checkpoints/flux-dev/transformer"})
    of_t5 = {"_name_or_path": "google/t5-v1_1-xxl", "is_encoder_decoder": True, "output_past": True, "tie_word_embeddings": False, "use_cache": True}
    _change(folder / "text_encoder_2/config.json", of_t5 | {"torch_dtype": "bfloat16", "transformers_version": "4.43.3"})
    clip = {"_name_or_path": CLIP_ORIGIN, "dropout": 0.0, "torch_dtype": "bfloat16", "transformers_version": "4.43.3"}
    _change(folder / "text_encoder/config.json", clip)
    weights = folder / "text_encoder/model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    _split_tokenizer(folder / "tokenizer")
    _change(folder / "tokenizer_2/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "legacy": True, "sp_model_kwargs": {}})
    for name in OTHERS:
        (folder / name).write_bytes(b"not for us")
    return folder


def _change(file: Path, values: dict[str, Any]) -> None:
    kept = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("dtype", "backend", "is_local", "local_files_only")}
    file.write_text(json.dumps(kept | values, indent=2))


def _split_tokenizer(folder: Path) -> None:
    """CLIP's `tokenizer.json` as the files from before there was one."""
    whole = folder / "tokenizer.json"
    model = json.loads(whole.read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    start, end = (
        {"content": token, "lstrip": False, "normalized": first, "rstrip": False, "single_word": False}
        for token, first in (("<|startoftext|>", True), ("<|endoftext|>", False))
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}))
    added = {str(model["vocab"][token["content"]]): token | {"special": True} for token in (start, end)}
    _change(folder / "tokenizer_config.json", {"added_tokens_decoder": added, "add_prefix_space": False, "do_lower_case": True, "errors": "replace"})
    whole.unlink()
