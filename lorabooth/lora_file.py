"""`LoraFile`: what the header of a LoRA file says. Nothing here imports torch: a list of many files is to be there at once."""

import hashlib
import json
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorabooth.errors import UserError, is_utf8
from lorabooth.keys import other_method
from lorabooth.runs import sha256_file

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; kohya's trainer writes every tag of every caption into it."""
AND = " and "
"""Between the trigger words of several."""


class NoLora(UserError):
    """A whole safetensors file with something else in it."""


@dataclass(frozen=True)
class LoraFile:
    """What the header of a LoRA file says; the weights stay on the disk."""

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str] = field(default_factory=dict)
    """Of each tensor, by safetensors' names: F32, BF16, F16."""

    @classmethod
    def read(cls, path: Path) -> "LoraFile":
        """Check that a file is a whole safetensors file with a LoRA in it; a UserError says what it is instead."""
        if not is_utf8(str(path)):
            raise UserError(f"{path} has a name that is not text in UTF-8", hint="rename it")
        header = _read_header(path)
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        if not any("lora" in name for name in shapes) and not other_method(shapes):  # which has a sentence of its own where its tensors are read
            raise NoLora(f"{path} holds no LoRA: none of its {len(shapes)} tensors is named lora")
        return cls(path, metadata, shapes, {name: str(entry.get("dtype", ""))[:16] for name, entry in header.items()})

    @property
    def name(self) -> str:
        """What to call it: the run's folder for our own files, the repository for those in the hub's cache, else the file's stem."""
        if self.path.parent.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/<commit>/lora.safetensors
            return self.path.parents[2].name.removeprefix("models--").replace("--", "/")
        return self.path.parent.name if self.path.name == "lora.safetensors" else self.path.stem

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the file."""
        return sha256_file(self.path)

    @cached_property
    def tensors_sha256(self) -> str:
        """Hex digest of what follows the header: the hash by which kohya's trainer, AUTOMATIC1111 and CivitAI know a LoRA."""
        with self.path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def trigger_word(self) -> str:
        """The trigger word, where the file tells it; of a LoRA that was made of several, all their words."""
        return self.metadata.get("modelspec.trigger_phrase", "")

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """Each trigger word by itself."""
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            words = [word for one in json.loads(self.metadata.get("lorabooth.made_of", "[]")) for word in one.get("trigger_words", [])]
            if words and AND.join(words) == self.trigger_word:
                return tuple(words)
        return (self.trigger_word,)


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Format: 8 bytes length (little endian), JSON, tensor bytes."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file that can be read at any place of it", hint="download it into a file")
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path} is not a safetensors file", hint="only safetensors is read: other formats can run code when loaded")
            header = json.loads(file.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            if not isinstance(header.get("__metadata__", {}), dict) or not all(_is_shape(entry["shape"]) for entry in entries):
                raise TypeError("a header of another shape than safetensors'")
            end = _end([entry["data_offsets"] for entry in entries])
        if (size := path.stat().st_size) != 8 + length + end:
            what = "is cut short" if size < 8 + length + end else "is longer than it should be"
            raise UserError(f"{path} {what}: it should have {8 + length + end} bytes and has {size}", hint="download it again, or copy it again")
    except FileNotFoundError:
        raise UserError(f"no LoRA file at {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        no_json = isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError)
        raise UserError(f"{path} is not a safetensors file: its header is {'no JSON' if no_json else 'not as that format has it'}") from None
    return header


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def _end(offsets: list[Any]) -> int:
    """Where the last tensor ends. The format wants each to begin where another ends; raises ValueError where one does not."""
    end = 0
    for first, last in sorted((first, last) for first, last in offsets):
        if type(first) is not int or type(last) is not int or first != end or last < first:
            raise ValueError("tensors that overlap, or a hole between them")
        end = last
    return end
