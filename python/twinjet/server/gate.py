"""Bounds how many streams are open: in all, on a connection, and from one address. The first thing a call meets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from twinjet.errors import Overloaded, QuotaExcess

if TYPE_CHECKING:
    from twinjet.config import ServerSettings

RETRY_S = 1.0


class Gate:
    """Counts open streams. Limits of 0 are off."""

    def __init__(self, settings: ServerSettings) -> None:
        self._max_streams = settings.max_streams
        self._max_of_connection = settings.max_streams_per_connection
        self._max_of_address = settings.max_streams_per_address
        self._num_streams = 0
        self._of_connection: Counter[str] = Counter()
        self._of_address: Counter[str] = Counter()

    @contextmanager
    def enter(self, peer: str) -> Iterator[None]:
        """Count a stream while it is open. peer: gRPC's name of the connection. Raises Overloaded."""
        address = address_of(peer)
        self._check("server", "in all", self._num_streams, self._max_streams)
        self._check(
            f"connection:{peer}", "on one connection", self._of_connection[peer], self._max_of_connection
        )
        self._check(f"address:{address}", "from one address", self._of_address[address], self._max_of_address)
        self._num_streams += 1
        self._of_connection[peer] += 1
        self._of_address[address] += 1
        try:
            yield
        finally:
            self._num_streams -= 1
            _subtract(self._of_connection, peer)
            _subtract(self._of_address, address)

    @staticmethod
    def _check(subject: str, where: str, count: int, limit: int) -> None:
        if 0 < limit <= count:
            text = f"{limit} concurrent streams {where}"
            raise Overloaded(
                f"the server has reached its limit of {text}",
                retry_after_s=RETRY_S,
                quotas=(QuotaExcess(subject, text),),
            )


def address_of(peer: str) -> str:
    """Give a connection's name without its port."""
    return peer.rpartition(":")[0] or peer


def _subtract(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
