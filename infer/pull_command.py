"""`lorabooth pull`: a LoRA from anywhere as a file of the user's, whole or not at all, and never over another one."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import click

from infer import lora_facts
from infer.loras import PLAIN_NAMES, plain, unweighted
from lorabooth.adapter_config import described_beside
from lorabooth.arguments import LORA, Location
from lorabooth.errors import UserError
from lorabooth.home import expanded
from lorabooth.keys import ADAPTER_CONFIG
from lorabooth.lora_file import LoraFile
from lorabooth.notes import note
from lorabooth.runs import durable_file, prepared, sha256_file

COPY_BYTES = 1 << 20


@click.command()
@click.argument("reference", type=LORA, metavar="HUB-ID|URL|RUN|FILE")
@click.option(
    "--out", type=Location(path_type=str), help="File to write, or a folder (ComfyUI's models/loras, say). [default: NAME.safetensors in this folder]"
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON: the file, its size and hash, and what it says of itself.")
def pull(reference: str, out: str | None, as_json: bool) -> None:
    """Fetch a LoRA from the hub, CivitAI, an https address or a hosted trainer's tar; check it, and copy it to a file of yours.

    A download that broke off goes on where it stopped. A file that is there already is never overwritten.

    \b
    Example:
      lorabooth pull owner/name
    Example, for ComfyUI:
      lorabooth pull "https://civitai.com/models/12345?modelVersionId=678" --out ComfyUI/models/loras/
    """
    folder, name = _place(out)
    with prepared(folder):
        file = unweighted(reference, "to copy: the file stays as it is")
        target = folder / (name or f"{_name(file)}.safetensors")
        sha256 = copy(file, target)
    if described_beside(file):
        note(f"the strength of this LoRA, which PEFT keeps in {ADAPTER_CONFIG}, is in the copy's metadata; for other programs use lorabooth convert")
    told = {"file": str(target), "bytes": target.stat().st_size, "sha256": sha256, "name": file.name, "trigger_word": file.trigger_word}
    click.echo(json.dumps(told | {"base": lora_facts.base(file)}) if as_json else str(target))


def copy(file: LoraFile, target: Path) -> str:
    """Write a LoRA to a new file and return its SHA-256; where the same one is there already, that will do.

    A UserError where something else is there; nothing is left behind where the disk is full.
    """
    digest = hashlib.sha256()
    try:
        if target.exists() or target.is_symlink():
            raise FileExistsError
        with durable_file(target, new=True) as out:
            for block in _content(file):
                digest.update(block)
                out.write(block)
            if not described_beside(file) and digest.hexdigest() != file.sha256:
                raise UserError(f"{file.path} changed while it was copied", hint="run the same command again")
    except FileExistsError:
        return _already(file, target)
    return digest.hexdigest()


def _already(file: LoraFile, target: Path) -> str:
    wanted = hashlib.sha256()
    for block in _content(file):
        wanted.update(block)
    if not target.is_file() or sha256_file(target) != wanted.hexdigest():
        raise UserError(f"there is another {target} already", hint="name another file or folder with --out; nothing is overwritten")
    note(f"{target} is there already, the same")
    return wanted.hexdigest()


def _place(out: str | None) -> tuple[Path, str]:
    """The folder of the new file, and its name where that is given."""
    path = expanded(out or ".")
    if out is None or path.is_dir() or out.endswith("/"):
        return path, ""
    if path.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors, or be a folder", hint=f"for a new folder write {out}/")
    return path.parent, path.name


def _name(file: LoraFile) -> str:
    """The last part of what the file is called that tells it from others."""
    stem = file.path.stem
    above = PurePosixPath(file.name).name if file.name != stem else file.path.resolve().parent.name
    return plain(above if stem in PLAIN_NAMES else stem) or "lora"


def _content(file: LoraFile) -> Iterator[bytes]:
    """The bytes of the file. PEFT keeps a LoRA's strength in a file beside it, which a copy would lose: it goes into the metadata."""
    with file.path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)
        described = described_beside(file)
        if described:
            header = _with_metadata(header, {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in described.items()})})
        yield len(header).to_bytes(8, "little") + header
        while block := opened.read(COPY_BYTES):
            yield block


def _with_metadata(header: bytes, more: dict[str, str]) -> bytes:
    told: dict[str, Any] = json.loads(header)
    told["__metadata__"] = dict(sorted((told.get("__metadata__", {}) | more).items()))
    text = json.dumps(told, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
