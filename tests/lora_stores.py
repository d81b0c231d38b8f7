"""A store on a server of this machine, and what tests ask of it."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from lora_server import LoraServer, lora_bytes

from infer.loras import LoraStore
from lorabooth.addresses import EVERYWHERE, Addresses
from lorabooth.errors import UserError

LORA, OTHER = lora_bytes(100_000), lora_bytes(100_000, "OTHER")
SECRET = "s3cret-key"


def new_store(site: LoraServer, tmp_path: Path, notices: list[str], **settings: Any) -> LoraStore:
    ours = {"addresses": Addresses(EVERYWHERE), "civitai": site.base, "notice": notices.append, "show": False, "pause_seconds": 0.01}
    return LoraStore(tmp_path / "cache", **(ours | settings))


def data_of(store: LoraStore, reference: str) -> bytes:
    return store.resolve(reference).file.path.read_bytes()


def statuses(site: LoraServer, path: str) -> list[int]:
    return [call.status for call in site.asked(path)]


def cached(store: LoraStore) -> set[str]:
    return {file.stem for file in store.cache.files.glob("*/*")}


def litter(store: LoraStore) -> list[str]:
    return [file.name for file in store.cache.parts.iterdir()]


def problem(store: LoraStore, reference: str) -> UserError:
    with pytest.raises(UserError) as caught:
        store.resolve(reference)
    assert "\n" not in caught.value.message and SECRET not in str(caught.value)
    return caught.value


def civitai_pages(site: LoraServer, **version: Any) -> None:
    """A page 12 with the versions 34 (the newest, no safetensors) and 33; what is special about 33 by keyword."""
    files = [
        {"name": "data.zip", "type": "Training Data", "downloadUrl": f"{site.base}/api/download/models/33?type=Training%20Data"},
        {"name": "old.pt", "type": "Model", "primary": True, "downloadUrl": f"{site.base}/api/download/models/33?format=PickleTensor"},
        {"name": "small.safetensors", "type": "Model", "metadata": {"format": "SafeTensor", "size": "pruned"}, "downloadUrl": f"{site.base}/small"},
        {
            "name": "My LoRA v2.safetensors", "type": "Model", "primary": True, "sizeKB": len(LORA) / 1024,
            "metadata": {"format": "SafeTensor", "size": "full"},
            "hashes": {"SHA256": hashlib.sha256(LORA).hexdigest().upper()}, "downloadUrl": f"{site.base}/api/download/models/33",
        },
    ]  # fmt: skip
    site.put("/api/v1/models/12", {"id": 12, "modelVersions": [{"id": 34, "files": [{"name": "a.pt"}]}, {"id": 33, "files": files}]})
    site.put("/api/v1/model-versions/33", {"id": 33, "modelId": 12, "files": files} | version)
    site.put("/api/v1/model-versions/34", {"id": 34, "modelId": 12, "files": [{"name": "a.pt", "type": "Model"}]})
    site.put("/api/download/models/33", status=307, location=site.put("/storage/file?sig=1", LORA))
    site.put("/small", OTHER)
