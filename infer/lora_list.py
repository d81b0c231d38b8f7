"""The LoRAs of this machine: of the runs, of the download cache, of the hub's cache. Only headers are read, and torch is not imported."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from infer import lora_facts
from infer.lora_cache import LoraCache
from lorabooth.errors import UserError
from lorabooth.home import cache_folder
from lorabooth.lora_file import LoraFile, NoLora

SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
"""A part of a model that is too large for one file; no LoRA is."""


@dataclass(frozen=True)
class Listed:
    """One file, and what its header says; `problem` where that cannot be read."""

    name: str
    source: str
    """What it was asked for by: a run folder, an address, a repository of the hub."""
    kind: str
    """run, download or hub."""
    path: str
    bytes: int
    date: str
    """When the file was written; of a download, when it was last used."""
    trigger_word: str = ""
    base: str = ""
    rank: str = ""
    problem: str = ""


def listed(runs: Path) -> list[Listed]:
    """All that are found, runs first, each kind by its name."""
    found = [*_of_runs(runs), *_of_cache(cache_folder("loras")), *_of_hub(hub_cache())]
    return sorted((one for one in found if one), key=lambda one: (("run", "download", "hub").index(one.kind), one.name.lower(), one.source))


def hub_cache() -> Path:
    """Where the hub's client keeps what it downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _of_runs(folder: Path) -> Iterator[Listed | None]:
    for file in folder.glob("*/lora.safetensors"):
        yield _read(file, "run", str(file.parent))


def _of_cache(folder: Path) -> Iterator[Listed | None]:
    cache = LoraCache(folder, 0)
    sources: dict[str, list[str]] = defaultdict(list)
    for file in sorted(cache.records.glob("*.json")):
        if record := cache.record(file.stem):
            sources[str(record.sha256)].append(str(record.source))
    for file in cache.files.glob("*/*.safetensors"):
        yield _read(file, "download", ", ".join(sources.get(file.parent.name, ["(unknown)"])))


def _of_hub(folder: Path) -> Iterator[Listed | None]:
    for repository in folder.glob("models--*--*/snapshots"):
        name = repository.parent.name.removeprefix("models--").replace("--", "/")
        seen: set[Path] = set()
        for file in repository.glob("*/**/*.safetensors"):
            content = file.resolve()  # one content is in the snapshot of each commit that has it
            if content in seen or SHARD.search(file.name):
                continue
            seen.add(content)
            inner = "/".join(file.relative_to(repository).parts[1:])
            yield _read(file, "hub", name if inner == "lora.safetensors" else f"{name}/{inner}")


def _read(path: Path, kind: str, source: str) -> Listed | None:
    """The row of a file; None where it holds no LoRA, or is gone already."""
    name = {"run": path.parent.name, "download": path.stem, "hub": source.rsplit("/", 1)[-1].removesuffix(".safetensors")}[kind]
    try:
        status = path.stat()
        date = datetime.fromtimestamp(status.st_mtime, UTC).strftime("%Y-%m-%d")
        row = Listed(name, source, kind, str(path), status.st_size, date)
        file = LoraFile.read(path)
    except FileNotFoundError:
        return None
    except NoLora as error:
        return None if kind == "hub" else _damaged(row, error.message)
    except UserError as error:
        return _damaged(row, error.message)
    except OSError as error:
        return Listed(name, source, kind, str(path), 0, "", problem=f"cannot be read: {error.strerror}")
    return Listed(name, source, kind, str(path), status.st_size, date, file.trigger_word, lora_facts.base(file), lora_facts.rank_text(file))


def _damaged(row: Listed, message: str) -> Listed:
    return Listed(row.name, row.source, row.kind, row.path, row.bytes, row.date, problem=message.removeprefix(row.path).strip())
