"""The one LoRA file of a Hugging Face repository, through the hub's own client: its login, its cache and its progress bar.

The client compares sizes, and only of what it has just fetched; so each file is compared here with its SHA-256.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path, PurePosixPath

from infer.download import too_large
from infer.references import HubReference
from lorabooth import hub
from lorabooth.errors import UserError
from lorabooth.keys import ADAPTER_CONFIG, ADAPTER_MODEL
from lorabooth.runs import sha256_file

REQUEST_SECONDS = 30
NAMES_SHOWN = 10
WITHOUT_NETWORK = "connect to the internet once, or give a run folder or a .safetensors file"


def fetch(reference: HubReference, limit_bytes: int, notice: Callable[[str], None]) -> Path:
    """The file in the hub's cache, downloaded once; where the hub cannot be asked, what was downloaded before."""
    try:
        return _fetch(reference, limit_bytes)
    except UserError as error:
        # The hub's own "no" is not passed over: only the network may fail.
        if not isinstance(error, hub.Unreachable) or (found := _cached(reference)) is None:
            raise
        notice(f"the hub cannot be reached; {reference.repository} is used as it was downloaded before")
        return found


def choose(reference: HubReference, names: list[str]) -> str:
    """The file that a reference means among the repository's; a UserError lists what is there."""
    repository = reference.repository
    if reference.file:
        if reference.file not in names:
            lora_files = [name for name in names if name.endswith(".safetensors")]
            raise UserError(f"{repository} has no file {reference.file}", hint=f"it has {_listed(lora_files)}" if lora_files else "it has no .safetensors file")
        return reference.file
    # Trainers put each checkpoint's LoRA into a folder, and none of those is asked for.
    here = [name for name in names if name.endswith(".safetensors") and str(PurePosixPath(name).parent) == (reference.folder.strip("/") or ".")]
    named = [name for name in here if PurePosixPath(name).name == "lora.safetensors"] or here
    where = f"{repository}/{reference.folder}" if reference.folder else repository
    if not named:
        deeper = [name for name in names if name.endswith(".safetensors")]
        hint = f"name one of those in its folders: {_listed(deeper)}" if deeper else "only safetensors is read: other formats can run code when loaded"
        raise UserError(f"{where} holds no .safetensors file", hint=hint)
    if len(named) > 1:
        raise UserError(f"{where} holds several LoRA files: {_listed(named)}", hint=f"name one, such as {repository}/{named[0]}")
    return named[0]


def _fetch(reference: HubReference, limit_bytes: int) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    repository, revision = reference.repository, reference.revision
    with _asking(reference):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=REQUEST_SECONDS)
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    name = choose(reference, list(files))
    if (files[name].size or 0) > limit_bytes:
        raise too_large(f"{repository}/{name}", limit_bytes)
    lfs = files[name].lfs
    path = _download(reference, name, lfs.sha256 if lfs else "")
    description = str(PurePosixPath(name).with_name(ADAPTER_CONFIG))
    if path.name == ADAPTER_MODEL and description in files:  # where PEFT keeps the strength
        with _asking(reference):
            hf_hub_download(repository, description, revision=revision)
    return path


def _download(reference: HubReference, name: str, sha256: str) -> Path:
    """A file, whole; it is fetched again where it was damaged in the cache or on its way."""
    from huggingface_hub import hf_hub_download

    for _ in range(2):
        with _asking(reference):
            # By the name of the revision and not by its commit: only then does the cache know that name offline.
            path = Path(hf_hub_download(reference.repository, name, revision=reference.revision))
        if _is_whole(path, sha256):
            return path
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise UserError(f"{reference.repository}/{name} did not arrive as the hub has it: its checksum differs", hint="run the same command again")


def _is_whole(path: Path, sha256: str = "") -> bool:
    """Whether a file of the hub's cache is what the hub has, as far as that is known: the cache names what the hub keeps by SHA-256 after it."""
    blob = path.resolve()
    wanted = sha256 or (blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else "")
    try:
        status = blob.stat()
        return not wanted or _sha256(blob, status.st_size, status.st_mtime_ns) == wanted
    except FileNotFoundError:  # another process found it damaged
        return False


@cache
def _sha256(blob: Path, size: int, mtime_ns: int) -> str:
    """Read once in the life of the process while its size and date stay: a server uses one LoRA many times."""
    return sha256_file(blob)


def _cached(reference: HubReference) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # No pattern: the client shall not miss the files that nobody asked for.
        folder = Path(snapshot_download(reference.repository, revision=reference.revision, local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.safetensors")) if file.exists()]
    try:
        path = folder / choose(reference, names)
    except UserError:
        return None
    if not _is_whole(path):
        where = f"{reference.repository}/{path.relative_to(folder)} is damaged in the hub's cache ({path.resolve()})"
        raise UserError(f"{where}: its checksum differs", hint="connect to the internet and run the same command again, which fetches it anew")
    return path


def _asking(reference: HubReference) -> AbstractContextManager[None]:
    return hub.explained(reference.repository, WITHOUT_NETWORK)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
