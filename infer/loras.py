"""`LoraStore`: a LoRA reference -> a local safetensors file, checked; downloaded once, and kept up to a limit.

infer/references.py says what a reference may be. It prints nothing but a progress bar and notices on standard error.
"""

import os
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from infer import formats, hub_lora
from infer.civitai import TOKEN_VARIABLE, Civitai
from infer.download import LIMIT_VARIABLE, Download, Downloaded, Known, too_large
from infer.lora_cache import Kept, LoraCache, Record, key_of
from infer.references import CivitaiReference, HubReference, Reference, UrlReference, parse, safe, split_weight
from lorabooth.addresses import Addresses
from lorabooth.errors import UserError
from lorabooth.home import cache_folder
from lorabooth.lora_file import LoraFile
from lorabooth.notes import note
from lorabooth.web import Web, WebError

LORAS_LIMIT = 32
"""Of one picture."""
LIMIT_BYTES = 4 * 10**9
CACHE_BYTES = 50 * 10**9
PLAIN_NAMES = ("lora", "trained_model", "output", "pytorch_lora_weights", "adapter_model", "resolve", "download")
"""Names that many files have; the folder above says more."""
CACHE_VARIABLE = "LORABOOTH_LORA_CACHE_GB"


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file and the weight it is applied with."""

    file: LoraFile
    weight: float


@dataclass(frozen=True)
class Source:
    """Something to download: `shown` is what people may read of it, `name` what the file is called, `sha256` what it must have, where that is known."""

    url: str = field(repr=False)
    key: str
    shown: str
    name: str
    sha256: str = ""


def resolve(reference: str) -> LoraChoice:
    """The file of a reference, checked, by a store with the settings of the environment; a UserError says what was looked for where."""
    return LoraStore.from_environment().resolve(reference)


def resolve_all(references: Sequence[str]) -> tuple[LoraChoice, ...]:
    """The same for those of a picture; a UserError where they are too many."""
    if len(references) > LORAS_LIMIT:
        raise UserError(f"{len(references)} LoRAs are given; the limit is {LORAS_LIMIT}")
    return tuple(map(resolve, references))


def unweighted(reference: str, purpose: str) -> LoraFile:
    """The same where only the file is meant: a UserError where a weight is given, which would be ignored. purpose: "to copy"."""
    name, weight = split_weight(reference)
    if weight != 1:
        raise UserError(f"{safe(name)} has a weight of {weight:g}, which is of no use {purpose}", hint="leave it out")
    return resolve(reference).file


class LoraStore:
    """Resolves references. It may be shared by threads, and its folder by processes.

    folder: of the downloads; limit_bytes: of one; cache_bytes: of all that are kept; civitai: in place of CivitAI's own
    address, for all its hosts; show: whether a progress bar is drawn; pause_seconds: before a second attempt, then doubled.
    """

    def __init__(
        self, folder: Path | None = None, *, limit_bytes: int = LIMIT_BYTES, cache_bytes: int = CACHE_BYTES, addresses: Addresses | None = None,
        civitai: str = "", civitai_token: str = "", notice: Callable[[str], None] = note, show: bool = True, pause_seconds: float = 1.0,
    ) -> None:  # fmt: skip
        self.cache = LoraCache(folder or cache_folder("loras"), cache_bytes)
        self.web = Web(addresses or Addresses(), pause_seconds)
        self.civitai = Civitai(self.web, civitai_token, civitai)
        self.limit_bytes, self.notice, self.show = limit_bytes, notice, show

    @classmethod
    def from_environment(cls) -> "LoraStore":
        """With LORABOOTH_LORA_LIMIT_GB, LORABOOTH_LORA_CACHE_GB, LORABOOTH_ALLOW_PRIVATE_ADDRESSES and CIVITAI_TOKEN."""
        limit, kept = _gigabytes(LIMIT_VARIABLE, LIMIT_BYTES), _gigabytes(CACHE_VARIABLE, CACHE_BYTES)
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        return cls(limit_bytes=limit, cache_bytes=kept, addresses=Addresses.from_environment(), civitai_token=token)

    def resolve(self, reference: str) -> LoraChoice:
        """The file of a reference, checked. A downloaded one is not deleted for room while the answer's `file` lives."""
        name, weight = split_weight(reference)
        found = self._locate(parse(name), name)
        if isinstance(found, Path):
            return LoraChoice(LoraFile.read(found), weight)
        try:
            file = LoraFile.read(found.file)
        except BaseException:
            found.release()
            raise
        weakref.finalize(file, found.release)
        return LoraChoice(file, weight)

    def _locate(self, reference: Reference, name: str) -> Path | Kept:
        match reference:
            case HubReference():
                return hub_lora.fetch(reference, self.limit_bytes, self.notice)
            case CivitaiReference():
                return self._of_civitai(reference)
            case UrlReference():
                return self._cached(Source(reference.url, key_of(reference.url), safe(reference.url), _name_of(reference.url)))
        return _in_folder(reference, name) if reference.is_dir() else reference

    def _of_civitai(self, reference: CivitaiReference) -> Kept:
        key = key_of(f"civitai {reference.model} {reference.version} {reference.wanted}")
        self.cache.prepare()
        if self.cache.read_only:
            return self._unasked(key, reference.page)
        try:
            file = self.civitai.file(reference)
            if file.size_bytes > self.limit_bytes:
                raise too_large(f"{reference.page} ({file.name})", self.limit_bytes)
            source = Source(file.url, key, reference.page, plain(Path(file.name).stem) or f"civitai-{file.version}", file.sha256)
            return self._cached(source, self.civitai.token_for(file.url, reference))
        except WebError as error:
            kept = self._before(key)
            error = self.civitai.explained(error, reference.page, reference)
            if kept is None:
                raise error from None
            return self._earlier(kept, reference.page, error)

    def _cached(self, source: Source, token: str = "") -> Kept:
        """The file of a source: from the cache where its content is known and there, or the server says that it has not changed or cannot say."""
        self.cache.prepare()
        if self.cache.read_only:
            return self._unasked(source.key, source.shown)
        before = self.cache.record(source.key)
        with self.cache.fetching(source.key, lambda: self.notice(f"{source.shown} is being downloaded already; waiting for that")) as waited:
            record = self.cache.record(source.key)
            digest = source.sha256 or (record.sha256 if record else "")
            kept = self.cache.keep(digest)
            # What another process fetched while this one waited is as new as can be.
            if kept is not None and (source.sha256 or (waited and record != before)):
                if record is None or record.sha256 != digest:
                    self.cache.point(source.key, Record(source.shown, digest))
                return kept
            known = Known(record.etag, record.modified, record.fetched_bytes) if kept is not None and record else None
            try:
                show = source.name if self.show else None
                done = Download(self.web, source.url, self.cache.part(source.key), token, self.limit_bytes, show).run(known)
                if done.part is None and kept is not None:
                    return kept
                new = self._take_in(done, source)
            except WebError as error:
                if kept is None:
                    raise
                return self._earlier(kept, source.shown, error)
            except BaseException:
                if kept is not None:
                    kept.release()
                raise
            if kept is not None:
                kept.release()
            return new

    def _take_in(self, done: Downloaded, source: Source) -> Kept:
        assert done.part is not None, "a server that was asked for a file cannot have answered that it has not changed"
        if source.sha256 and done.sha256 != source.sha256:
            self.cache.forget(source.key)
            raise UserError(
                f"{source.shown} did not arrive as it was published: its SHA-256 is {done.sha256[:12]}..., not {source.sha256[:12]}...",
                hint="run the same command again; if it stays so, do not trust the file",
            )
        try:
            lora, inner = formats.lora_in(done.part, source.shown)
        except UserError as error:
            self.cache.forget(source.key)
            raise WebError(error.message, error.hint) from None
        digest = inner or done.sha256
        return self.cache.put(source.key, lora, digest, source.name, Record(source.shown, digest, done.etag, done.modified, done.bytes))

    def _before(self, key: str) -> Kept | None:
        """What was downloaded before."""
        record = self.cache.record(key)
        return self.cache.keep(record.sha256) if record else None

    def _unasked(self, key: str, shown: str) -> Kept:
        """The same from a cache that cannot be written to: there is no place for what a server might answer."""
        kept, where = self._before(key), f"the download cache {self.cache.folder} cannot be written to"
        if kept is None:
            raise UserError(f"{where}, and {shown} is not in it", hint="set XDG_CACHE_HOME to a folder that can be written to")
        self.notice(f"{where}; {shown} is used as it was downloaded before")
        return kept

    def _earlier(self, kept: Kept, shown: str, error: UserError) -> Kept:
        self.notice(f"{error.message}; {shown} is used as it was downloaded before")
        return kept


def _in_folder(folder: Path, name: str) -> Path:
    """The LoRA of a run, or the only one in a folder."""
    if (folder / "lora.safetensors").exists():
        return folder / "lora.safetensors"
    if (folder / "config.json").exists():
        raise UserError(f"the run {name} has no LoRA yet: its training has not ended", hint="run the same lorabooth train command again to go on")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{name} holds no .safetensors file", hint="only safetensors is read: other formats can run code when loaded")
    if len(files) > 1:
        raise UserError(f"{name} holds several LoRA files: {', '.join(f.name for f in files)}", hint=f"name one, such as {name}/{files[0].name}")
    return files[0]


def _name_of(url: str) -> str:
    """What to call the file of an address: the last part of its path that tells it from others."""
    parts = urlsplit(url)
    stems = [plain(PurePosixPath(unquote(part)).stem) for part in parts.path.split("/") if part]
    return next((stem for stem in reversed(stems) if stem and stem not in PLAIN_NAMES), plain(parts.hostname or "") or "lora")


def plain(name: str) -> str:
    """A name from elsewhere, fit for a file of ours."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:80]


def _gigabytes(variable: str, default_bytes: int) -> int:
    value = os.environ.get(variable, "").strip()
    if not value:
        return default_bytes
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", value, re.ASCII) or float(value) == 0:
        raise UserError(f"{variable} is {value[:40]!r}; it must be a number of gigabytes over 0", hint=f"such as {variable}={default_bytes / 1e9:g}")
    return int(float(value) * 1e9)
