"""The requests that are alive in this server, so that shutdown can wait for each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class LiveRequests:
    """A set of tasks, one for each request that an engine works on."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a request's work as a task that is held until it has cleaned up."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self, timeout_s: float) -> bool:
        """Wait until none is left; False if some are after timeout_s."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)
        return not self._tasks
