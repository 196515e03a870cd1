"""Who follows the block manager's events holds what its prefix cache holds, token by token."""

from __future__ import annotations

import random
from contextlib import aclosing

import pytest

from tests.models.kv_follower import KvFollower
from twinjet._core import BlockManager
from twinjet.engines.base import KvBlockFacts, KvCleared, KvEvent, KvRemoved, KvStored
from twinjet.engines.kv_journal import KvJournal
from twinjet.engines.vllm import kv_wire

BLOCK = 4


def make(num_blocks: int = 16, max_events: int = 1 << 12) -> BlockManager:
    return BlockManager(num_blocks, BLOCK, max_events=max_events)


def events(
    manager: BlockManager, most: int = 1 << 12, decoder: kv_wire.Decoder | None = None
) -> list[object]:
    return list((decoder or kv_wire.Decoder()).decode(kv_wire.EVENTS, manager.drain_events(most)))


def reserve(manager: BlockManager, tokens: list[int], salt: bytes = b"") -> tuple[int, list[bytes]]:
    """Open a sequence as vLLM's requests do: with hashes and tokens of the caller's."""
    hashes = manager.hasher.hash_blocks(tokens, salt=salt)
    sequence = manager.open()
    assert manager.reserve(sequence, len(tokens), len(tokens), hashes, None, 0, False, tokens) is not None
    return sequence, hashes


def test_blocks_that_continue_each_other_are_one_event_with_their_tokens() -> None:
    m = make()
    tokens = list(range(10))
    _, hashes = reserve(m, tokens)
    assert events(m) == [KvStored(hashes, b"", tokens[:8], BLOCK, KvBlockFacts(medium="device"))]
    sequence, more = reserve(m, [9, *tokens])
    assert events(m) == [KvStored(more, b"", [9, *tokens[:7]], BLOCK, KvBlockFacts(medium="device"))]
    m.evict(m.block_ids(sequence))
    assert events(m) == [KvRemoved(more)]
    assert m.drain_events(9) == b""


def test_what_is_published_later_names_its_parent() -> None:
    m = make()
    tokens = list(range(8))
    hashes = m.hasher.hash_blocks(tokens)
    sequence = m.open()
    m.reserve(sequence, 8, 4, hashes, None, 0, False, tokens)
    assert len(events(m)) == 1
    m.publish_hashes(sequence, 8, hashes, tokens)
    assert events(m) == [KvStored([hashes[1]], hashes[0], tokens[4:], BLOCK, KvBlockFacts(medium="device"))]


def test_copies_of_a_block_are_told_once_and_gone_with_the_last() -> None:
    m = make()
    first, hashes = reserve(m, [1, 2, 3, 4])
    second, _ = reserve(m, [1, 2, 3, 4])
    assert len(events(m)) == 1
    m.evict(m.block_ids(first))
    assert events(m) == []
    m.evict(m.block_ids(second))
    assert events(m) == [KvRemoved(hashes)]


def test_a_tag_tells_salt_and_adapter() -> None:
    m = make()
    decoder = kv_wire.Decoder()
    kind, size = kv_wire.HEADER.unpack_from(frame := kv_wire.facts_frame({7: ("salt", "lora")}))
    assert (kind, size) == (kv_wire.FACTS, len(frame) - kv_wire.HEADER.size)
    assert decoder.decode(kind, frame[kv_wire.HEADER.size :]) == []
    tokens = [1, 2, 3, 4]
    sequence = m.open()
    m.set_tag(sequence, 7)
    m.reserve(sequence, 4, 4, m.hasher.hash_blocks(tokens, salt=b"salt"), None, 0, False, tokens)
    (event,) = events(m, decoder=decoder)
    assert isinstance(event, KvStored) and event.facts == KvBlockFacts("salt", "lora", "device")
    m.free(sequence)
    reserve(m, [5, 6, 7, 8])
    (event,) = events(m, decoder=decoder)
    assert isinstance(event, KvStored) and event.facts == KvBlockFacts(medium="device"), (
        "the slot's next owner"
    )


def test_what_the_log_had_no_room_for_is_told_as_lost() -> None:
    m = make(64, max_events=3)
    reserve(m, list(range(40)))
    lost, kept = events(m)
    assert lost == kv_wire.Lost(7)
    assert isinstance(kept, KvStored) and len(kept.block_hashes) == 3
    assert events(m) == []


def test_a_reset_is_told() -> None:
    m = make()
    sequence, _ = reserve(m, [1, 2, 3, 4])
    m.free(sequence)
    assert m.reset()
    assert events(m)[-1] == KvCleared()


@pytest.mark.parametrize(
    ("tokens", "error"), [([1, 2, 3], ValueError), ((1, 2, 3, 4), TypeError), ([1, 2, 3, "x"], TypeError)]
)
def test_bad_tokens_change_nothing(tokens: list[int], error: type[Exception]) -> None:
    m = make()
    sequence = m.open()
    hashes = m.hasher.hash_blocks([1, 2, 3, 4])
    with pytest.raises(error):
        m.reserve(sequence, 4, 4, hashes, None, 0, False, tokens)
    assert m.num_free_blocks == 16
    m.reserve(sequence, 4)
    with pytest.raises(error):
        m.publish_hashes(sequence, 4, hashes, tokens)
    assert m.drain_events(9) == b""
    m.check()


class Requests:
    """Random life of a cache: sequences by the caller's hashes and by tokens, frees, evictions, resets."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.manager = make(rng.choice([6, 24, 60]))
        self.live: list[int] = []
        self.tokens: dict[bytes, tuple[int, ...]] = {}

    def act(self) -> None:
        rng, m = self.rng, self.manager
        choice = rng.random()
        if choice < 0.55:
            tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 20))]
            hashes = m.hasher.hash_blocks(tokens)
            for i, block_hash in enumerate(hashes):
                self.tokens[block_hash] = tuple(tokens[i * BLOCK : (i + 1) * BLOCK])
            if rng.random() < 0.3:
                sequence = m.allocate(tokens)
                if sequence is not None:
                    self.live.append(sequence)
                return
            sequence = m.open()
            matched = m.match_hashes(hashes, (len(tokens) - 1) // BLOCK)
            publish = rng.choice([0, len(tokens) // 2, len(tokens)])
            publish = max(publish, len(matched) * BLOCK)
            if m.reserve(sequence, len(tokens), publish, hashes, matched or None, 0, False, tokens) is None:
                m.free(sequence)
                return
            m.publish_hashes(sequence, len(tokens), hashes, tokens)
            self.live.append(sequence)
        elif choice < 0.9 and self.live:
            m.free(self.live.pop(rng.randrange(len(self.live))))
        elif choice < 0.97:
            m.evict(rng.sample(range(m.num_blocks), 2))
        else:
            m.reset()

    def held(self) -> dict[bytes, tuple[int, ...]]:
        """What the manager itself says that its cache holds."""
        found = (self.manager.block_hash(b) for b in range(self.manager.num_blocks))
        return {h: self.tokens[h] for h in found if h is not None}


@pytest.mark.parametrize("seed", range(10))
async def test_a_follower_that_drops_and_resumes_at_random_equals_the_manager(seed: int) -> None:
    rng = random.Random(seed)
    requests, decoder = Requests(rng), kv_wire.Decoder()
    journal = KvJournal(max_kept_blocks=rng.choice([4, 40, 10_000]))
    follower, watch = KvFollower(), journal.watch()
    num_checked = 0
    for _ in range(250):
        for _ in range(rng.randint(1, 4)):
            requests.act()
        while data := requests.manager.drain_events(rng.randint(1, 9)):
            told: list[KvEvent] = []
            for event in decoder.decode(kv_wire.EVENTS, data):
                assert not isinstance(event, kv_wire.Lost)
                told.append(event)
            journal.put(told)
        if rng.random() < 0.15:
            await watch.aclose()
            watch = journal.watch(*follower.resume())
        if rng.random() < 0.3:
            continue
        while not (follower.is_complete and follower.sequence == journal.sequence):
            follower.take(await anext(watch), journal.epoch)
        assert {h: tokens for h, (_, tokens, _) in follower.blocks.items()} == requests.held()
        num_checked += 1
    async with aclosing(watch):
        assert num_checked > 100
