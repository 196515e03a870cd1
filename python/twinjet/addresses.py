"""Who calls, as far as an address tells: an IPv4 address, a network of IPv6, a Unix socket."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from ipaddress import IPv6Address, IPv6Network
from urllib.parse import unquote


def address_of_source(source: str, ipv6_prefix: int) -> str:
    """Give the same for an address as Envoy writes it: "192.0.2.1:1234", "[2001:db8::1]:1234"."""
    return address_of(f"{'ipv6' if source.startswith('[') else 'ipv4'}:{source}", ipv6_prefix)


@lru_cache(maxsize=4096)
def address_of(peer: str, ipv6_prefix: int) -> str:
    """Give whom a connection counts for: "ipv4:192.0.2.1", "ipv6:2001:db8::/64", "unix".

    peer: as gRPC names connections: "ipv4:192.0.2.1:1234", "ipv6:%5B2001:db8::1%5D:1234", "unix:". ipv6_prefix: bits
    of an IPv6 address, 1 to 128, that count. An IPv4 address that is written as an IPv6 one is itself. A zone
    (fe80::1%2) stays: another zone's addresses are other hosts'.
    """
    if peer.startswith("unix:"):
        return "unix"
    name = peer.rpartition(":")[0] or peer
    if not name.startswith("ipv6:"):
        return name
    try:
        address = IPv6Address(unquote(name.removeprefix("ipv6:")).strip("[]"))
    except ValueError:
        return name
    if address.ipv4_mapped is not None:
        return f"ipv4:{address.ipv4_mapped}"
    network = IPv6Network((int(address), ipv6_prefix), strict=False)
    return f"ipv6:{network}" if address.scope_id is None else f"ipv6:{network}%{address.scope_id}"


def caller_of(tenant: str, address: str) -> str:
    """Give whom work counts for: those who name no tenant are told apart by where they call from."""
    return tenant or f"address {address}"


def take_off(counts: Counter[str], key: str, number: int = 1) -> None:
    """Take a number off what is counted for a caller; where it becomes 0 its entry goes."""
    counts[key] -= number
    if not counts[key]:
        del counts[key]
