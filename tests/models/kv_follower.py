"""A watcher of KV events as the contract describes it, as plain as can be: apply everything in order."""

from __future__ import annotations

from twinjet.engines.base import KvBlockFacts, KvCleared, KvRemoved, KvStored
from twinjet.engines.kv_journal import KvBatch


class KvFollower:
    """Holds blocks by hash: parent, tokens and facts. is_complete: not amid a snapshot."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, tuple[bytes, tuple[int, ...], KvBlockFacts]] = {}
        self.sequence = -1
        self.is_complete = False
        self.epoch = ""

    def take(self, batch: KvBatch, epoch: str = "") -> None:
        """Apply a batch. Fails if it does not continue what came before."""
        if batch.kind in ("delta", "heartbeat"):
            assert self.is_complete and batch.sequence == self.sequence + (batch.kind == "delta")
        self.epoch = epoch
        for event in batch.events:
            match event:
                case KvStored():
                    parent, size = event.parent_hash, event.block_size
                    assert len(event.token_ids) == size * len(event.block_hashes)
                    for i, block_hash in enumerate(event.block_hashes):
                        tokens = tuple(event.token_ids[i * size : (i + 1) * size])
                        self.blocks[block_hash] = (parent, tokens, event.facts)
                        parent = block_hash
                case KvRemoved():
                    for block_hash in event.block_hashes:
                        del self.blocks[block_hash]
                case KvCleared():
                    self.blocks.clear()
        self.is_complete = batch.kind != "snapshot"
        self.sequence = batch.sequence

    def resume(self) -> tuple[str, int]:
        """Epoch and start_sequence to go on with."""
        return (self.epoch, self.sequence + 1) if self.is_complete else ("", 0)
