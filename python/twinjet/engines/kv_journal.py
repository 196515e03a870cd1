"""What an engine's prefix cache holds, and how that changed: one writer, any number of watchers at any place.

The engine puts its events; the journal keeps the set of blocks and the last deltas, so that a watcher can begin with a
snapshot, or go on after the last delta that it took in. Used on the engine's loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from twinjet.engines.base import KvBlockFacts, KvCleared, KvEvent, KvRemoved, KvStored

MAX_KEPT_BLOCKS = 1 << 18
"""Deltas are kept for watchers that come again until they name more blocks than this."""
SNAPSHOT_BLOCKS = 2048
"""Blocks in one part of a snapshot: with 64 tokens a block about half a megabyte on the wire."""

KvBatchKind = Literal["delta", "snapshot", "snapshot_end", "heartbeat"]


@dataclass(frozen=True, slots=True)
class KvBatch:
    """One message to a watcher; see proto WatchKvEventsResponse. time_s: Unix time."""

    kind: KvBatchKind
    sequence: int
    time_s: float
    events: Sequence[KvEvent]


@dataclass(frozen=True, slots=True)
class _Block:
    parent_hash: bytes
    token_ids: Sequence[int]
    facts: KvBlockFacts


class KvJournal:
    """The blocks of one start of an engine. epoch: names it, unlike any other start's."""

    def __init__(self, *, max_kept_blocks: int = MAX_KEPT_BLOCKS) -> None:
        self.epoch = secrets.token_hex(8)
        self._max_kept_blocks = max_kept_blocks
        self._blocks: dict[bytes, _Block] = {}
        self._deltas: deque[KvBatch] = deque()
        self._num_kept_blocks = 0
        self._sequence = 0
        self._is_closed = False
        self._changed: asyncio.Event | None = None

    @property
    def sequence(self) -> int:
        """The number of the last delta; 0 before the first."""
        return self._sequence

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._blocks

    def stored(self, block_hash: bytes) -> KvStored | None:
        """A block that is held, as one event; None if it is not."""
        block = self._blocks.get(block_hash)
        if block is None:
            return None
        return KvStored((block_hash,), block.parent_hash, block.token_ids, len(block.token_ids), block.facts)

    def put(self, events: Sequence[KvEvent]) -> None:
        """Take what happened at once, in order, as one delta."""
        if not events or self._is_closed:
            return
        for event in events:
            self._apply(event)
        self._sequence += 1
        self._deltas.append(KvBatch("delta", self._sequence, time.time(), events))
        self._num_kept_blocks += _weight(events)
        while self._num_kept_blocks > self._max_kept_blocks and len(self._deltas) > 1:
            self._num_kept_blocks -= _weight(self._deltas.popleft().events)
        self._wake()

    def close(self) -> None:
        """End all watches: the engine has stopped or died."""
        self._is_closed = True
        self._wake()

    async def watch(
        self, epoch: str = "", start_sequence: int = 0, heartbeat_s: float = 10.0
    ) -> AsyncGenerator[KvBatch, None]:
        """Give a snapshot, or what follows the watcher's last delta, and then what happens, until close().

        epoch, start_sequence: as in proto WatchKvEventsRequest. heartbeat_s: longest silence.
        """
        cursor = KvCursor(self, epoch, start_sequence)
        while not self._is_closed:
            if (batch := cursor.next()) is not None:
                yield batch
            elif not await self.wait(heartbeat_s):
                yield KvBatch("heartbeat", cursor.position - 1, time.time(), ())

    async def wait(self, timeout_s: float | None) -> bool:
        """Wait for a change or close(); False if neither came in time."""
        changed = self._changed = self._changed or asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return False
        return True

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def snapshot(self) -> Iterator[KvBatch]:
        """The blocks of this moment in parts, as if every block had come just now; the last is "snapshot_end"."""
        sequence, now = self._sequence, time.time()
        rest = iter(list(self._blocks.items()))
        events: list[KvEvent] = [KvCleared()]
        part = list(islice(rest, SNAPSHOT_BLOCKS))
        while True:
            events += _chains(part)
            part = list(islice(rest, SNAPSHOT_BLOCKS))
            yield KvBatch("snapshot" if part else "snapshot_end", sequence, now, events)
            if not part:
                return
            events = []

    def keeps(self, sequence: int) -> bool:
        """Whether a delta can still be had, or is the next one."""
        return self._first_kept <= sequence <= self._sequence + 1 and sequence > 0

    def delta(self, sequence: int) -> KvBatch | None:
        """A delta that is kept; None if it is still to come."""
        return self._deltas[sequence - self._first_kept] if sequence <= self._sequence else None

    @property
    def _first_kept(self) -> int:
        """The first delta that is kept, or the next one."""
        return self._sequence + 1 - len(self._deltas)

    def _apply(self, event: KvEvent) -> None:
        match event:
            case KvStored():
                size, parent = event.block_size, event.parent_hash
                for i, block_hash in enumerate(event.block_hashes):
                    tokens = event.token_ids[i * size : (i + 1) * size]
                    self._blocks[block_hash] = _Block(parent, tokens, event.facts)
                    parent = block_hash
            case KvRemoved():
                for block_hash in event.block_hashes:
                    self._blocks.pop(block_hash, None)
            case KvCleared():
                self._blocks.clear()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None


class KvCursor:
    """A watcher's place in a journal. epoch, start_sequence: as in proto WatchKvEventsRequest."""

    def __init__(self, journal: KvJournal, epoch: str = "", start_sequence: int = 0) -> None:
        self._journal = journal
        can_resume = epoch == journal.epoch and journal.keeps(start_sequence)
        self.position = start_sequence if can_resume else 0
        """The sequence of the next delta."""
        self._parts: Iterator[KvBatch] = iter(())

    def next(self) -> KvBatch | None:
        """Give what comes next; None if there is nothing now. Who fell behind gets a snapshot."""
        if (part := next(self._parts, None)) is not None:
            return part
        if not self._journal.keeps(self.position):
            # What happens between two parts is not in it, and follows.
            self.position = self._journal.sequence + 1
            self._parts = self._journal.snapshot()
            return next(self._parts)
        delta = self._journal.delta(self.position)
        if delta is not None:
            self.position += 1
        return delta


def _weight(events: Sequence[KvEvent]) -> int:
    return sum(1 if isinstance(event, KvCleared) else len(event.block_hashes) for event in events)


def _chains(blocks: Sequence[tuple[bytes, _Block]]) -> Iterator[KvStored]:
    """Join blocks that continue each other to as few events as their order allows."""
    hashes: list[bytes] = []
    tokens: list[int] = []
    first: _Block | None = None
    for block_hash, block in blocks:
        if first is None or block.parent_hash != hashes[-1] or block.facts != first.facts:
            if first is not None:
                yield _stored(hashes, tokens, first)
            first, hashes, tokens = block, [], []
        hashes.append(block_hash)
        tokens.extend(block.token_ids)
    if first is not None:
        yield _stored(hashes, tokens, first)


def _stored(hashes: Sequence[bytes], tokens: Sequence[int], first: _Block) -> KvStored:
    return KvStored(hashes, first.parent_hash, tokens, len(tokens) // len(hashes), first.facts)
