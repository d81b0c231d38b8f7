"""CivitAI: from a page or version to the one file to download, by CivitAI's API."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from infer.references import CIVITAI_HOSTS, CivitaiReference
from lorabooth import web
from lorabooth.errors import UserError
from lorabooth.web import Web, WebError

TOKEN_VARIABLE = "CIVITAI_TOKEN"


@dataclass(frozen=True)
class CivitaiFile:
    """A file of a version: where it is, what it is called and, where CivitAI says it, its size and SHA-256 (in small letters)."""

    version: int
    name: str
    url: str = field(repr=False)
    sha256: str
    size_bytes: int


class Civitai:
    """The API. `base` is for all hosts, in place of the one in the reference; the token goes to CivitAI or that base only."""

    def __init__(self, fetcher: Web, token: str = "", base: str = ""):
        self.web, self.token, self.base = fetcher, token, base.rstrip("/")

    def file(self, reference: CivitaiReference) -> CivitaiFile:
        """The safetensors file that a reference names; a UserError says why there is none."""
        page = reference.page
        base = self.base or f"https://{reference.host}"
        version = reference.version
        if version is None:
            versions = _list(self._ask(f"{base}/api/v1/models/{reference.model}", page, reference), "modelVersions")
            # The newest is first, and it alone is what the page shows.
            found = next((v for v in versions if _has_safetensors(v)), versions[0] if versions else None)
            if found is None or not isinstance(found.get("id"), int):
                raise UserError(f"{page} has no version that can be downloaded", hint="open the page to see what it offers")
            version = int(found["id"])
        answer = self._ask(f"{base}/api/v1/model-versions/{version}", page, reference)
        # A version of another page is what a mistake in copying looks like.
        if reference.model is not None and answer.get("modelId", reference.model) != reference.model:
            raise UserError(f"version {version} is not of {page} but of models/{answer['modelId']}", hint="copy the address of the page again")
        return self._choose(answer, version, page, base, reference.wanted)

    def token_for(self, url: str, reference: CivitaiReference) -> str:
        """The token where `url` is CivitAI's, none elsewhere."""
        parsed = web.parse(url)
        trusted = parsed.scheme == "https" and parsed.host.removeprefix("www.") in CIVITAI_HOSTS
        token = (reference.token or self.token) if trusted or (self.base and url.startswith(f"{self.base}/")) else ""
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise UserError(f"the key in {TOKEN_VARIABLE} holds characters that no key has", hint="copy it again")
        return token

    def explained(self, error: WebError, page: str, reference: CivitaiReference) -> WebError:
        """CivitAI's refusals in words that fit."""
        login = f"make an API key on your CivitAI account page and set {TOKEN_VARIABLE} to it"
        if reference.token or self.token:
            login = f"the key in {TOKEN_VARIABLE} is not valid, or your account may not read it"
        match error.status:
            case 401:
                return WebError(f"CivitAI gives {page} only to those who are logged in (HTTP 401)", login, 401)
            case 403:
                return WebError(f"CivitAI refuses {page} (HTTP 403): it may be in early access, or not for your account", login, 403)
            case 404:
                return WebError(f"CivitAI has no {page} (HTTP 404)", "open the page to see whether it is still there; a page's id is not a version's", 404)
        return error

    def _ask(self, url: str, page: str, reference: CivitaiReference) -> dict[str, Any]:
        try:
            answer = self.web.json(url, self.token_for(url, reference))
        except WebError as error:
            raise self.explained(error, page, reference) from None
        if not isinstance(answer, dict):
            raise WebError(f"CivitAI's answer about {page} is not what its API promises", hint="try again later")
        return answer

    def _choose(self, version: dict[str, Any], number: int, page: str, base: str, wanted: str) -> CivitaiFile:
        files = [file for file in _list(version, "files") if file.get("type") in ("Model", "Pruned Model")]
        usable = sorted(
            (file for file in files if _is_safetensors(file) and _is_wanted(file, wanted)),
            key=lambda file: (not file.get("primary"), file.get("type") != "Model"),
        )
        if not usable:
            names = ", ".join(str(file.get("name")) for file in _list(version, "files")) or "no file"
            such = f" of {wanted.replace('&', ', ')}" if wanted else ""
            raise UserError(f"{page} has no .safetensors file{such}; it has {names}", hint="only safetensors is read: other formats can run code when loaded")
        file = usable[0]
        hashes, size = file.get("hashes"), file.get("sizeKB")
        sha256 = str(hashes.get("SHA256") or "").lower() if isinstance(hashes, dict) else ""
        url = str(file.get("downloadUrl") or f"{base}/api/download/models/{number}")
        return CivitaiFile(number, str(file.get("name", "")), url, sha256, int(size * 1024) if isinstance(size, int | float) and 0 <= size < 1e12 else 0)


def _list(value: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = value.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _is_safetensors(file: dict[str, Any]) -> bool:
    return str(file.get("name", "")).lower().endswith(".safetensors")


def _is_wanted(file: dict[str, Any], wanted: str) -> bool:
    """Whether a file is what a download link's query picks, such as type=Model&format=SafeTensor&size=pruned&fp=fp16."""
    metadata = file.get("metadata")
    facts = (metadata if isinstance(metadata, dict) else {}) | {"type": file.get("type")}
    return all(str(facts.get(key)).lower() == value.lower() for key, value in parse_qsl(wanted) if key in ("type", "format", "size", "fp"))


def _has_safetensors(version: dict[str, Any]) -> bool:
    return any(_is_safetensors(file) for file in _list(version, "files"))
