"""Checks address and token before gRPC sees them, which takes a port modulo 65,536 and a missing one for 443."""

from __future__ import annotations

import re

_WITH_HOSTS = re.compile(r"(dns:(//[^/]*/)?|ipv[46]:(//[^/]*/)?)", re.IGNORECASE)
_WITHOUT_HOSTS = re.compile(r"(unix|unix-abstract|vsock|xds|google-c2p|passthrough):\D", re.IGNORECASE)
_OTHER_URI = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def check_address(address: str) -> str:
    """Give the address back: host:port, [IPv6]:port, or a URI that gRPC resolves (dns:, ipv4:, ipv6:, unix:, xds:).

    Raises ValueError for one that would lead nowhere or elsewhere.
    """
    if not address or not address.isprintable() or " " in address:
        raise ValueError(f"{address!r} is not an address; write host:port")
    if _WITHOUT_HOSTS.match(address):
        return address
    if scheme := _WITH_HOSTS.match(address):
        targets = address[scheme.end() :].split(",")
    elif scheme := _OTHER_URI.match(address):
        raise ValueError(f"{address!r} is a URL; write {address[scheme.end() :].strip('/') or 'host:port'}")
    else:
        targets = [address]
    for target in targets:
        _check_target(target, address)
    return address


def check_token(token: str) -> None:
    """Raise ValueError for a token that no metadata can carry; the message does not show it."""
    if not token.isascii() or not token.isprintable():
        raise ValueError("the token has other than printable ASCII characters")


def _check_target(target: str, address: str) -> None:
    host, separator, port = target.rpartition(":")
    if target.count(":") > 1 and not target.startswith("["):
        raise ValueError(f"{address!r} is an IPv6 address without brackets; write [ADDRESS]:PORT")
    if not separator or target.endswith("]"):
        raise ValueError(f"{address!r} has no port; write {target}:50051")
    if not host:
        raise ValueError(f"{address!r} has no host; write localhost:{port}")
    if not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 1 <= int(port) <= 65535:
        raise ValueError(f"{port!r} in {address!r} is not a port; allowed: 1 to 65535")
