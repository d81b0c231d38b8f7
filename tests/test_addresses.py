"""Addresses that are not fetched from, however they are spelt, and the web client that heeds it: real sockets on this machine."""

import ipaddress
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_server import LoraServer

from lorabooth import patience, web
from lorabooth.addresses import CARRIES_IPV4, EVERYWHERE, VARIABLE, Addresses, is_public
from lorabooth.errors import UserError
from lorabooth.web import REDIRECTS_LIMIT, Web, WebError

ONE = ipaddress.ip_network("127.0.0.1/32")


def fetched(fetcher: Web, url: str, token: str = "") -> bytes:
    with fetcher.get(url, {}, token) as response:
        return b"".join(response.iter_raw())


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "127.0.0.1",
        "127.255.255.254", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1",
        "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
        "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1", "100::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1",
        "2002:7f00:1::", "2002:a9fe:a9fe::", "2002:c0a8:1::", "3fff::1", "5f00::1", "fc00::1",
        "fd00:ec2::254", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_refused(address: str):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"])
def test_a_public_address_is_allowed(address: str):
    assert is_public(ipaddress.ip_address(address))
    assert Addresses(lookup=lambda host, port: [address]).of("a.example", 443) == [ipaddress.ip_address(address)]


@given(st.ip_addresses(v=4))
def test_an_address_within_one_of_ipv6_is_judged_alike(address: ipaddress.IPv4Address):
    spellings = [f"::ffff:{address}", *(str(ipaddress.ip_address(int(network.network_address) | int(address))) for network in CARRIES_IPV4)]
    spellings.append(str(ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80))))
    assert {is_public(ipaddress.ip_address(spelling)) for spelling in spellings} == {is_public(address)}


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.1", "127.0.1",
        "0x7f.0.0.1", "0x7f000001", "0177.0.0.1", "2130706433", "017700000001", "0", "0.0.0.0",
        "127.0.0.1.", "127。0。0。1", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
        "[0:0:0:0:0:0:0:1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "127.0.0.2",
        "%31%32%37.0.0.1", "127.0.0.1%20", "user@127.0.0.1", "user:pw@127.0.0.1", "a.example@127.0.0.1",
        "a.example\\@127.0.0.1", "[fe80::1%25lo]", "①②⑦.⓪.⓪.①", "169.254.169.254", "10.0.0.1",
        "192.168.1.1", "0xa9fea9fe",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_spelling_of_this_machine_gets_a_connection(site: LoraServer, host: str, scheme: str):
    for port in (f":{site.server_port}", ""):
        with pytest.raises(UserError) as caught:
            fetched(Web(Addresses()), f"{scheme}://{host}{port}/x")
        assert "169.254" not in caught.value.message or "169.254" in host
    assert site.calls == []


@pytest.mark.parametrize(
    "url", ["ftp://a.example/x", "file:///etc/passwd", "https://", "https:///x", "https://a b/x", "https://a.example:99999/x", "https://a\n/x", "gopher://a/"]
)
def test_what_is_no_address_of_the_web_is_refused(url: str):
    with pytest.raises(UserError):
        fetched(Web(Addresses()), url)


def test_a_name_with_one_private_address_among_public_ones_is_refused():
    with pytest.raises(UserError, match="private network"):
        Addresses(lookup=lambda host, port: ["8.8.8.8", "10.0.0.1"]).of("a.example", 443)


def test_the_host_is_looked_up_once_and_the_checked_address_is_the_one_connected_to(site: LoraServer):
    site.put("/x", b"good")
    with LoraServer("127.0.0.2", site.server_port) as canary:
        canary.put("/x", b"bad")
        answers = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]]  # the second look-up leads elsewhere
        fetcher = Web(Addresses([ONE], lookup=lambda host, port: answers.pop(0)))
        assert fetched(fetcher, f"http://rebinding.example:{site.server_port}/x") == b"good"
        assert len(answers) == 2 and canary.calls == []
        assert site.calls[0].headers["Host"] == f"rebinding.example:{site.server_port}"
        with pytest.raises(UserError, match="private network"):
            fetched(fetcher, f"http://rebinding.example:{site.server_port}/x")
        assert canary.calls == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_redirect_to_an_address_that_is_not_allowed_is_not_followed(site: LoraServer, status: int, steps: int):
    with LoraServer("127.0.0.2") as canary:
        canary.put("/x", b"secret")
        for step in range(1, steps):
            site.put(f"/{step}", status=status, location=f"/{step + 1}")
        first = site.put(f"/{steps}", status=status, location=f"{canary.base}/x").replace(f"/{steps}", "/1")
        with pytest.raises(UserError, match="private network"):
            fetched(Web(Addresses([ONE])), first)
        assert canary.calls == [] and len(site.calls) == steps


def test_redirects_are_followed_up_to_the_limit(site: LoraServer):
    for step in range(1, 10):
        site.put(f"/{step}", status=302, location=f"/{step + 1}")
    site.put("/10", b"there")
    fetcher = Web(Addresses([ONE]))
    assert fetched(fetcher, f"{site.base}/{10 - REDIRECTS_LIMIT}") == b"there"
    with pytest.raises(WebError, match="redirects more than 5 times"):
        fetched(fetcher, f"{site.base}/{9 - REDIRECTS_LIMIT}")


@pytest.mark.parametrize("location", ["", "ftp://a/", "http://[", "file:///etc/passwd"])
def test_a_redirect_to_no_address_is_a_sentence(site: LoraServer, location: str):
    with pytest.raises(UserError):
        fetched(Web(Addresses([ONE])), site.put("/x", status=302, location=location, headers={} if location else {"X-None": "1"}))


def test_a_token_stays_with_its_host(site: LoraServer):
    with LoraServer("127.0.0.2") as other, LoraServer() as port:
        for target in (other, port):
            site.put("/away", status=307, location=target.put("/x", b"file"))
            assert fetched(Web(Addresses(EVERYWHERE)), f"{site.base}/away", token="secret") == b"file"
            assert "Authorization" not in target.calls[0].headers
        site.put("/here", status=307, location="/x")
        site.put("/x", b"file", token="secret")
        assert fetched(Web(Addresses(EVERYWHERE)), f"{site.base}/here", token="secret") == b"file"
        assert [call.headers["Authorization"] for call in site.calls] == ["Bearer secret"] * 4


def test_unencrypted_addresses_are_for_private_networks_that_are_allowed():
    with pytest.raises(UserError, match="is not encrypted"):
        fetched(Web(Addresses(EVERYWHERE, lookup=lambda host, port: ["8.8.8.8"])), "http://a.example/x")


@pytest.mark.parametrize(
    ("value", "allowed"),
    [("", False), ("0", False), ("1", True), ("127.0.0.0/8", True), ("10.0.0.0/8, 127.0.0.1", True), ("10.0.0.0/8", False), ("::1", False)],
)
def test_the_variable_names_what_is_allowed(value: str, allowed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, value)
    assert Addresses.from_environment().is_allowed(ipaddress.ip_address("127.0.0.1")) is allowed


@pytest.mark.parametrize("value", ["yes", "127.0.0.1/8", "10.0.0.0/8;"])
def test_a_variable_that_cannot_be_read_is_said(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UserError, match=VARIABLE):
        Addresses.from_environment()


def test_a_host_that_has_no_address_is_said():
    with pytest.raises(WebError, match="cannot be found"):
        fetched(Web(Addresses()), "https://nowhere.invalid/x")


@pytest.fixture
def encrypted(site: LoraServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoraServer]:
    """The server by TLS, under the name lora.example, of an authority that is trusted."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    options = ["-subj", "/CN=lora.example", "-addext", "subjectAltName=DNS:lora.example", "-days", "2", "-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *options]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl command here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    web._tls.cache_clear()
    yield site
    web._tls.cache_clear()


def test_the_certificate_is_checked_against_the_name_although_the_address_is_connected_to(encrypted: LoraServer):
    encrypted.put("/x", b"good")
    fetcher = Web(Addresses([ONE], lookup=lambda host, port: ["127.0.0.1"]))
    assert fetched(fetcher, f"https://lora.example:{encrypted.server_port}/x") == b"good"
    with pytest.raises(WebError, match=r"certificate of other\.example cannot be trusted"):
        fetched(fetcher, f"https://other.example:{encrypted.server_port}/x")
    encrypted.put("/down", status=302, location="http://127.0.0.1/x")
    with pytest.raises(WebError, match="redirects to an unencrypted address"):
        fetched(fetcher, f"https://lora.example:{encrypted.server_port}/down")


def test_an_encrypted_server_that_gives_its_headers_too_slowly_is_given_up(encrypted: LoraServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "SLOW_SECONDS", 0.5)
    encrypted.put("/x", drip="headers")
    with pytest.raises(WebError, match="comes too slowly"):
        fetched(Web(Addresses([ONE], lookup=lambda host, port: ["127.0.0.1"])), f"https://lora.example:{encrypted.server_port}/x")
