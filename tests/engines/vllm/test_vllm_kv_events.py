"""vLLM's schedulers on the native block manager tell what their prefix cache holds, on every path."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the vllm extra is not installed")

from scheduler_harness import Engine, Prompt, Setup, make_native

from twinjet._core import BlockManager
from twinjet.engines.base import KvRemoved
from twinjet.engines.kv_journal import KvBatch, KvJournal
from twinjet.engines.vllm import kv_wire
from twinjet.engines.vllm.core.kv_events import KvEventSender, Tags
from twinjet.engines.vllm.front.kv_events import KvEventReceiver


@pytest.fixture
async def receiver() -> Any:
    made = KvEventReceiver()
    await made.listen()
    yield made
    made.close()


def native_engine(setup: Setup) -> Engine:
    scheduler = make_native(setup)
    return Engine(scheduler, setup, scheduler.native_hasher)


def prompts(rng: random.Random, max_loras: int) -> Iterator[Prompt]:
    for number in range(40):
        family = rng.choice("abc")
        length = rng.randint(1, 90)
        yield Prompt(
            request_id=f"{family}{number}#0",
            tokens=tuple(3 + (ord(family) * i) % 50 for i in range(length)),
            max_tokens=rng.randint(1, 40),
            ignore_eos=True,
            cache_salt=rng.choice([None, None, "one", "two"]),
            adapter=rng.randint(0, max_loras),
        )


async def until_told(receiver: KvEventReceiver, manager: Any) -> dict[bytes, Any]:
    """What the journal holds once the sender has sent everything."""
    held = {h for b in range(manager.num_blocks) if (h := manager.block_hash(b)) is not None}
    async with asyncio.timeout(30):
        while set(receiver.journal._blocks) != held:
            await asyncio.sleep(0.01)
    return receiver.journal._blocks


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("max_loras", [0, 2])
@pytest.mark.parametrize("native", ["on", "manager"])
async def test_the_journal_holds_what_the_cache_holds(
    receiver: KvEventReceiver, monkeypatch: pytest.MonkeyPatch, is_async: bool, max_loras: int, native: str
) -> None:
    monkeypatch.setenv(kv_wire.ADDRESS_ENV, receiver.address)
    setup = Setup(is_async=is_async, num_blocks=60, max_loras=max_loras, native=native)
    engine = native_engine(setup)
    scheduler = engine.scheduler
    manager, sender = scheduler.kv_cache_manager.manager, scheduler.kv_cache_manager.events
    rng = random.Random(7)
    requests: dict[str, Any] = {}
    waiting = list(prompts(rng, max_loras))
    for step in range(600):
        if waiting and rng.random() < 0.3:
            prompt = waiting.pop()
            engine.add(prompt, float(step))
            requests[prompt.request_id] = scheduler.requests[prompt.request_id]
        if rng.random() < 0.02 and scheduler.running:
            engine.abort([scheduler.running[0].request_id])
        engine.step()
        if step % 150 == 149:
            await _check(receiver, manager, requests, scheduler)
    if native == "on" and not max_loras:
        assert scheduler.decode_path.counters()["rows_scheduled"] > 100
    while scheduler.has_requests():
        engine.step()
    engine.step()
    await _check(receiver, manager, requests, scheduler)
    assert manager.reset()
    assert await until_told(receiver, manager) == {}
    assert not sender._tags._by_sequence
    await asyncio.to_thread(sender.stop)


async def _check(receiver: KvEventReceiver, manager: Any, requests: dict[str, Any], scheduler: Any) -> None:
    blocks = dict(await until_told(receiver, manager))
    if scheduler.decode_path is not None:
        scheduler.decode_path.evict(None)
    known: dict[bytes, tuple[bytes, tuple[int, ...], str, str]] = {}
    size = manager.block_size
    for request in requests.values():
        adapter = request.lora_request.lora_name if request.lora_request else ""
        for i, block_hash in enumerate(request.block_hashes):
            parent = request.block_hashes[i - 1] if i else b""
            tokens = tuple(request._all_token_ids[i * size : (i + 1) * size])
            known[block_hash] = (parent, tokens, request.cache_salt or "", adapter)
    for block_hash, block in blocks.items():
        facts = block.facts
        told = (block.parent_hash, tuple(block.token_ids), facts.salt, facts.adapter)
        assert told == known[block_hash]
        assert facts.medium == "device"


async def test_after_a_loss_only_what_was_told_is_taken_back(receiver: KvEventReceiver) -> None:
    manager = BlockManager(64, 4, max_events=3)
    tokens = list(range(40))
    hashes = manager.hasher.hash_blocks(tokens)
    sequence = manager.open()
    manager.reserve(sequence, 40, 40, hashes, None, 0, False, tokens)
    sender = KvEventSender(manager, receiver.address)
    async with asyncio.timeout(30):
        while receiver.journal.sequence < 1:
            await asyncio.sleep(0.01)
    assert set(receiver.journal._blocks) == set(hashes[7:])
    manager.evict([b for b in range(64) if manager.block_hash(b) in (hashes[0], hashes[8])])
    async with asyncio.timeout(30):
        while receiver.journal.sequence < 2:
            await asyncio.sleep(0.01)
    (delta,) = [batch async for batch in _first(receiver.journal, 2)]
    assert delta.events == [KvRemoved([hashes[8]])]
    await asyncio.to_thread(sender.stop)


async def _first(journal: KvJournal, sequence: int) -> AsyncIterator[KvBatch]:
    async with aclosing(journal.watch(journal.epoch, sequence)) as batches:
        yield await anext(batches)


async def test_nothing_is_logged_where_nobody_listens() -> None:
    engine = native_engine(Setup())
    engine.add(Prompt("a#0", tuple(range(3, 60)), 4), 0.0)
    engine.step()
    manager = engine.scheduler.kv_cache_manager
    assert manager.events is None
    assert manager.manager.num_cached_blocks > 0
    assert manager.manager.drain_events(100) == b""


def test_tags_are_told_before_they_are_used_and_taken_back_after() -> None:
    tags = Tags()
    one, two = tags.take(1, ("a", "")), tags.take(2, ("a", ""))
    assert one == two
    other = tags.take(3, ("b", ""))
    tags.give_back(1)
    tags.give_back(9)
    assert tags.unused() == []
    tags.give_back(2)
    assert tags.unused() == [], "it has not been told yet"
    assert tags.made() == {one: ("a", ""), other: ("b", "")}
    assert tags.unused() == [one]
    assert tags.take(4, ("a", "")) not in (one, other)
