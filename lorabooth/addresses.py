"""Which network addresses may be contacted when somebody else named the host.

A URL may lead into the network of the machine that fetches it: a router's page, a cloud's metadata service, our own
server. Only addresses of the public internet are allowed, and others where the owner of this machine says so.
"""

import ipaddress
import os
import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from lorabooth.errors import UserError

VARIABLE = "LORABOOTH_ALLOW_PRIVATE_ADDRESSES"
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str, int], list[str]]

EVERYWHERE: tuple[Network, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
PUBLIC_IPV6 = IPv6Network("2000::/3")
# The prefixes of IPv6 under which an IPv4 address is spoken to: NAT64, and the two old forms that only carry one.
CARRIES_IPV4 = (IPv6Network("64:ff9b::/96"), IPv6Network("::/96"))
# Reserved for relays of old and for documentation; not every Python that we run on knows these two.
NOT_PUBLIC = (IPv4Network("192.88.99.0/24"), IPv6Network("3fff::/20"))


def look_up(host: str, port: int) -> list[str]:
    """The addresses of a host by the system's resolver, which also reads the odd spellings of numbers (0x7f.1, 2130706433)."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class HostNotFound(UserError):
    """The name of a host has no address: it is wrong, or there is no network."""


class Addresses:
    """The rule for addresses: `allowed` are networks that may be contacted although they are not public."""

    def __init__(self, allowed: Iterable[Network] = (), lookup: Lookup = look_up):
        self.allowed = tuple(allowed)
        self.lookup = lookup

    @classmethod
    def from_environment(cls) -> "Addresses":
        """By LORABOOTH_ALLOW_PRIVATE_ADDRESSES: 1 for all, or networks such as 192.168.0.0/16,10.1.2.3; without it, none."""
        value = os.environ.get(VARIABLE, "").strip()
        if value in ("", "0"):
            return cls()
        if value == "1":
            return cls(EVERYWHERE)
        try:
            return cls(ipaddress.ip_network(part.strip()) for part in value.split(","))
        except ValueError as error:
            raise UserError(f"{VARIABLE}: {error}", hint="give 1 for all addresses, or networks such as 192.168.0.0/16,10.1.2.3") from None

    def of(self, host: str, port: int) -> list[Address]:
        """The addresses of a host, every one allowed; a UserError otherwise. Connect to one of these: a second look-up may answer otherwise."""
        try:
            texts = self.lookup(host, port)
        except (OSError, UnicodeError):
            raise HostNotFound(f"the host {host} cannot be found", hint="check the address and the network connection") from None
        found = [ipaddress.ip_address(text) for text in texts]
        if not found or not all(is_public(address) or self.is_allowed(address) for address in found):
            # The address stays unsaid: whoever gave the name could learn from it how this network is laid out.
            raise UserError(
                f"{host} is an address of a private network or of this machine, which is not fetched from",
                hint=f"if you trust it, set {VARIABLE}=1, or to that network, such as 192.168.0.0/16",
            )
        return found

    def is_allowed(self, address: Address) -> bool:
        """Whether it is in one of the networks that the owner of this machine named, by its own spelling or by the IPv4 address inside."""
        return any(inner in network for inner in (address, _inside(address)) for network in self.allowed)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet; one of IPv6 that carries one of IPv4 is judged by that."""
    if isinstance(address, IPv6Address):
        inner = _inside(address)
        if inner != address:
            return is_public(inner)
        if address not in PUBLIC_IPV6 or address.scope_id is not None:
            return False
    special = address.is_multicast or address.is_reserved or any(address in network for network in NOT_PUBLIC)
    return address.is_global and not special


def _inside(address: Address) -> Address:
    if isinstance(address, IPv4Address):
        return address
    if any(address in network for network in CARRIES_IPV4):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
