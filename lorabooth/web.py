"""Getting something by a URL that somebody else may have written: the only way by which this program fetches from such a URL.

One parser reads the URL, each host is looked up once, all its addresses are checked and the connection goes to an
address that was checked. Redirects are followed by hand, each by the same rules, and a token stays with its host.
It knows nothing of files; lorabooth never sends anything but GET through it.
"""

import json
import ssl
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx2
from httpx2 import URL, Response

from lorabooth.addresses import Address, Addresses, HostNotFound, is_public
from lorabooth.errors import UserError
from lorabooth.patience import Patience

REDIRECTS_LIMIT = 5
TIMEOUT = httpx2.Timeout(60, connect=15)
JSON_BYTES_LIMIT = 16 << 20
ATTEMPTS = 4
WAIT_SECONDS_LIMIT = 60.0
REDIRECTS = (301, 302, 303, 307, 308)
MAY_PASS = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
"""Answers that may be others a little later; those over 520 are of proxies in front of the server."""


class WebError(UserError):
    """A request that failed. `status` is the HTTP status, 0 where no answer came; `may_pass`: a second attempt can help."""

    def __init__(self, message: str, hint: str = "", status: int = 0, may_pass: bool = False, wait_seconds: float = 0):
        super().__init__(message, hint)
        self.status, self.may_pass, self.wait_seconds = status, may_pass, wait_seconds


class BrokenOff(WebError):
    """A connection that ended too early or was given up; whoever knows that what arrived is kept says so in the hint."""

    def __init__(self, message: str, may_pass: bool = True):
        super().__init__(message, hint="run the same command again", may_pass=may_pass)


class Web:
    """Requests to any host that `addresses` allows. It may be used by several threads."""

    def __init__(self, addresses: Addresses, pause_seconds: float = 1.0):
        self.addresses, self.pause_seconds = addresses, pause_seconds

    @contextmanager
    def get(self, address: str, headers: dict[str, str], token: str = "") -> Iterator[Response]:
        """The answer to a GET, its body not yet read; redirects are followed. A WebError for everything but 200, 206 and 304.

        The token goes to the host of `address` as a bearer token, and to none that a redirect names.
        """
        url, first = parse(address), parse(address)
        for _ in range(REDIRECTS_LIMIT + 1):
            own = {"Authorization": f"Bearer {token}"} if token and _origin(url) == _origin(first) else {}
            with self._hop(url, headers | own) as response:
                if response.status_code not in REDIRECTS:
                    if response.status_code not in (200, 206, 304):
                        raise refusal(url, response)
                    yield response
                    return
                url = self._next(url, response)
        raise WebError(f"{shown(first)} redirects more than {REDIRECTS_LIMIT} times, which is the limit", hint="give the address of the file itself")

    def json(self, address: str, token: str = "") -> Any:
        """The answer to a GET as JSON, of at most 16 MiB; a failure that may pass is waited out."""
        failed = 0
        while True:
            try:
                return self._json(address, token)
            except WebError as error:
                failed += 1
                if not self.pause(error, failed):
                    raise

    def pause(self, error: WebError, failed: int) -> bool:
        """Wait before another attempt after so many failures; False, at once, where there should be none."""
        if not error.may_pass or failed >= ATTEMPTS or error.wait_seconds > WAIT_SECONDS_LIMIT:
            return False
        time.sleep(max(error.wait_seconds, self.pause_seconds * 2 ** (failed - 1)))
        return True

    def _json(self, address: str, token: str) -> Any:
        with self.get(address, {"Accept": "application/json"}, token) as response:
            data = bytearray()
            for chunk in body(parse(address), response):
                data += chunk
                if len(data) > JSON_BYTES_LIMIT:
                    raise WebError(f"the answer of {shown(parse(address))} is over {JSON_BYTES_LIMIT >> 20} MiB, which is the limit")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise WebError(f"the answer of {shown(parse(address))} is not JSON", hint="try again later") from None

    def _next(self, url: URL, response: Response) -> URL:
        location = response.headers.get("Location", "")
        if not location:
            raise WebError(f"{shown(url)} redirects to nowhere", status=response.status_code)
        try:
            target = parse(str(url.join(location)))
        except httpx2.InvalidURL:
            raise WebError(f"{shown(url)} redirects to what is no address", status=response.status_code) from None
        if url.scheme == "https" and target.scheme != "https":
            raise WebError(f"{shown(url)} redirects to an unencrypted address, which is not followed", status=response.status_code)
        return target

    @contextmanager
    def _hop(self, url: URL, headers: dict[str, str]) -> Iterator[Response]:
        """One request to one checked address."""
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            checked = self.addresses.of(url.host, port)
        except HostNotFound as error:
            raise WebError(error.message, error.hint) from None
        if url.scheme == "http" and any(is_public(address) or not self.addresses.is_allowed(address) for address in checked):
            raise UserError(f"{shown(url)} is not encrypted", hint="give its https:// address")
        # What is packed would count as fewer bytes than it is.
        fields = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity", "User-Agent": "lorabooth"} | headers
        proxy = None if urllib.request.proxy_bypass(url.host) else urllib.request.getproxies().get(url.scheme)
        # A client for each request: none of it keeps cookies or connections that belong to another host.
        with httpx2.Client(verify=_tls(), trust_env=False, proxy=proxy, timeout=TIMEOUT) as client, Patience() as patience:
            with _failures(url, patience):
                response = self._send(client, url, checked, fields, patience)
            response.extensions["patience"] = patience
            try:
                yield response
            finally:
                response.close()

    def _send(self, client: httpx2.Client, url: URL, checked: list[Address], headers: dict[str, str], patience: Patience) -> Response:
        # The certificate is still checked against the name.
        extensions = {"sni_hostname": url.raw_host.decode("ascii"), "trace": patience.trace}
        for address in checked:
            request = client.build_request("GET", url.copy_with(host=str(address)), headers=headers, extensions=extensions)
            try:
                return client.send(request, stream=True, follow_redirects=False)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if address == checked[-1]:
                    raise
        raise AssertionError("no address")


def parse(address: str) -> URL:
    """The URL, by the parser that the request will use too; a UserError for what is no address of the web."""
    try:
        url = URL(address)
    except (httpx2.InvalidURL, ValueError):
        raise UserError(f"{address[:200]!r} is not an address of the web", hint="give one such as https://host/file.safetensors") from None
    if url.scheme not in ("https", "http") or not url.host or "%" in url.host or not 0 < (url.port or 443) < 65536:
        raise UserError(f"{shown(url)!r} is not an address of the web", hint="give one such as https://host/file.safetensors")
    if url.userinfo or "\\" in address:
        # Programs disagree about what is the host then.
        raise UserError(f"the address of a file on {url.host} holds a user name or a backslash, which is not taken", hint="give the address without it")
    return url


def shown(url: URL) -> str:
    """A URL for messages and records: without its query and fragment, where tokens and signatures stand, and without a user name."""
    return str(url.copy_with(query=None, fragment=None, userinfo=b""))


def body(url: URL, response: Response) -> Iterator[bytes]:
    """What an answer of `Web.get` brings, as it comes; a WebError where it breaks off, or hardly anything comes."""
    patience: Patience = response.extensions["patience"]
    with _failures(url, patience):
        for chunk in response.iter_raw():
            patience.arrived(len(chunk))
            yield chunk


@contextmanager
def _failures(url: URL, patience: Patience) -> Iterator[None]:
    """The one place where a broken connection becomes a sentence."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        raise _too_slow(url) if patience.over else _failure(url, error) from None
    if patience.over:
        raise _too_slow(url)


def _too_slow(url: URL) -> WebError:
    return BrokenOff(f"{shown(url)} comes too slowly", may_pass=False)


def _failure(url: URL, error: Exception) -> WebError:
    if isinstance(error, httpx2.TimeoutException):
        return BrokenOff(f"{url.host} does not answer in time")
    if not isinstance(error, httpx2.ConnectError):
        return BrokenOff(f"the connection to {url.host} broke off ({type(error).__name__})")
    if "CERTIFICATE" in str(error).upper():
        return WebError(f"the certificate of {url.host} cannot be trusted", hint="check the address; an authority of your own is named by SSL_CERT_FILE")
    return WebError(f"{url.host} cannot be reached", hint="check the address and the network connection", may_pass=True)


def refusal(url: URL, response: Response) -> WebError:
    """The sentence for an HTTP status."""
    status, name = response.status_code, shown(url)
    what, hint = {
        401: (f"{name} asks for a login", "only the Hugging Face hub (hf auth login) and CivitAI (CIVITAI_TOKEN) can be logged in to"),
        403: (f"{name} may not be read by you", "check the address; a signed one may have run out"),
        404: (f"there is nothing at {name}", "check the address"),
        410: (f"what was at {name} is gone", "look for another place that has it"),
        429: (f"{url.host} asks to be left alone for a while", "try again later"),
    }.get(status, (f"{url.host} failed to give {name}" if status >= 500 else f"{url.host} refused {name}", "try again later"))
    wait = response.headers.get("Retry-After", "")
    return WebError(f"{what} (HTTP {status})", hint, status, status in MAY_PASS, float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 6 else 0)


def _origin(url: URL) -> tuple[str, bytes, int | None]:
    return url.scheme, url.raw_host, url.port


@cache
def _tls() -> ssl.SSLContext:
    return httpx2.create_ssl_context()
