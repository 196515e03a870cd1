"""Bounds how many streams are open: in all, on a connection, and from one address. The first thing a call meets."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from twinjet.addresses import address_of, take_off
from twinjet.errors import Overloaded, QuotaExcess

if TYPE_CHECKING:
    from twinjet.config import ServerSettings

RETRY_S = 1.0
STREAM_PATHS = tuple(f"/twinjet.v1.InferenceService/{method}" for method in ("Generate", "Chat"))
"""The methods whose calls enter the gate."""


class Gate:
    """Counts open streams. Limits of 0 are off."""

    def __init__(self, settings: ServerSettings) -> None:
        self._max_streams = settings.max_streams
        self._max_of_connection = settings.max_streams_per_connection
        self._max_of_address = settings.max_streams_per_address
        self._ipv6_prefix = settings.client_ipv6_prefix
        self._num_streams = 0
        self._of_connection: Counter[str] = Counter()
        self._of_address: Counter[str] = Counter()

    def enter(self, peer: str) -> _Pass:
        """Count a stream until the pass, a context manager that gives count()'s address, ends. Raises Overloaded."""
        return _Pass(self, peer, self.count(peer))

    def count(self, peer: str) -> str:
        """Count a stream until leave(). peer: gRPC's name of the connection. Gives its address_of(). Raises Overloaded."""
        if 0 < self._max_streams <= self._num_streams:
            raise full(self._max_streams)
        address = address_of(peer, self._ipv6_prefix)
        if self._max_of_connection or self._max_of_address:
            self._count_peer(peer, address)
        self._num_streams += 1
        return address

    def _count_peer(self, peer: str, address: str) -> None:
        if 0 < self._max_of_connection <= self._of_connection[peer]:
            raise _full(f"connection:{peer}", "on one connection", self._max_of_connection)
        if 0 < self._max_of_address <= self._of_address[address]:
            raise _full(f"address:{address}", "from one address", self._max_of_address)
        self._of_connection[peer] += 1
        self._of_address[address] += 1

    def address(self, peer: str) -> str:
        """Give the address_of() a connection that is not counted."""
        return address_of(peer, self._ipv6_prefix)

    def leave(self, peer: str, address: str) -> None:
        """A stream of this connection has ended. address: as count() gave it."""
        self._num_streams -= 1
        if self._max_of_connection or self._max_of_address:
            take_off(self._of_connection, peer)
            take_off(self._of_address, address)


class _Pass:
    __slots__ = ("_address", "_gate", "_peer")

    def __init__(self, gate: Gate, peer: str, address: str) -> None:
        self._gate, self._peer, self._address = gate, peer, address

    def __enter__(self) -> str:
        return self._address

    def __exit__(self, *_: object) -> None:
        self._gate.leave(self._peer, self._address)


def full(max_streams: int) -> Overloaded:
    """Give the error of a server that has max_streams open."""
    return _full("server", "in all", max_streams)


def _full(subject: str, where: str, limit: int) -> Overloaded:
    text = f"{limit} concurrent streams {where}"
    return Overloaded(
        f"the server has reached its limit of {text}",
        retry_after_s=RETRY_S,
        quotas=(QuotaExcess(subject, text),),
    )
