"""Whether bytes from elsewhere are a LoRA as safetensors, told by content and never by name; and the LoRA inside a hosted trainer's tar."""

import os
import re
from pathlib import Path

from lorabooth import tars
from lorabooth.entry import ARCHIVE_FAULTS, ENTRIES_LIMIT, printable
from lorabooth.errors import UserError
from lorabooth.lora_file import MAX_HEADER_BYTES, LoraFile
from lorabooth.runs import sha256_file

ONLY_SAFETENSORS = "only safetensors is read: other formats can run code when loaded"
NAMES_SHOWN = 10
COPY_BYTES = 1 << 20


def check_start(start: bytes, name: str) -> None:
    """A UserError where the first block of a download shows that it is neither safetensors nor a tar."""
    if is_tar(start):
        return
    if re.match(rb"\s*<(?:!doctype|html|\?xml)", start, re.IGNORECASE):
        raise UserError(f"{name} is a web page, not a LoRA", hint="give the download address of the file; a page that asks for a login cannot be answered")
    # The length that safetensors begins with may look like the start of a pickle; the brace behind it tells.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start):
        raise UserError(f"{name} is a pickle or a zip, whatever its name says: to read a pickle is to run the code in it", hint=ONLY_SAFETENSORS)
    raise UserError(f"{name} is not a safetensors file", hint=ONLY_SAFETENSORS)


def is_tar(start: bytes) -> bool:
    """Whether a file's first block is a tar's."""
    return len(start) >= 512 and start[257:262] == b"ustar"


def lora_in(part: Path, name: str) -> tuple[Path, str]:
    """The safetensors file that a download is, or holds as a tar, and its SHA-256; a UserError says what it is instead."""
    with part.open("rb") as file:
        packed = is_tar(file.read(512))
    lora = _unpack(part, name) if packed else part
    try:
        LoraFile.read(lora)
    except UserError as error:
        lora.unlink(missing_ok=True)
        raise UserError(f"{name}{error.message.removeprefix(str(lora))}", error.hint or ONLY_SAFETENSORS) from None
    return lora, sha256_file(lora) if packed else ""


def _unpack(part: Path, name: str) -> Path:
    """The one .safetensors in a tar, copied out to beside it."""
    lora = part.with_suffix(".lora")
    with part.open("rb") as file:
        try:
            members = tars.members(file.fileno(), part)
        except (*ARCHIVE_FAULTS, UserError):
            raise UserError(
                f"{name} is a tar that is damaged or holds over {ENTRIES_LIMIT:,} files", hint="download it again, unpack it and give the .safetensors file"
            ) from None
        found = [member for member in members if member.isreg() and not member.issparse() and member.name.lower().endswith(".safetensors")]
        named = [member for member in found if member.name.rsplit("/", 1)[-1] == "lora.safetensors"] or found
        if len(named) != 1:
            names = [printable(member.name) for member in (found or members)]
            listed = ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
            what = "several .safetensors files" if found else "no .safetensors file"
            raise UserError(f"{name} holds {what}; in it are: {listed or 'no files'}", hint="unpack it and give the .safetensors file of the LoRA")
        with lora.open("wb") as out:
            at, left = named[0].offset_data, named[0].size
            while left and (chunk := os.pread(file.fileno(), min(COPY_BYTES, left), at)):
                out.write(chunk)
                at, left = at + len(chunk), left - len(chunk)
        if left:
            lora.unlink()
            raise UserError(f"{name} is a tar that is cut short", hint="download it again")
    return lora
