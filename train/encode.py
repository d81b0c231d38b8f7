"""Stage: photos and captions -> cached latents and text embeddings. Loads VAE, CLIP and T5; never the transformer."""

import gc
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from lorabooth.captions import enforce, one_line, surely_short
from lorabooth.config import TrainConfig
from lorabooth.device import base_dtype, compute_device
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1 import BUCKET_MULTIPLE_PX, Flux1
from lorabooth.notes import note
from lorabooth.photos import Bucket, Manifest, fit
from lorabooth.runs import RunDir, sha256_file
from train.base import pinned
from train.data import (
    CLASS_PREFIX,
    CLASS_SUFFIX,
    EMPTY,
    TRIGGER_ONLY,
    Item,
    cached_key,
    class_items,
    class_photos,
    items,
    stem,
    text_name,
    validation_items,
    write_cached,
)

TEXT_BATCH = 8
NAMED = 3
"""Photos that a note names; the others are counted."""


def run(run_dir: RunDir) -> None:
    """Write whatever is missing from RUN/cache; a second run over complete caches loads no model."""
    with run_dir.locked():
        family = load_family(run_dir.config.model)
        manifest = Manifest.load(run_dir.path)
        _encode_pictures(run_dir, family, manifest)
        _encode_texts(run_dir, family, manifest)


def texts(run_dir: RunDir, family: Flux1, manifest: Manifest) -> dict[str, str]:
    """Every text a run needs encoded, by its stem in the cache: captions (with the class phrase, too), bare trigger, empty prompt, previews."""
    config = run_dir.config
    named = {stem(photo): training_text(run_dir, family, stem(photo)) for photo in manifest.photos}
    if config.preservation_rate:
        named |= {name + CLASS_SUFFIX: of_class(text, config.trigger_word, config.class_phrase) for name, text in named.items()}
    if config.prior_rate:
        named |= {name: one_line(photo.caption or f"a photo of {config.class_phrase}") for name, photo in class_photos(run_dir).items()}
    named |= {TRIGGER_ONLY: config.trigger_word, EMPTY: ""}
    return named | {preview_stem(i): p.replace("[trigger]", config.trigger_word) for i, p in enumerate(config.preview_prompts)}


def of_class(caption: str, trigger: str, phrase: str) -> str:
    """A caption of anyone: `a TOK in a hat` becomes `a person in a hat`."""
    before, after = (r"(?<!\w)" if trigger[0].isalnum() else ""), (r"(?!\w)" if trigger[-1].isalnum() else "")
    return re.sub(rf"(?:\b(?:an?|the)\s+)?{before}{re.escape(trigger)}{after}", lambda _: phrase, caption)


def preview_stem(index: int) -> str:
    """Stem of a preview prompt in the cache."""
    return f"preview-{index}"


def training_text(run_dir: RunDir, family: Flux1, name: str) -> str:
    """What a photo trains on: its caption file, which stays as it is, on one line, with the trigger in it and no longer than T5 sees."""
    file = run_dir.captions / f"{name}.txt"
    if not file.exists():
        raise UserError(f"photo {name} has no caption in {run_dir.captions}", hint=f"make captions with: python -m captioning {run_dir.path}")
    try:
        caption = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"the caption {file} is not UTF-8 text", hint="save it as UTF-8, or delete it to have it made again") from None
    return enforce(caption, run_dir.config.trigger_word, fits=lambda text: surely_short(text, family.text_tokens) or family.sees_all_of(text))


def _encode_pictures(run_dir: RunDir, family: Flux1, manifest: Manifest) -> None:
    wanted = [*items(manifest, run_dir.config), *validation_items(manifest, run_dir.config), *class_items(run_dir, run_dir.config)]
    photos = {stem(photo): photo for photo in manifest.photos} | class_photos(run_dir)
    keys = {item: f"{family.model} {photos[item.photo].sha256} {photos[item.photo].mask_sha256} {item.latents_name}" for item in wanted}
    missing = [item for item, key in keys.items() if cached_key(run_dir.cache / item.latents_name) != key]
    if not missing:
        return
    for line in enlarged(manifest, run_dir.config):
        note(line)
    pinned(run_dir, "vae")
    device = compute_device()
    vae = family.vae(device, base_dtype(device))
    for item in tqdm(missing, desc="encode photos", unit="photo"):
        photo = photos[item.photo]
        folder = run_dir.others / "photos" if item.photo.startswith(CLASS_PREFIX) else run_dir.photos
        file = _whole(folder / photo.file, photo.sha256)
        encoded = {"latents": family.encode_pictures(vae, pixels(file, item))[0].float().cpu()}
        if photo.mask_sha256:
            encoded["weights"] = token_weights(_whole(folder / photo.mask_file, photo.mask_sha256), item)
        write_cached(run_dir.cache / item.latents_name, encoded, keys[item])
    del vae
    _free()


def enlarged(manifest: Manifest, config: TrainConfig) -> list[str]:
    """A line for each resolution that photos do not reach: enlarging invents no detail, and a LoRA learns the blur."""
    lines = []
    for px in config.resolutions_px:
        small = []
        for photo in manifest.photos:
            bucket = Bucket.nearest(photo.width_px, photo.height_px, px)
            if max(bucket.width_px / photo.width_px, bucket.height_px / photo.height_px) > 1.05:  # less is not seen
                small.append(f"{photo.original} ({photo.width_px} x {photo.height_px})")
        if small:
            named = ", ".join(small[:NAMED]) + (f" and {len(small) - NAMED} more" if len(small) > NAMED else "")
            lines.append(f"{len(small)} of {len(manifest.photos)} photos are enlarged to train at {px} px: {named}; a lower --resolution would not")
    return lines


def _whole(file: Path, sha256: str) -> Path:
    if not file.exists():
        raise UserError(f"{file} is gone", hint=f"delete {file.parent.parent / 'manifest.jsonl'} too, and run the same command again: the photos are read anew")
    if sha256_file(file) != sha256:
        raise UserError(f"{file} has changed since it was taken in", hint="start a new run with --out FOLDER")
    return file


def pixels(file: Path, item: Item) -> Tensor:
    """A stored photo cropped to its bucket, mirrored where the item is: [1, 3, H, W] in -1..1."""
    array = _fitted(file, "RGB", item)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)[None]


def token_weights(mask: Path, item: Item) -> Tensor:
    """A stored mask as weights [N, 1] of a picture's image tokens in the loss, mean 1; even where the crop leaves nothing of it."""
    pixels = torch.from_numpy(_fitted(mask, "L", item) / 255)
    weights = F.avg_pool2d(pixels[None], BUCKET_MULTIPLE_PX).reshape(-1, 1)  # an image token holds 16 x 16 px
    return weights / weights.mean() if weights.mean() > 1e-3 else torch.ones_like(weights)


def _fitted(file: Path, mode: str, item: Item) -> NDArray[np.float32]:
    with Image.open(file) as image:
        fitted = fit(image.convert(mode), item.bucket)
    return np.asarray(ImageOps.mirror(fitted) if item.flipped else fitted, dtype=np.float32)


def _encode_texts(run_dir: RunDir, family: Flux1, manifest: Manifest) -> None:
    wanted = texts(run_dir, family, manifest)
    keys = {name: f"{family.model} with ids {hashlib.sha256(text.encode()).hexdigest()}" for name, text in wanted.items()}
    missing = [name for name, key in keys.items() if cached_key(run_dir.cache / text_name(name)) != key]
    if not missing:
        return
    pinned(run_dir, "text_encoder")
    pinned(run_dir, "text_encoder_2")
    device = compute_device()
    encoders = family.text_encoders(device, base_dtype(device))
    for chunk in tqdm(list(_chunks(missing, TEXT_BATCH)), desc="encode captions", unit="batch"):
        encoded = family.encode_prompts(encoders, [wanted[name] for name in chunk])
        for i, name in enumerate(chunk):
            write_cached(run_dir.cache / text_name(name), {field: tensor[i] for field, tensor in vars(encoded).items()}, keys[name])
    del encoders
    _free()


def _chunks(values: list[str], size: int) -> Iterator[list[str]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
