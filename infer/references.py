"""What a LoRA reference says: which place, which file, which version, which weight. Nothing is opened or asked here.

A reference is a run folder or a file of this machine, a repository of the Hugging Face hub, a page or a download of
CivitAI, or the https address of a file; each with an optional `:weight` behind it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

from lorabooth import web
from lorabooth.errors import UserError
from lorabooth.home import expanded

WEIGHTS = (-2.0, 3.0)
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""How files end that are read by running what is in them."""
FORMS = "give a run folder, a .safetensors file, a hub repository such as owner/name, or an address of the hub, of CivitAI or of a .safetensors file"
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
CIVITAI_HOSTS = ("civitai.com", "civitai.red", "civitai.green")


@dataclass(frozen=True)
class HubReference:
    """A LoRA in a repository of the hub: `file` by its path, or else the only one in `folder`."""

    repository: str
    file: str = ""
    revision: str = "main"
    folder: str = ""


@dataclass(frozen=True)
class CivitaiReference:
    """A LoRA of CivitAI, by the id of its page or of its version. These are different ids: a page has several versions."""

    host: str
    model: int | None = None
    version: int | None = None
    wanted: str = ""
    """The rest of a download address's query, which picks among the files of a version."""
    token: str = field(default="", repr=False)
    """A token that stood in the address."""

    @property
    def page(self) -> str:
        """What to call it."""
        return f"{self.host}/models/{self.model}" if self.model is not None else f"version {self.version} on {self.host}"


@dataclass(frozen=True)
class UrlReference:
    """A file at an https address."""

    url: str = field(repr=False)


Reference = Path | HubReference | CivitaiReference | UrlReference


def split_weight(reference: str) -> tuple[str, float]:
    """`runs/tok:0.8` -> (`runs/tok`, 0.8); without a weight, 1.0. The port of an address is none."""
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", reference, re.ASCII | re.DOTALL)
    if not match or re.fullmatch(r"\w+://[^/]*", match.group(1)) or _exists(Path(reference)):
        return reference, 1.0
    weight = float(match.group(2))
    if not WEIGHTS[0] <= weight <= WEIGHTS[1]:
        raise UserError(f"the weight of {safe(match.group(1))} is {weight:g}; it must lie from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}")
    return match.group(1), weight


def parse(name: str) -> Reference:
    """What a reference without its weight names; a UserError where it can be nothing."""
    if not name.strip():
        raise UserError("the name of a LoRA is empty; is a variable of the shell not set?", hint=FORMS)
    if "://" in name:
        return _parse_url(name)
    path = expanded(name) if not name.startswith("~") or name.startswith("~/") else Path(name)
    if _exists(path):
        return path
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?", name, re.ASCII)
    if not match or name.startswith((".", "/", "~")) or (name.endswith(".safetensors") and not match.group(2)):
        raise UserError(f"no LoRA at {name!r}", hint=FORMS)
    repository, file, revision = match.groups()
    return _hub(repository, file or "", revision or "main", name)


def safe(reference: str) -> str:
    """A reference for messages: an address loses its query and user name, where tokens stand."""
    if "://" not in reference:
        return reference
    return re.sub(r"(://)[^/?#]*@", r"\1", re.split(r"[?#]", reference, maxsplit=1)[0])


def refuse_pickle(name: str, file: str) -> None:
    """A UserError where a file's name says that it is a pickle."""
    ending = PurePosixPath(file.lower()).suffix
    if ending in PICKLES:
        raise UserError(
            f"{name} is a {ending} file, a pickle: to read it is to run the code in it",
            hint="only safetensors is read: look for the same LoRA as .safetensors, or ask its author for it",
        )


def _parse_url(name: str) -> Reference:
    url = web.parse(name)
    host = url.host.lower().rstrip(".")
    if host in HUB_HOSTS:
        return _parse_hub(urlsplit(str(url)).path, name)
    if host.removeprefix("www.") in CIVITAI_HOSTS:
        return _parse_civitai(host.removeprefix("www."), name)
    refuse_pickle(web.shown(url), url.path)
    return UrlReference(str(url.copy_with(fragment=None)))


def _parse_hub(path: str, name: str) -> HubReference:
    parts = [unquote(part) for part in path.strip("/").split("/")]
    if parts[0] in ("datasets", "spaces", "collections", "papers", "docs", "api") or len(parts) < 2:
        raise UserError(f"{safe(name)} is not the page of a model", hint="give one such as https://huggingface.co/owner/name")
    repository, kind, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3:]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise UserError(f"{safe(name)} is not the page of a model", hint="give one such as https://huggingface.co/owner/name")
    if kind in ("blob", "resolve", "raw") and len(rest) >= 2:
        # References of pull requests have slashes in their names: refs/pr/1.
        split = 3 if rest[0] == "refs" and len(rest) > 3 else 1
        return _hub(repository, "/".join(rest[split:]), "/".join(rest[:split]), safe(name))
    if kind == "tree" and rest:
        split = 3 if rest[0] == "refs" and len(rest) >= 3 else 1
        return HubReference(repository, "", "/".join(rest[:split]), "/".join(rest[split:]))
    return HubReference(repository)


def _hub(repository: str, file: str, revision: str, name: str) -> HubReference:
    refuse_pickle(name, file)
    if file and not file.endswith(".safetensors"):
        raise UserError(f"{name} is not a .safetensors file", hint="name the repository, or a .safetensors file in it")
    if ".." in file.split("/") or ".." in revision.split("/"):
        raise UserError(f"no LoRA at {name!r}", hint=FORMS)
    return HubReference(repository, file, revision)


def _parse_civitai(host: str, name: str) -> CivitaiReference:
    parts = urlsplit(name)
    query = parse_qs(parts.query)
    token = query.get("token", [""])[-1]
    page = re.match(r"/(?:[a-z]{2}/)?models/(\d{1,18})(?:/|$)", parts.path)
    download = re.match(r"/api/download/models/(\d{1,18})/?$", parts.path) or re.match(r"/api/v1/model-versions/(\d{1,18})/?$", parts.path)
    if download:
        wanted = urlencode([(key, value) for key, value in parse_qsl(parts.query) if key != "token"])
        return CivitaiReference(host, None, int(download.group(1)), wanted, token)
    if page or (page := re.match(r"/api/v1/models/(\d{1,18})/?$", parts.path)):
        version = query.get("modelVersionId", [""])[-1]
        if version and not re.fullmatch(r"\d{1,18}", version, re.ASCII):
            raise UserError(f"{safe(name)} names a version {version[:40]!r}, which is no number")
        return CivitaiReference(host, int(page.group(1)), int(version) if version else None, "", token)
    raise UserError(f"{safe(name)} is not the page of a model", hint=f"give one such as https://{host}/models/123456?modelVersionId=789 or its download link")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        return False
