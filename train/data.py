"""What a run trains on, and in which order.

The order is a pure function of the seed and the step, so a resumed run needs no sampler state: step n draws what it
would have drawn without the interruption.
"""

import hashlib
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families.flux1 import Conditioning
from lorabooth.photos import Bucket, Manifest, Photo
from lorabooth.runs import RunDir, write_durable

TRIGGER_ONLY = "trigger"
"""Stem of the cached conditioning of the bare trigger word: what a dropped caption trains on."""
CLASS_SUFFIX = "-class"
"""Ends the stem of a caption in which the class phrase stands for the trigger."""
CLASS_PREFIX = "class-"
"""Begins the stems of the photos of others in the cache."""
EMPTY = "empty"
"""Stem of the cached conditioning of no prompt: what a dropped caption of others trains on."""
EVERY = slice(None)


@dataclass(frozen=True)
class Item:
    """One photo at one resolution, as it is or mirrored."""

    photo: str
    bucket: Bucket
    flipped: bool = False

    @property
    def latents_name(self) -> str:
        """File name of the cached latents."""
        return f"{self.photo}-{self.bucket.width_px}x{self.bucket.height_px}{'-flipped' if self.flipped else ''}.safetensors"


def text_name(stem: str) -> str:
    """File name of a cached conditioning."""
    return f"{stem}.text.safetensors"


def items(manifest: Manifest, config: TrainConfig) -> list[Item]:
    """Every photo to train on at every resolution, once where two resolutions give the same bucket; mirrored ones beside them where asked for."""
    sides, held_out = (False, True) if config.horizontal_flip else (False,), _held_out(manifest, config)
    found = [
        Item(stem(photo), Bucket.nearest(photo.width_px, photo.height_px, px), flipped)
        for photo in manifest.photos
        if stem(photo) not in held_out
        for px in config.resolutions_px
        for flipped in sides
    ]
    return list(dict.fromkeys(found))


def class_photos(run: RunDir) -> dict[str, Photo]:
    """The photos of others (DreamBooth's prior preservation, Ruiz et al. 2023, arXiv 2208.12242) by their stems; none in most runs."""
    if not (run.others / "manifest.jsonl").exists():
        return {}
    return {CLASS_PREFIX + stem(photo): photo for photo in Manifest.load(run.others).photos}


def class_items(run: RunDir, config: TrainConfig) -> list[Item]:
    """The photos of others at every resolution; none where the recipe does not use them."""
    if not config.prior_rate:
        return []
    found = class_photos(run)
    if not found:
        raise UserError(f"prior_rate is {config.prior_rate} and {run.path} has no photos of others", hint="give some with --class-photos")
    buckets = [(name, Bucket.nearest(photo.width_px, photo.height_px, px)) for name, photo in found.items() for px in config.resolutions_px]
    return [Item(name, bucket) for name, bucket in dict.fromkeys(buckets)]


def validation_items(manifest: Manifest, config: TrainConfig) -> list[Item]:
    """The held-out photos at the largest resolution."""
    px, held_out = max(config.resolutions_px), _held_out(manifest, config)
    return [Item(stem(photo), Bucket.nearest(photo.width_px, photo.height_px, px)) for photo in manifest.photos if stem(photo) in held_out]


def _held_out(manifest: Manifest, config: TrainConfig) -> frozenset[str]:
    """Stems of the photos that are not trained on, drawn by the seed; a UserError where none would be left."""
    manifest.check_held_out(config.validation_photos)
    return frozenset(random.Random(f"{config.seed}/validation").sample([stem(photo) for photo in manifest.photos], config.validation_photos))


def stem(photo: Photo) -> str:
    """`00001` of `00001.png`."""
    return Path(photo.file).stem


@dataclass(frozen=True)
class Batch:
    """What a process computes in one go: latents [B, 16, h, w] with the weights [B, N, 1] of their image tokens in the loss,
    their conditioning and photos; the part `mine` of `whole` items."""

    latents: Tensor
    weights: Tensor
    conditioning: Conditioning
    photos: tuple[str, ...]
    whole: int
    mine: slice
    preserved: int
    """Of how many items of the whole, the first ones, the base's own prediction is the target. Each is the twin of one of the last."""

    @property
    def own_preserved(self) -> int:
        """How many of the preserved items are in this process's part."""
        return len(range(self.preserved)[self.mine])


def preserving(config: TrainConfig, size: int, draw: float) -> int:
    """How many items of a batch preserve, by a draw from [0, 1): as many of each batch as the rate says, not whole batches, so that both kinds
    pull at once and the weights swing less between them."""
    return int(config.preservation_rate * size + draw)


class Sampler:
    """Batches of one bucket in a seeded order; each photo is seen equally often, however few there are."""

    def __init__(self, all_items: list[Item], batch_size: int, seed: int):
        self.by_bucket: dict[Bucket, list[Item]] = defaultdict(list)
        for item in all_items:
            self.by_bucket[item.bucket].append(item)
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = len(all_items)
        """Batches in which each item is seen exactly `batch_size` times: so a shape of n items fills n whole batches."""

    def batch(self, index: int) -> list[Item]:
        """The items of the batch with this index, counted over all epochs."""
        return self._epoch(index // self.per_epoch)[index % self.per_epoch]

    @lru_cache(maxsize=2)  # noqa: B019 - a sampler lives as long as its process
    def _epoch(self, epoch: int) -> list[list[Item]]:
        rng = random.Random(f"{self.seed}/{epoch}")
        batches = []
        for group in self.by_bucket.values():
            order = [item for _ in range(self.batch_size) for item in rng.sample(group, len(group))]
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rng.shuffle(batches)
        return batches


class Cache:
    """Reads what `train encode` wrote; everything is small enough to be kept in host memory after the first use."""

    def __init__(self, run: RunDir):
        self.folder = run.cache
        self._kept: dict[str, dict[str, Tensor]] = {}

    def _file(self, name: str) -> dict[str, Tensor]:
        if name not in self._kept:
            try:
                self._kept[name] = load_file(self.folder / name)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.folder / name} is missing or damaged", hint=f"make it with: python -m train encode {self.folder.parent}") from error
        return self._kept[name]

    def conditioning(self, stems: list[str]) -> Conditioning:
        """Conditioning of several captions as one batch."""
        files = [self._file(text_name(s)) for s in stems]
        return Conditioning(**{name: torch.stack([file[name] for file in files]) for name in files[0]})

    def batch(self, picked: list[Item], config: TrainConfig, rng: random.Random, mine: slice = EVERY) -> Batch:
        """The tensors of some items. A share of captions is dropped to the bare trigger; a share of items gives its place to twins of the last ones,
        with the class phrase where the trigger was.

        mine: the part of the batch that this process computes; what is drawn is drawn for the whole, alike in all processes.
        """
        others = picked[0].photo.startswith(CLASS_PREFIX)
        dropped = EMPTY if others else TRIGGER_ONLY
        stems = [dropped if rng.random() < config.caption_dropout_rate else item.photo for item in picked]
        return self.compose(picked, stems, 0 if others else preserving(config, len(picked), rng.random()), mine)

    def compose(self, picked: list[Item], stems: list[str], preserved: int, mine: slice) -> Batch:
        """The tensors of some items that learn under the captions `stems`, where the first of them have given their place to twins of the last ones."""
        whole = len(picked)
        picked = picked[whole - preserved :] + picked[preserved:]
        stems = [item.photo + CLASS_SUFFIX for item in picked[:preserved]] + stems[preserved:]
        files = [self._file(item.latents_name) for item in picked[mine]]
        latents = torch.stack([file["latents"] for file in files])
        even = torch.ones(latents[0, 0].numel() // 4, 1)  # an image token is 2 x 2 cells
        weights = torch.stack([file.get("weights", even) for file in files])
        return Batch(
            latents,
            weights,
            self.conditioning(stems[mine]),
            tuple(item.photo for item in picked[mine]),
            whole,
            mine,
            preserved,
        )


def write_cached(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Write a cache file; `key` says what its tensors were made from."""
    stored = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_durable(path, save(stored, metadata={"key": key, "sha256": _digest(stored)}))


def cached_key(path: Path) -> str:
    """What a cache file was made from; empty where there is no file, or one whose tensors are not what was written."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            whole = metadata.get("sha256") == _digest({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError):  # damaged, or not there
        return ""
    return metadata.get("key", "") if whole else ""


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()
