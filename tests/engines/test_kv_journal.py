"""The journal of KV blocks: whoever follows it holds what it holds, wherever they begin, drop out and come again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import aclosing

import pytest

from tests.models.kv_follower import KvFollower
from twinjet.engines import kv_journal
from twinjet.engines.base import KvBlockFacts, KvCleared, KvEvent, KvRemoved, KvStored
from twinjet.engines.kv_journal import KvBatch, KvJournal


def chain(name: str, length: int, *, salt: str = "", medium: str = "device") -> KvStored:
    hashes = [f"{name}{i}".encode() for i in range(length)]
    facts = KvBlockFacts(salt, "", medium)  # type: ignore[arg-type]
    return KvStored(hashes, b"", range(100, 100 + 4 * length), 4, facts)


async def take(journal: KvJournal, count: int, epoch: str = "", start: int = 0) -> list[KvBatch]:
    batches: list[KvBatch] = []
    async with asyncio.timeout(10), aclosing(journal.watch(epoch, start, 0.05)) as watch:
        async for batch in watch:
            batches.append(batch)
            if len(batches) == count:
                return batches
    return batches


async def test_a_watch_begins_with_a_snapshot_even_of_nothing() -> None:
    first, beat = await take(KvJournal(), 2)
    assert (first.kind, first.sequence, first.events) == ("snapshot_end", 0, [KvCleared()])
    assert (beat.kind, beat.sequence, beat.events) == ("heartbeat", 0, ())


async def test_a_snapshot_joins_what_belongs_together_and_comes_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_journal, "SNAPSHOT_BLOCKS", 3)
    journal = KvJournal()
    journal.put([chain("a", 4), chain("b", 2, salt="s")])
    journal.put([KvRemoved([b"a3"])])
    one, two = await take(journal, 2)
    assert [(b.kind, b.sequence) for b in (one, two)] == [("snapshot", 2), ("snapshot_end", 2)]
    a, b = chain("a", 3), chain("b", 2, salt="s")
    assert one.events == [KvCleared(), KvStored(list(a.block_hashes), b"", list(a.token_ids), 4, a.facts)]
    assert two.events == [KvStored(list(b.block_hashes), b"", list(b.token_ids), 4, b.facts)]


async def test_a_watch_goes_on_where_it_was() -> None:
    journal = KvJournal()
    for i in range(5):
        journal.put([chain(f"c{i}-", 1)])
    batches = await take(journal, 2, journal.epoch, 4)
    assert [(b.kind, b.sequence) for b in batches] == [("delta", 4), ("delta", 5)]
    (beat,) = await take(journal, 1, journal.epoch, 6)
    assert (beat.kind, beat.sequence) == ("heartbeat", 5)


@pytest.mark.parametrize(("epoch", "start"), [("another", 3), ("", 3), (None, 0), (None, 2), (None, 8)])
async def test_a_watch_that_cannot_go_on_begins_anew(epoch: str | None, start: int) -> None:
    journal = KvJournal(max_kept_blocks=3)
    for i in range(6):
        journal.put([chain(f"c{i}-", 1)])
    (batch,) = await take(journal, 1, journal.epoch if epoch is None else epoch, start)
    assert (batch.kind, batch.sequence) == ("snapshot_end", 6)


async def test_who_falls_behind_gets_a_snapshot_in_the_stream() -> None:
    journal = KvJournal(max_kept_blocks=2)
    async with aclosing(journal.watch()) as watch:
        follower = KvFollower()
        follower.take(await anext(watch))
        for i in range(9):
            journal.put([chain(f"c{i}-", 1)])
        batch = await anext(watch)
        assert (batch.kind, batch.sequence) == ("snapshot_end", 9)
        follower.take(batch)
        assert len(follower.blocks) == 9


async def test_closing_ends_every_watch() -> None:
    journal = KvJournal()
    watches = [asyncio.create_task(take(journal, 1000)) for _ in range(3)]
    await asyncio.sleep(0)
    journal.close()
    for watch in watches:
        assert {b.kind for b in await watch} <= {"snapshot_end", "heartbeat"}
    journal.put([chain("late", 1)])
    assert await take(journal, 1) == []


def random_events(rng: random.Random, held: set[bytes], counter: list[int]) -> list[KvEvent]:
    """Some events that could follow: new chains, moves, removals, now and then all."""
    events: list[KvEvent] = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.6 or not held:
            counter[0] += 1
            event = chain(f"n{counter[0]}-", rng.randint(1, 4), salt=rng.choice(["", "s"]))
            held.update(event.block_hashes)
            events.append(event)
        elif kind < 0.97:
            gone = rng.sample(sorted(held), min(len(held), rng.randint(1, 3)))
            held.difference_update(gone)
            events.append(KvRemoved(gone))
        else:
            held.clear()
            events.append(KvCleared())
    return events


@pytest.mark.parametrize("seed", range(12))
async def test_followers_that_drop_and_resume_at_random_hold_what_the_journal_holds(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(kv_journal, "SNAPSHOT_BLOCKS", rng.choice([1, 5, 1000]))
    journal = KvJournal(max_kept_blocks=rng.choice([1, 20, 100_000]))
    held: set[bytes] = set()
    states: dict[int, set[bytes]] = {0: set()}
    counter = [0]
    followers = [KvFollower() for _ in range(3)]
    watches = [journal.watch() for _ in followers]
    num_checked = 0
    for _ in range(150):
        for _ in range(rng.randint(0, 4)):
            journal.put(random_events(rng, held, counter))
            states[journal.sequence] = set(held)
        for i, follower in enumerate(followers):
            for _ in range(rng.randint(0, 6)):
                if follower.is_complete and follower.sequence == journal.sequence:
                    break
                follower.take(await anext(watches[i]), journal.epoch)
                if follower.is_complete:
                    assert set(follower.blocks) == states[follower.sequence]
                    num_checked += 1
            if rng.random() < 0.2:
                await watches[i].aclose()
                watches[i] = journal.watch(*follower.resume())
    for watch in watches:
        await watch.aclose()
    assert num_checked > 30


def test_told_again_is_moved() -> None:
    journal = KvJournal()
    journal.put([chain("a", 2)])
    journal.put([chain("a", 1, medium="host")])
    block = journal.stored(b"a0")
    assert block is not None and block.facts.medium == "host"
    assert len(journal) == 2


def test_nothing_is_no_delta() -> None:
    journal = KvJournal()
    empty: Sequence[KvEvent] = ()
    journal.put(empty)
    assert journal.sequence == 0
