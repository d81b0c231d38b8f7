"""Stage: photos and captions -> cached latents and text embeddings. Loads VAE, CLIP and T5; never the transformer."""

import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lorabooth.device import base_dtype, compute_device
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1 import Flux1
from lorabooth.photos import Manifest, fit
from lorabooth.runs import RunDir, sha256_file
from train.data import EMPTY, TRIGGER_ONLY, Item, cached_key, items, stem, text_name, write_cached

TEXT_BATCH = 8


def run(run_dir: RunDir) -> None:
    """Write whatever is missing from RUN/cache; a second run over complete caches loads no model."""
    with run_dir.locked():
        family = load_family(run_dir.config.model)
        manifest = Manifest.load(run_dir.path)
        _encode_pictures(run_dir, family, manifest)
        _encode_texts(run_dir, family, manifest)


def texts(run_dir: RunDir, manifest: Manifest) -> dict[str, str]:
    """Every text a run needs encoded, by its stem in the cache: captions, bare trigger, empty prompt, previews."""
    config = run_dir.config
    named = {stem(photo): _caption(run_dir, stem(photo)) for photo in manifest.photos}
    named |= {TRIGGER_ONLY: config.trigger_word, EMPTY: ""}
    return named | {preview_stem(i): p.replace("[trigger]", config.trigger_word) for i, p in enumerate(config.preview_prompts)}


def preview_stem(index: int) -> str:
    """Stem of a preview prompt in the cache."""
    return f"preview-{index}"


def _caption(run_dir: RunDir, name: str) -> str:
    file = run_dir.captions / f"{name}.txt"
    if not file.exists():
        raise UserError(f"photo {name} has no caption in {run_dir.captions}", hint=f"make captions with: python -m captioning {run_dir.path}")
    return file.read_text(encoding="utf-8")


def _encode_pictures(run_dir: RunDir, family: Flux1, manifest: Manifest) -> None:
    sha256 = {stem(photo): photo.sha256 for photo in manifest.photos}
    keys = {item: f"{family.model} {sha256[item.photo]} {item.latents_name}" for item in items(manifest, run_dir.config)}
    missing = [item for item, key in keys.items() if cached_key(run_dir.cache / item.latents_name) != key]
    if not missing:
        return
    device = compute_device()
    vae = family.vae(device, base_dtype(device))
    for item in tqdm(missing, desc="encode photos", unit="photo"):
        file = run_dir.photos / f"{item.photo}.png"
        if sha256_file(file) != sha256[item.photo]:
            raise UserError(f"{file} has changed since it was taken in", hint="start a new run with --out FOLDER")
        latents = family.encode_pictures(vae, pixels(file, item))[0].float().cpu()
        write_cached(run_dir.cache / item.latents_name, {"latents": latents}, keys[item])
    del vae
    _free()


def pixels(file: Path, item: Item) -> Tensor:
    """A stored photo cropped to its bucket: [1, 3, H, W] in -1..1."""
    with Image.open(file) as image:
        array = np.asarray(fit(image.convert("RGB"), item.bucket), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)[None]


def _encode_texts(run_dir: RunDir, family: Flux1, manifest: Manifest) -> None:
    wanted = texts(run_dir, manifest)
    keys = {name: f"{family.model} {hashlib.sha256(text.encode()).hexdigest()}" for name, text in wanted.items()}
    missing = [name for name, key in keys.items() if cached_key(run_dir.cache / text_name(name)) != key]
    if not missing:
        return
    device = compute_device()
    encoders = family.text_encoders(device, base_dtype(device))
    for chunk in tqdm(list(_chunks(missing, TEXT_BATCH)), desc="encode captions", unit="batch"):
        encoded = family.encode_prompts(encoders, [wanted[name] for name in chunk])
        for i, name in enumerate(chunk):
            write_cached(run_dir.cache / text_name(name), {"embeds": encoded.embeds[i], "pooled": encoded.pooled[i]}, keys[name])
    del encoders
    _free()


def _chunks(values: list[str], size: int) -> Iterator[list[str]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
