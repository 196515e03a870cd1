"""One reader each of the engine's statistics and KV events, for all who ask.

Both iterators of the LLM API are single, shared and destructive: an element read is gone. They end after a
silence and work again once a request has been submitted, so the readers wait for requests, not for time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from twinjet.engines.base import (
    EngineLoad,
    KvBlockFacts,
    KvCache,
    KvCleared,
    KvEvent,
    KvMedium,
    KvRemoved,
    KvStored,
)
from twinjet.engines.kv_journal import KvJournal
from twinjet.engines.tensorrt_llm.front.processes import DaemonWorker, end_tasks

log = logging.getLogger(__name__)

_MAX_BLOCKS = 1 << 20
"""Blocks remembered at most; the engine drops events when its buffer is full, so some are never removed."""
_HASH_MASK = 2**64 - 1
_MEDIA: tuple[KvMedium, ...] = ("device", "host")
"""By cache level; what is below is on a disk."""


@dataclass(slots=True)
class EngineStats:
    """The engine's latest statistics, as far as it gives any; counts since start: paused, num_rows.

    capacity: the cache's size from a better source. counts_host_blocks: the statistics' size may hold blocks in
    host memory, which are no room for a running request, and so is not believed.
    """

    kv_cache: KvCache | None = None
    capacity: KvCache | None = None
    counts_host_blocks: bool = False
    kv_blocks_used: int | None = None
    running: int | None = None
    waiting: int | None = None
    num_paused: int = 0
    num_rows: int = 0
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def set_capacity(self, capacity: KvCache | None) -> None:
        """Take the cache's size from a source that is better than the statistics; None is not known."""
        if capacity is not None:
            self.capacity = self.kv_cache = capacity

    def take(self, row: Mapping[str, Any]) -> None:
        """Take one row; any part of it may be missing or null."""
        self.num_rows += 1
        self._arrived.set()
        self.running = row.get("numActiveRequests", self.running)
        self.waiting = row.get("numQueuedRequests", self.waiting)
        kv = row.get("kvCacheStats") or {}
        is_size_known = self.capacity is not None or self.counts_host_blocks
        if kv.get("maxNumBlocks") and kv.get("tokensPerBlock") and not is_size_known:
            self.kv_cache = KvCache(int(kv["maxNumBlocks"]), int(kv["tokensPerBlock"]))
        if kv.get("usedNumBlocks") is not None:
            self.kv_blocks_used = int(kv["usedNumBlocks"])
        batching = row.get("inflightBatchingStats") or {}
        self.num_paused += int(batching.get("numPausedRequests") or 0)

    async def wait_for_row(self) -> None:
        """Return once a row has come."""
        await self._arrived.wait()

    def load(self, *, in_flight: int) -> EngineLoad:
        """Give the load. An idle engine says nothing, but with no request in flight nothing is held."""
        known = self.num_rows > 0
        idle = in_flight == 0
        return EngineLoad(
            waiting=0 if idle else self.waiting,
            running=0 if idle else self.running if self.running is not None else in_flight,
            kv_blocks_total=None if self.kv_cache is None else self.kv_cache.num_blocks,
            kv_blocks_used=0 if idle else self.kv_blocks_used,
            preemptions=self.num_paused if known else None,
        )


class DestructiveReader:
    """Reads one of the engine's iterators for ever.

    open_iterator: makes it, in a thread, since versions wait in it until the engine has something; may raise before
    the first request. take: gets each element. An iterator that ends is opened again after the next request has been
    submitted (`poke`), or at once while requests run. silence_s: time without an element after which it ends.
    """

    def __init__(
        self,
        name: str,
        open_iterator: Callable[[], Any],
        take: Callable[[Mapping[str, Any]], None],
        is_busy: Callable[[], bool],
        silence_s: float,
    ) -> None:
        self._name = name
        self._open = open_iterator
        self._take = take
        self._is_busy = is_busy
        self._silence_s = silence_s
        self._poked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._worker: DaemonWorker

    def start(self) -> None:
        self._worker = DaemonWorker(f"tensorrt_llm {self._name}")
        self._task = asyncio.create_task(self._run(), name=f"tensorrt_llm {self._name}")

    def poke(self) -> None:
        """Say that a request has been submitted."""
        self._poked.set()

    async def stop(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
            self._worker.end()
        self._task = None

    async def _run(self) -> None:
        while True:
            await self._poked.wait()
            self._poked.clear()
            try:
                while await self._read_once():
                    pass
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the engine raises, serving goes on
                log.warning("cannot read %s: %s", self._name, error)

    async def _read_once(self) -> bool:
        """Read until silence; say whether it is worth opening the iterator again at once.

        After something was read it always is: an iterator that is filled at its opening leaves the rest behind.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        num_read = 0
        async for row in await self._worker.call(self._open):
            self._take(row)
            num_read += 1
        # One that ends at once without an element is not armed; opening it in a loop would burn the CPU.
        return num_read > 0 or (self._is_busy() and loop.time() - began >= self._silence_s / 2)


class KvEventFan:
    """Converts the engine's KV events and keeps the journal of them.

    The journal is of one cache. Of several attention windows it is the widest one's, since only what that holds makes a
    whole prefix; of several ranks (attention data parallelism), each with a cache of its own, it is all together: a
    block is stored with the first rank that has it and removed with the last.
    """

    def __init__(self) -> None:
        self.on_created: Callable[[int], None] = lambda num_blocks: None
        """Told the GPU's number of blocks when the engine tells its pools."""
        self.hash_kinds: set[str] = set()
        """Kinds of block hashes seen: "numbers", "strings"."""
        self.windows: set[int] = set()
        self.ranks: set[int] = set()
        self.journal = KvJournal()
        self._widest = 0
        self._holders: dict[bytes, set[int]] = {}

    def take(self, row: Mapping[str, Any]) -> None:
        """Take one event of the engine's."""
        data = row.get("data") or {}
        events: list[KvEvent] = []
        if len(self._holders) > _MAX_BLOCKS:
            self._holders.clear()
            events.append(KvCleared())
        window, rank = int(row.get("window_size") or 0), int(row.get("attention_dp_rank") or 0)
        self.windows.add(window)
        self.ranks.add(rank)
        for block in data.get("blocks", ()):
            self.hash_kinds.add("strings" if isinstance(block["block_hash"], str) else "numbers")
        if window > self._widest:
            if self._holders:
                self._holders.clear()
                events.append(KvCleared())
            self._widest = window
        if window == self._widest:
            if data.get("type") == "created" and data.get("num_blocks_per_cache_level"):
                self.on_created(int(data["num_blocks_per_cache_level"][0]))
            events += [seen for event in convert_kv_event(data) if (seen := self._merge(event, rank))]
            events += self._moved(data)
        self.journal.put(events)

    def _merge(self, event: KvEvent, rank: int) -> KvEvent | None:
        """Note which rank holds the blocks; give the event if it changes what all hold together."""
        if isinstance(event, KvStored):
            is_new = False
            for block_hash in event.block_hashes:
                holders = self._holders.setdefault(block_hash, set())
                is_new = is_new or not holders
                holders.add(rank)
            return event if is_new else None
        if isinstance(event, KvRemoved):
            gone = []
            for block_hash in event.block_hashes:
                holders = self._holders.get(block_hash, set())
                holders.discard(rank)
                if not holders:
                    self._holders.pop(block_hash, None)
                    gone.append(block_hash)
            return KvRemoved(gone) if gone else None
        return event

    def _moved(self, data: Mapping[str, Any]) -> list[KvEvent]:
        """Tell of a block that is on another cache level than before."""
        level = (data.get("cache_level") or {}).get("new_value")
        if data.get("type") != "updated" or level is None:
            return []
        moved = self.journal.stored(hash_bytes(data["block_hash"]))
        return [] if moved is None else [replace(moved, facts=replace(moved.facts, medium=_medium(level)))]


def convert_kv_event(data: Mapping[str, Any]) -> list[KvEvent]:
    """Convert one event. What only changes a block and the announcement of the pool's size give none.

    The engine's 64-bit hashes become 8 bytes, most significant first; hexadecimal digests become their bytes.
    """
    kind = data.get("type")
    if kind == "removed":
        return [KvRemoved([hash_bytes(h) for h in data.get("block_hashes", [])])]
    if kind != "stored":
        return []
    blocks = data.get("blocks", [])
    if not blocks:
        return []
    size = len(blocks[0]["tokens"])
    full = [block for block in blocks if len(block["tokens"]) == size]
    parent = data.get("parent_hash")
    return [
        KvStored(
            block_hashes=[hash_bytes(block["block_hash"]) for block in full],
            parent_hash=b"" if parent is None else hash_bytes(parent),
            token_ids=[token["token_id"] for block in full for token in block["tokens"]],
            block_size=size,
            # The engine tells neither salt nor adapter.
            facts=KvBlockFacts(medium=_medium(blocks[0].get("cache_level"))),
        )
    ]


def _medium(level: int | None) -> KvMedium | None:
    if level is None:
        return None
    return _MEDIA[level] if level < len(_MEDIA) else "disk"


def hash_bytes(value: int | str) -> bytes:
    """Give a block hash as bytes."""
    if isinstance(value, str):
        try:
            return bytes.fromhex(value)
        except ValueError:
            return value.encode()
    return (value & _HASH_MASK).to_bytes(8, "big")
