"""The requests that are alive in this server, so that shutdown can wait for each of them."""

from __future__ import annotations

import asyncio


class LiveRequests:
    """Requests that a handler or an engine still works on, by a key that is unique to each."""

    def __init__(self) -> None:
        self._holds: dict[object, int] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def __len__(self) -> int:
        return len(self._holds)

    def hold(self, key: object) -> _Hold:
        """Count a request as alive until the hold, a context manager, ends; several holds of one key count once."""
        self._holds[key] = self._holds.get(key, 0) + 1
        self._is_idle.clear()
        return _Hold(self, key)

    def let_go(self, key: object) -> None:
        """Called by a hold that ends."""
        num_holds = self._holds[key] - 1
        if num_holds:
            self._holds[key] = num_holds
        else:
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


class _Hold:
    __slots__ = ("_key", "_requests")

    def __init__(self, requests: LiveRequests, key: object) -> None:
        self._requests, self._key = requests, key

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._requests.let_go(self._key)
