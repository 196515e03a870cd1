"""Statistics and KV events: one destructive iterator each, and what stands in them."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from tensorrt_llm import _contract


class IterationResult:
    """The single iterator: one consumer, destructive, ends after a silence, armed again by a submission.

    Belongs to the loop in which the first prompt was submitted.
    """

    def __init__(self) -> None:
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.timeout: float | None = 2
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[dict[str, Any]] = deque()
        self._has_some = threading.Condition()
        self._is_armed = True
        self._has_consumer = False

    def arm(self) -> None:
        self._is_armed = True

    def put(self, row: dict[str, Any]) -> None:
        """Take a row of the engine's; called in the loop."""
        if not _contract.has("iterators_block"):
            self.queue.put_nowait(row)
            return
        with self._has_some:
            self._waiting.append(row)
            self._has_some.notify_all()

    def fetch(self, timeout: float | None) -> None:
        """Get the rows from the workers: waits here, in the caller's thread, until there is one."""
        self.timeout = timeout
        if not _contract.has("iterators_block"):
            return
        with self._has_some:
            self._has_some.wait_for(lambda: self._waiting, timeout)
            rows, self._waiting = list(self._waiting), deque()
        self._is_armed = True
        self._loop.call_soon_threadsafe(self._fill, rows)

    def _fill(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.queue.put_nowait(row)

    def __aiter__(self) -> IterationResult:
        if self._has_consumer:
            raise AssertionError("a second consumer would steal elements")
        self._has_consumer = True
        return self

    async def __anext__(self) -> dict[str, Any]:
        if not self._is_armed:
            self._has_consumer = False
            raise StopAsyncIteration
        try:
            return await asyncio.wait_for(self.queue.get(), self.timeout)
        except TimeoutError:
            self._is_armed = self._has_consumer = False
            raise StopAsyncIteration from None
        except asyncio.CancelledError:
            self._has_consumer = False
            raise


async def nothing() -> AsyncIterator[dict[str, Any]]:
    """Give no row."""
    for _ in ():
        yield {}


def iteration_row(
    *, step: int, num_active: int, num_blocks: int, used: int, block_size: int
) -> dict[str, Any]:
    """Make a row of statistics with all recorded keys."""
    row = dict.fromkeys(_contract.CONTRACT["stats"]["iteration"])
    kv = dict.fromkeys(_contract.CONTRACT["stats"]["kvCacheStats"], 0)
    batching = dict.fromkeys(_contract.CONTRACT["stats"]["inflightBatchingStats"], 0)
    kv |= {
        "maxNumBlocks": num_blocks,
        "usedNumBlocks": used,
        "freeNumBlocks": num_blocks - used,
        "tokensPerBlock": block_size,
    }
    return row | {
        "iter": step,
        "numActiveRequests": num_active,
        "numQueuedRequests": 0,
        "kvCacheStats": kv,
        "inflightBatchingStats": batching,
    }


class EventLog:
    """Makes the KV events of one engine; put gets them.

    windows: the attention windows of the model, each with blocks of its own. num_ranks: ranks of attention data
    parallelism, each with a cache of its own.
    """

    def __init__(self, put: Callable[[dict[str, Any]], None], windows: list[int], num_ranks: int) -> None:
        self._put = put
        self._windows = windows
        self._ranks: list[int | None] = list(range(num_ranks)) if num_ranks > 1 else [None]
        self._num_events = 0

    def created(self, num_blocks: int, num_host_blocks: int) -> None:
        data = {"type": "created", "num_blocks_per_cache_level": [num_blocks, num_host_blocks]}
        for window in self._windows:
            for rank in self._ranks:
                self._emit(data, window, rank)

    def stored(
        self, parent: Any, key: Any, tokens: tuple[int, ...], rank: int, *, priority: int = 35
    ) -> None:
        for window in self._windows:
            block = {
                "type": "stored_block",
                "block_hash": block_hash(key),
                "tokens": [{"type": "unique_token", "token_id": t, "token_extra_id": 0} for t in tokens],
                "cache_level": 0,
                "priority": priority,
            }
            parent_hash = None if parent is None else block_hash(parent)
            self._emit(
                {"type": "stored", "parent_hash": parent_hash, "blocks": [block]},
                window,
                self._ranks[rank % len(self._ranks)],
            )

    def removed(self, key: Any, rank: int, *, window: int | None = None) -> None:
        for each in self._windows if window is None else [window]:
            data = {"type": "removed", "block_hashes": [block_hash(key)]}
            self._emit(data, each, self._ranks[rank % len(self._ranks)])

    def _emit(self, data: dict[str, Any], window: int, rank: int | None) -> None:
        event = {"event_id": self._num_events, "data": data, "window_size": window}
        if rank is not None:
            event["attention_dp_rank"] = rank
        self._num_events += 1
        self._put(event)


def block_hash(key: Any) -> int | str:
    """Name a block: a signed 64-bit number, or a hexadecimal digest where the manager is the V2 one."""
    if _contract.has("string_hashes"):
        return hashlib.sha256(repr(key).encode()).hexdigest()
    return hash(key)
