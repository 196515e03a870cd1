"""Bounds how many streams are open: in all, on a connection, and from one address. The first thing a call meets."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

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
        self._num_streams = 0
        self._of_connection: Counter[str] = Counter()
        self._of_address: Counter[str] = Counter()

    def enter(self, peer: str) -> _Pass:
        """Count a stream until the pass, a context manager, ends. peer: gRPC's name of the connection.

        Raises Overloaded.
        """
        self.count(peer)
        return _Pass(self, peer)

    def count(self, peer: str) -> None:
        """Count a stream until leave(). Raises Overloaded."""
        if 0 < self._max_streams <= self._num_streams:
            raise full(self._max_streams)
        if self._max_of_connection or self._max_of_address:
            self._count_peer(peer)
        self._num_streams += 1

    def _count_peer(self, peer: str) -> None:
        address = address_of(peer)
        if 0 < self._max_of_connection <= self._of_connection[peer]:
            raise _full(f"connection:{peer}", "on one connection", self._max_of_connection)
        if 0 < self._max_of_address <= self._of_address[address]:
            raise _full(f"address:{address}", "from one address", self._max_of_address)
        self._of_connection[peer] += 1
        self._of_address[address] += 1

    def leave(self, peer: str) -> None:
        """A stream of this connection has ended."""
        self._num_streams -= 1
        if self._max_of_connection or self._max_of_address:
            _subtract(self._of_connection, peer)
            _subtract(self._of_address, address_of(peer))


class _Pass:
    __slots__ = ("_gate", "_peer")

    def __init__(self, gate: Gate, peer: str) -> None:
        self._gate, self._peer = gate, peer

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._gate.leave(self._peer)


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


@lru_cache(maxsize=4096)
def address_of(peer: str) -> str:
    """Give a connection's name without its port."""
    return peer.rpartition(":")[0] or peer


def _subtract(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
