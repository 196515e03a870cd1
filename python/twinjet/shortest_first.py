"""Work on threads whose length is known beforehand, so that whoever brings much of it holds up nobody who brings little."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple, TypeVar

_Result = TypeVar("_Result")


class _Waiting(NamedTuple):
    due: int
    order: int
    turn: asyncio.Future[None]


class ShortestFirst:
    """Runs jobs on a few threads, the shortest next. One asyncio loop.

    A job is overtaken by no more work than it is itself: those that come after so much was begun stand behind it. Long
    ones take half of the threads at most, and a thread stays taken until its job has really ended, also where nobody
    waits for it any more.
    """

    def __init__(self, long_size: int, num_threads: int | None = None) -> None:
        """long_size: jobs above it are long. num_threads: at least 2; None: as many as there are processors."""
        self._long_size = long_size
        self._num_free = max(2, num_threads or os.cpu_count() or 2)
        self._num_long_free = self._num_free // 2
        self._threads = ThreadPoolExecutor(self._num_free, thread_name_prefix="twinjet-text")
        self._short: list[_Waiting] = []
        self._long: list[_Waiting] = []
        self._begun = 0
        self._order = count()

    async def run(self, size: int, work: Callable[[], _Result]) -> _Result:
        """Give what work, of so much length, gives on a thread."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        waiting = self._long if size > self._long_size else self._short
        heappush(waiting, _Waiting(self._begun + size, next(self._order), turn))
        self._give_turns()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._take_back(size)
            raise
        self._begun += size
        job = self._threads.submit(work)

        def ended(_: Future[_Result]) -> None:
            # Without a loop nobody waits for a turn.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._take_back, size)

        job.add_done_callback(ended)
        return await asyncio.wrap_future(job)

    def _take_back(self, size: int) -> None:
        self._num_free += 1
        self._num_long_free += size > self._long_size
        self._give_turns()

    def _give_turns(self) -> None:
        while self._num_free:
            for waiting in (self._short, self._long):
                while waiting and waiting[0].turn.done():
                    heappop(waiting)
            open_to = [self._short, self._long] if self._num_long_free else [self._short]
            queues = [waiting for waiting in open_to if waiting]
            if not queues:
                return
            first = min(queues, key=lambda waiting: waiting[0])
            self._num_free -= 1
            self._num_long_free -= first is self._long
            heappop(first).turn.set_result(None)
