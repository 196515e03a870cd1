"""Work on threads whose length is known beforehand, so that whoever brings much of it holds up nobody who brings little."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import NamedTuple, TypeVar

_Result = TypeVar("_Result")


class _Waiting(NamedTuple):
    due: int
    order: int
    size: int
    turn: asyncio.Future[None]


class _Caller:
    """Who has jobs that wait: the short ones and the long ones, each as a heap.

    finish: the tag of the job that was begun last, or the time at which the first one came. begun: work begun since.
    tags: what stands for the caller among the heads of short jobs, and of all.
    """

    __slots__ = ("begun", "finish", "num_waiting", "queues", "tags")

    def __init__(self, finish: int) -> None:
        self.finish = finish
        self.begun = 0
        self.num_waiting = 0
        self.queues: tuple[list[_Waiting], list[_Waiting]] = ([], [])
        self.tags: list[int | None] = [None, None]

    def next(self, *, long_too: bool) -> _Waiting | None:
        """The job that is due first, of the short ones or of all."""
        first: _Waiting | None = None
        for queue in self.queues if long_too else self.queues[:1]:
            while queue and queue[0].turn.done():
                heappop(queue)
            if queue and (first is None or queue[0] < first):
                first = queue[0]
        return first


class _Head(NamedTuple):
    tag: int
    order: int
    caller: _Caller


class FairThreads:
    """Runs jobs on a few threads, in turns of their callers, of one caller the shortest next. One asyncio loop.

    Callers share the threads by self-clocked fair queueing (Golestani 1994): a job's tag is its size behind the tag of
    the job that its caller began before, or behind the present time, which is the tag of the job that was begun last;
    the smallest tag is next. So however much one caller brings, another's job waits for what is running and for no more
    work of each other caller than it is itself.

    Of one caller, a job is overtaken by no more work than it is itself: those that come after so much was begun stand
    behind it. Long ones take half of the threads at most, and a thread stays taken until its job has really ended, also
    where nobody waits for it any more.
    """

    def __init__(self, long_size: int, num_threads: int | None = None) -> None:
        """long_size: jobs above it are long. num_threads: at least 2; None: as many as there are processors."""
        self._long_size = long_size
        self._num_free = max(2, num_threads or os.cpu_count() or 2)
        self._num_long_free = self._num_free // 2
        self._threads = ThreadPoolExecutor(self._num_free, thread_name_prefix="twinjet-text")
        self._callers: dict[str, _Caller] = {}
        # Who has short jobs; and who has any.
        self._heads: tuple[list[_Head], list[_Head]] = ([], [])
        self._time = 0
        self._order = count()

    async def run(self, size: int, work: Callable[[], _Result], caller: str) -> _Result:
        """Give what work, of so much length, gives on a thread."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._wait(size, turn, caller)
        self._give_turns()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._take_back(size)
            raise
        finally:
            self._forget(caller)
        job = self._threads.submit(work)

        def ended(_: Future[_Result]) -> None:
            # Without a loop nobody waits for a turn.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._take_back, size)

        job.add_done_callback(ended)
        return await asyncio.wrap_future(job)

    def _wait(self, size: int, turn: asyncio.Future[None], name: str) -> None:
        is_long = size > self._long_size
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = _Caller(self._time)
        caller.num_waiting += 1
        heappush(caller.queues[is_long], _Waiting(caller.begun + size, next(self._order), size, turn))
        self._stand(caller, long_too=True)
        if not is_long:
            self._stand(caller, long_too=False)

    def _forget(self, name: str) -> None:
        caller = self._callers[name]
        caller.num_waiting -= 1
        if not caller.num_waiting:
            del self._callers[name]

    def _take_back(self, size: int) -> None:
        self._num_free += 1
        self._num_long_free += size > self._long_size
        self._give_turns()

    def _give_turns(self) -> None:
        while self._num_free:
            long_too = self._num_long_free > 0
            if (head := self._head(long_too=long_too)) is None:
                return
            heappop(self._heads[long_too])
            caller = head.caller
            caller.tags[long_too] = None
            job = caller.next(long_too=long_too)
            assert job is not None
            is_long = job.size > self._long_size
            heappop(caller.queues[is_long])
            caller.finish = head.tag
            caller.begun += job.size
            self._time = max(self._time, head.tag)
            self._num_free -= 1
            self._num_long_free -= is_long
            self._stand(caller, long_too=long_too)
            job.turn.set_result(None)

    def _stand(self, caller: _Caller, *, long_too: bool) -> None:
        """Put a caller among the heads where its next job has a smaller tag than what stands for it there."""
        job = caller.next(long_too=long_too)
        if job is None:
            return
        tag, standing = caller.finish + job.size, caller.tags[long_too]
        if standing is None or tag < standing:
            caller.tags[long_too] = tag
            heappush(self._heads[long_too], _Head(tag, job.order, caller))

    def _head(self, *, long_too: bool) -> _Head | None:
        """The caller whose job is next. Tags that have grown since are mended where they come to the front."""
        heads = self._heads[long_too]
        while heads:
            tag, _, caller = heads[0]
            job = caller.next(long_too=long_too)
            if tag != caller.tags[long_too]:
                heappop(heads)
            elif job is None:
                heappop(heads)
                caller.tags[long_too] = None
            elif (true_tag := caller.finish + job.size) > tag:
                caller.tags[long_too] = true_tag
                heapreplace(heads, _Head(true_tag, job.order, caller))
            else:
                return heads[0]
        return None
