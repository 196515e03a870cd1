"""LiveRequest with collectors that behave as vLLM's do; no vLLM needed."""

import asyncio
from typing import Any

import pytest

from twinjet.engines.vllm.front.live import LiveRequest
from twinjet.errors import RequestAborted


class Collector:
    """Holds at most one output and signals it, like vLLM's RequestOutputCollector."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.output: Any = None
        self.ready = asyncio.Event()

    def put(self, output: Any) -> None:
        self.output = output
        self.ready.set()

    def get_nowait(self) -> Any:
        output, self.output = self.output, None
        if output is not None:
            self.ready.clear()
        return output


async def submitted(live: LiveRequest, index: int, collector: Collector) -> None:
    async def add() -> Collector:
        return collector

    await live.submit(index, asyncio.ensure_future(add()))


async def test_no_output_is_lost_whenever_it_comes() -> None:
    live, made = LiveRequest("r"), [Collector("a"), Collector("b")]
    made[0].put("early")
    for i, collector in enumerate(made):
        await submitted(live, i, collector)
    await asyncio.wait_for(live.wait(), 1)
    made[1].put("x")
    assert live.fetch(first_only=True) == [(0, "early")]
    await asyncio.wait_for(live.wait(), 1)
    assert live.fetch(first_only=False) == [(1, "x")]
    made[0].put("y")
    made[1].put("z")
    await asyncio.wait_for(live.wait(), 1)
    assert live.fetch(first_only=False) == [(0, "y"), (1, "z")]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(live.wait(), 0.01)


async def test_failure_comes_first() -> None:
    live, collector = LiveRequest("r"), Collector("a")
    await submitted(live, 0, collector)
    collector.put("x")
    live.fail(RequestAborted("a"))
    live.fail(RequestAborted("b"))
    with pytest.raises(RequestAborted, match="a"):
        await live.wait()


async def test_unfinished_ids_include_submissions_we_were_cancelled_in() -> None:
    live = LiveRequest("r")
    await submitted(live, 0, Collector("done"))
    await submitted(live, 1, Collector("open"))
    live.finish(0)
    assert live.is_open
    gate = asyncio.Event()

    async def slow() -> Collector:
        await gate.wait()
        return Collector("late")

    async def refused() -> Collector:
        raise ValueError("no")

    waiting = asyncio.create_task(live.submit(2, asyncio.ensure_future(slow())))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(ValueError, match="no"):
        await live.submit(3, asyncio.ensure_future(refused()))
    ids = asyncio.create_task(live.unfinished_ids())
    await asyncio.sleep(0)
    assert not ids.done()
    gate.set()
    assert await ids == ["open", "late"]
