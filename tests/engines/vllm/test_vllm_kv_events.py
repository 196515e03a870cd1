"""vLLM's schedulers on the native block manager tell what their prefix cache holds, on every path."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the vllm extra is not installed")

import msgspec
from scheduler_harness import Engine, Prompt, Setup, make_native, scheduler_arguments, stock_hasher
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.core.sched.scheduler import Scheduler

from twinjet._core import BlockManager
from twinjet.engines.base import KvRemoved, KvStored
from twinjet.engines.kv_journal import KvBatch, KvCursor, KvJournal
from twinjet.engines.vllm import kv_wire
from twinjet.engines.vllm.core.kv_events import KvEventSender, Tags
from twinjet.engines.vllm.front.kv_events import KvEventReceiver
from twinjet.server.kv_zmq import Translator


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
    assert tags.made() == {one: ("a", ""), other: ("b", "")}
    tags.give_back(2)
    assert tags.drop(tags.unused()) == [one]
    assert tags.unused() == []
    assert tags.take(4, ("a", "")) not in (one, other)


def test_tags_that_no_event_ever_named_are_kept_nowhere() -> None:
    """Of requests too short for a block, each with a salt of its own."""
    tags = Tags()
    for sequence in range(5):
        tags.take(sequence, (f"salt {sequence}", ""))
        tags.give_back(sequence)
        assert tags.drop(tags.unused()) == []
    assert tags.made() == {}


async def test_short_requests_with_salts_of_their_own_leave_nothing(
    receiver: KvEventReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kv_wire.ADDRESS_ENV, receiver.address)
    engine = native_engine(Setup())
    for number in range(20):
        engine.add(Prompt(f"s{number}#0", (3, 4, 5), 2, cache_salt=f"salt {number}"), 0.0)
        while engine.scheduler.has_requests():
            engine.step()
    engine.step()
    sender = engine.scheduler.kv_cache_manager.events
    await asyncio.to_thread(sender.stop)
    tags = sender._tags
    assert not (tags._made or tags._unused or tags._numbers or tags._num_users or tags._by_sequence)


class Capture:
    """In the place of vLLM's publisher: what it would send."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def publish(self, batch: Any) -> None:
        self.batches.append(batch)

    def get_publisher_config(self) -> None:
        return None

    def shutdown(self) -> None:
        pass


def stock_engine(setup: Setup) -> tuple[Engine, Capture]:
    """vLLM's own scheduler and block manager, with its own KV events."""
    arguments = scheduler_arguments(setup)
    config = arguments["vllm_config"]
    config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    scheduler = Scheduler(**arguments)
    capture = scheduler.kv_event_publisher = Capture()
    return Engine(scheduler, setup, stock_hasher(setup.block_size)), capture


def follow(batches: list[Any]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """The blocks that vLLM's events tell of: each by the keys and tokens of its chain, with what was said of it."""
    chains: dict[Any, tuple[Any, ...]] = {}
    blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for batch in batches:
        assert type(batch) is KVEventBatch
        for event in batch.events:
            match event:
                case BlockStored():
                    chain = chains[event.parent_block_hash] if event.parent_block_hash is not None else ()
                    assert event.extra_keys is not None
                    assert len(event.extra_keys) == len(event.block_hashes)
                    for i, (block_hash, keys) in enumerate(
                        zip(event.block_hashes, event.extra_keys, strict=True)
                    ):
                        size = event.block_size
                        tokens = tuple(event.token_ids[i * size : (i + 1) * size])
                        chain = (*chain, (tuple(keys or ()), tokens))
                        chains[block_hash] = chain
                        blocks[chain] = (
                            size, event.medium, event.lora_name, event.group_idx, event.kv_cache_spec_kind,
                            event.kv_cache_spec_sliding_window, event.locality, event.ownership, event.session_id,
                        )  # fmt: skip
                case BlockRemoved():
                    assert (event.medium, event.group_idx) == ("GPU", 0)
                    for block_hash in event.block_hashes:
                        blocks.pop(chains[block_hash], None)
                case AllBlocksCleared():
                    blocks.clear()
    return blocks


@pytest.mark.parametrize("max_loras", [0, 2])
async def test_vllm_would_have_told_the_same(
    receiver: KvEventReceiver, monkeypatch: pytest.MonkeyPatch, max_loras: int
) -> None:
    """Ours in vLLM's format, read by vLLM's own classes, beside those of vLLM's block manager for the same requests."""
    monkeypatch.setenv(kv_wire.ADDRESS_ENV, receiver.address)
    setup = Setup(num_blocks=60, max_loras=max_loras)
    native = native_engine(setup)
    stock, capture = stock_engine(setup)
    translator = Translator("full_attention")
    batches: list[Any] = []
    cursor = KvCursor(receiver.journal)
    manager = native.scheduler.kv_cache_manager.manager
    decoder = msgspec.msgpack.Decoder(KVEventBatch)
    rng = random.Random(3)
    waiting = list(prompts(rng, max_loras))
    step = 0
    while waiting or stock.scheduler.has_requests() or native.scheduler.has_requests():
        step += 1
        if waiting and step % 8 == 0:
            prompt = waiting.pop()
            for engine in (native, stock):
                engine.add(prompt, float(step))
        native.step()
        stock.step()
        if step % 100 and (waiting or stock.scheduler.has_requests()):
            continue
        if native.scheduler.decode_path is not None:
            native.scheduler.decode_path.evict(None)
        await until_told(receiver, manager)
        while (batch := cursor.next()) is not None:
            batches.append(
                decoder.decode(msgspec.msgpack.encode(translator.batch(batch.time_s, batch.events)))
            )
        assert batches[-1].data_parallel_rank == 0
        assert follow(batches) == follow(capture.batches)
    assert sum(isinstance(e, BlockRemoved) for b in batches for e in b.events) > 10
    await asyncio.to_thread(native.scheduler.kv_cache_manager.events.stop)


def test_numbers_are_vllms() -> None:
    for block_hash in (bytes(range(32)), b"\xff" * 8, bytes(range(200, 216))):
        (told,) = Translator(None).batch(1.0, [KvStored((block_hash,), b"", (1,), 1)])[1]
        assert told["block_hashes"] == [maybe_convert_block_hash(block_hash)]
