"""The requests that are alive in this server, so that shutdown can wait for each of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class LiveRequests:
    """Requests that a handler or an engine still works on, by a key that is unique to each."""

    def __init__(self) -> None:
        self._holds: Counter[object] = Counter()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def __len__(self) -> int:
        return len(self._holds)

    @contextmanager
    def hold(self, key: object) -> Iterator[None]:
        """Count a request as alive; several holds of one key count once."""
        self._holds[key] += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._holds[key] -= 1
            if not self._holds[key]:
                del self._holds[key]
            if not self._holds:
                self._is_idle.set()

    async def wait(self, timeout_s: float) -> bool:
        """Wait until none is left; False if some are after timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return False
        return True
