"""Readers of the destructive iterators, and the watchdog."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from twinjet.engines.base import KvBlockFacts, KvCache, KvEvent, KvRemoved, KvStored
from twinjet.engines.tensorrt_llm.front import stats
from twinjet.engines.tensorrt_llm.front.health import Watchdog, own_verdict
from twinjet.engines.tensorrt_llm.front.stats import (
    DestructiveReader,
    EngineStats,
    KvEventFan,
    convert_kv_event,
)

ROW = {
    "numActiveRequests": 3,
    "numQueuedRequests": 2,
    "kvCacheStats": {"maxNumBlocks": 100, "usedNumBlocks": 40, "tokensPerBlock": 32},
    "inflightBatchingStats": {"numPausedRequests": 1},
}


def test_statistics_size_the_cache_and_count_pauses() -> None:
    stats = EngineStats()
    assert stats.load(in_flight=1).kv_blocks_total is None
    assert stats.load(in_flight=1).preemptions is None, "not known is not zero"
    stats.take(ROW)
    stats.take(ROW)
    assert stats.kv_cache == KvCache(100, 32)
    load = stats.load(in_flight=5)
    assert (load.running, load.waiting, load.kv_blocks_used, load.preemptions) == (3, 2, 40, 2)
    assert stats.load(in_flight=0).kv_blocks_used == 0, "an idle engine says nothing more"


@pytest.mark.parametrize(
    "row", [{}, {"kvCacheStats": None, "inflightBatchingStats": None}, {"kvCacheStats": {}}]
)
def test_missing_parts_keep_what_was_known(row: dict[str, Any]) -> None:
    stats = EngineStats()
    stats.take(ROW)
    stats.take(row)
    assert stats.kv_cache == KvCache(100, 32)


async def test_a_reader_opens_the_iterator_again_after_the_next_request() -> None:
    batches: list[list[dict[str, int]]] = [[{"n": 1}, {"n": 2}], [], [{"n": 3}], []]
    taken: list[int] = []
    opened = 0

    async def iterate() -> AsyncIterator[dict[str, int]]:
        nonlocal opened
        opened += 1
        for row in batches.pop(0) if batches else []:
            yield row

    reader = DestructiveReader("test", iterate, lambda row: taken.append(row["n"]), lambda: False, 0.5)
    reader.start()
    for want in ([1, 2], [1, 2, 3]):
        reader.poke()
        async with asyncio.timeout(5):
            while taken != want:
                await asyncio.sleep(0.001)
    async with asyncio.timeout(5):
        while opened < 4:
            await asyncio.sleep(0.001)
    assert not batches, "each time until nothing more came"
    await reader.stop()


async def test_a_reader_outlives_an_iterator_that_raises() -> None:
    taken: list[int] = []
    opened = 0

    async def rows() -> AsyncIterator[dict[str, int]]:
        yield {"n": 1}

    def iterate() -> AsyncIterator[dict[str, int]]:
        nonlocal opened
        opened += 1
        if opened == 1:
            raise AssertionError("no prompt has been submitted")
        return rows()

    reader = DestructiveReader("test", iterate, lambda row: taken.append(row["n"]), lambda: False, 0.5)
    reader.start()
    async with asyncio.timeout(5):
        while not taken:
            reader.poke()
            await asyncio.sleep(0.001)
    await reader.stop()


def stored(block_hash: int, parent: int | None) -> dict[str, Any]:
    tokens = [{"type": "unique_token", "token_id": t, "token_extra_id": 0} for t in (5, 6)]
    block = {
        "type": "stored_block",
        "block_hash": block_hash,
        "tokens": tokens,
        "cache_level": 0,
        "priority": 35,
    }
    return {"type": "stored", "parent_hash": parent, "blocks": [block]}


def test_kv_events_are_converted() -> None:
    one, other = b"\0" * 7 + b"\1", b"\xff" * 8
    on_device = KvBlockFacts(medium="device")
    assert convert_kv_event(stored(1, None)) == [KvStored([one], b"", [5, 6], 2, on_device)]
    assert convert_kv_event(stored(-1, 1)) == [KvStored([other], one, [5, 6], 2, on_device)]
    assert convert_kv_event({"type": "removed", "block_hashes": [2]}) == [KvRemoved([b"\0" * 7 + b"\2"])]
    assert convert_kv_event({"type": "created", "num_blocks_per_cache_level": [4]}) == []
    assert convert_kv_event({"type": "updated", "block_hash": 3, "cache_level": None, "priority": None}) == []


async def test_every_watcher_gets_every_event() -> None:
    fan = KvEventFan()
    seen: list[list[Sequence[KvEvent]]] = [[], []]

    async def read(into: list[Sequence[KvEvent]]) -> None:
        async for batch in fan.journal.watch(fan.journal.epoch, 1):
            into.append(batch.events)
            if len(into) == 2:
                return

    readers = [asyncio.create_task(read(into)) for into in seen]
    await asyncio.sleep(0)
    fan.take({"event_id": 0, "data": stored(1, None), "window_size": 1})
    fan.take({"event_id": 1, "data": stored(2, 1), "window_size": 1})
    async with asyncio.timeout(5):
        await asyncio.gather(*readers)
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]


def test_a_block_that_moves_to_another_level_is_told_again() -> None:
    fan = KvEventFan()
    fan.take({"data": stored(1, None)})
    for old, new, medium in ((0, 1, "host"), (1, 2, "disk"), (2, 0, "device")):
        level = {"old_value": old, "new_value": new}
        fan.take({"data": {"type": "updated", "block_hash": 1, "cache_level": level, "priority": None}})
        block = fan.journal.stored(b"\0" * 7 + b"\1")
        assert block is not None and block.facts.medium == medium
    assert fan.journal.sequence == 4
    fan.take(
        {"data": {"type": "updated", "block_hash": 9, "cache_level": {"new_value": 1}, "priority": None}}
    )
    assert fan.journal.sequence == 4, "nobody holds it"


def test_blocks_whose_removal_is_never_told_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "_MAX_BLOCKS", 3)
    fan = KvEventFan()
    for i in range(100):
        fan.take({"data": stored(i, None)})
        assert len(fan._holders) <= 4


class Bench:
    """A watchdog with a clock, a probe and a death that the test holds in its hand."""

    def __init__(self, **changes: Any) -> None:
        self.now = 0.0
        self.in_flight = 0
        self.deaths: list[str] = []
        self.probe_error: Exception | None = None
        self.never = asyncio.Event()
        self.hangs = False
        self.reason: str | None = None
        self.watchdog = Watchdog(
            **(
                {
                    "probe": self.probe,
                    "verdict": lambda: self.reason,
                    "in_flight": lambda: self.in_flight,
                    "on_death": self.deaths.append,
                    "no_progress_s": 30.0,
                    "idle_probe_s": 60.0,
                    "probe_timeout_s": 0.05,
                    "clock": lambda: self.now,
                }
                | changes
            )
        )

    async def probe(self) -> None:
        if self.hangs:
            await self.never.wait()
        if self.probe_error is not None:
            raise self.probe_error


async def test_probes_after_silence_while_requests_run() -> None:
    bench = Bench()
    bench.in_flight = 1
    bench.now = 29.0
    await bench.watchdog.look()
    assert bench.watchdog.num_probes == 0
    bench.now = 30.0
    await bench.watchdog.look()
    assert bench.watchdog.num_probes == 1
    assert bench.deaths == []
    await bench.watchdog.look()
    assert bench.watchdog.num_probes == 1, "the answer counts as progress"


async def test_an_idle_engine_is_probed_less_often() -> None:
    bench = Bench()
    bench.now = 59.0
    await bench.watchdog.look()
    assert bench.watchdog.num_probes == 0
    bench.now = 61.0
    await bench.watchdog.look()
    assert bench.watchdog.num_probes == 1


async def test_a_probe_without_an_answer_is_a_death() -> None:
    bench = Bench()
    bench.hangs, bench.in_flight, bench.now = True, 1, 31.0
    await bench.watchdog.look()
    assert bench.deaths == ["no token within 0.05 s"]
    await bench.watchdog.check()
    assert len(bench.deaths) == 1, "one death is enough"


async def test_progress_of_others_answers_a_slow_probe() -> None:
    bench = Bench()
    bench.hangs, bench.in_flight, bench.now = True, 1, 31.0
    checking = asyncio.create_task(bench.watchdog.check())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    bench.watchdog.progressed()
    assert await checking is None
    assert bench.deaths == []


async def test_one_probe_is_shared() -> None:
    bench = Bench()
    bench.hangs = True
    checks = [asyncio.create_task(bench.watchdog.check()) for _ in range(5)]
    await asyncio.gather(*checks)
    assert bench.watchdog.num_probes == 1


async def test_a_failing_probe_and_a_bad_verdict_are_deaths() -> None:
    bench = Bench()
    bench.probe_error = RuntimeError("boom")
    assert await bench.watchdog.check() == "a probe failed: boom"
    bench = Bench()
    bench.reason = "workers are gone"
    await bench.watchdog.look()
    assert bench.deaths == ["workers are gone"]


def test_the_packages_own_signs_are_read() -> None:
    class Executor:
        _fatal_error: Exception | None = None
        down = False

        def is_shutdown(self) -> bool:
            return self.down

    class Llm:
        _executor = Executor()

    assert own_verdict(Llm()) is None
    Llm._executor.down = True
    assert "shut down" in str(own_verdict(Llm()))
    Llm._executor._fatal_error = ValueError("bad")
    assert "bad" in str(own_verdict(Llm()))
    assert own_verdict(object()) is None, "a version without any sign"
