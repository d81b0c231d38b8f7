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
EMPTY = "empty"


@dataclass(frozen=True)
class Item:
    """One photo at one resolution."""

    photo: str
    bucket: Bucket

    @property
    def latents_name(self) -> str:
        """File name of the cached latents."""
        return f"{self.photo}-{self.bucket.width_px}x{self.bucket.height_px}.safetensors"


def text_name(stem: str) -> str:
    """File name of a cached conditioning."""
    return f"{stem}.text.safetensors"


def items(manifest: Manifest, config: TrainConfig) -> list[Item]:
    """Every photo at every resolution, once where two resolutions give the same bucket."""
    found = [Item(stem(photo), Bucket.nearest(photo.width_px, photo.height_px, px)) for photo in manifest.photos for px in config.resolutions_px]
    return list(dict.fromkeys(found))


def stem(photo: Photo) -> str:
    """`00001` of `00001.png`."""
    return Path(photo.file).stem


@dataclass(frozen=True)
class Batch:
    """One step's input: latents [B, 16, h, w], conditioning, and which photos they are."""

    latents: Tensor
    conditioning: Conditioning
    photos: tuple[str, ...]


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
        return Conditioning(torch.stack([f["embeds"] for f in files]), torch.stack([f["pooled"] for f in files]))

    def batch(self, picked: list[Item], dropout: float, rng: random.Random) -> Batch:
        """The tensors of some items; a share `dropout` of captions is replaced by the bare trigger."""
        latents = torch.stack([self._file(item.latents_name)["latents"] for item in picked])
        stems = [TRIGGER_ONLY if rng.random() < dropout else item.photo for item in picked]
        return Batch(latents, self.conditioning(stems), tuple(item.photo for item in picked))


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
