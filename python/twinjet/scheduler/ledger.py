"""KV ledger: which blocks the engine's running requests hold, as far as can be known from outside."""

from __future__ import annotations

from twinjet.engines.base import KvCache
from twinjet.scheduler.entry import Entry


class Holding:
    """Blocks that one running request holds and may come to hold."""

    __slots__ = ("num_blocks",)

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks


class KvLedger:
    """Counts blocks without sharing; each request holds the blocks of its prompt and its max_tokens."""

    def __init__(self, cache: KvCache, *, headroom: float, lookahead_tokens: int) -> None:
        self._block_size = cache.block_size
        self._lookahead = lookahead_tokens
        self.num_blocks = cache.num_blocks
        self._usable = cache.num_blocks - int(cache.num_blocks * headroom)
        self.num_used_blocks = 0
        self.num_overflows = 0

    def admit(self, entry: Entry) -> Holding | None:
        """Hold the request's blocks; None if there is no room. One that exceeds the cache runs alone."""
        tokens = entry.num_prompt_tokens + entry.request.sampling.max_tokens + self._lookahead
        blocks = min(-(-tokens // self._block_size) * entry.num_sequences, self._usable)
        if self.num_used_blocks + blocks > self._usable:
            return None
        self.num_used_blocks += blocks
        return Holding(blocks)

    def release(self, holding: Holding) -> None:
        self.num_used_blocks -= holding.num_blocks
