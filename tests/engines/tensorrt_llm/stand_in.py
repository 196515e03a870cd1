"""The engine on the installed stand-in, and the stand-in's recorded behaviours, for tests to turn."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engines.factories import make_trt
from twinjet.engines.base import KvEvent


@contextlib.asynccontextmanager
async def started(options: dict[str, Any] | None = None, **kwargs: Any) -> AsyncIterator[Any]:
    """Start the engine and stop it again."""
    engine = make_trt(options, **kwargs)
    try:
        await engine.start(lambda _: None)
        yield engine
    finally:
        await engine.stop()


def core() -> Any:
    """The stand-in's inner module, for what no package would offer."""
    return importlib.import_module("tensorrt_llm._core")


def behave(patch: pytest.MonkeyPatch, **behaviours: bool) -> None:
    """Turn recorded behaviours on or off, before the engine is made."""
    known = importlib.import_module("tensorrt_llm._contract").BEHAVIOURS
    for name, value in behaviours.items():
        assert name in known
        patch.setitem(known, name, value)


class LoopLag:
    """Measures how long the event loop's thread waited inside a call although the process could run.

    What the loop's thread computed meanwhile is the stand-in's model, and what it waited for a processor is the
    machine's: neither counts. Nor does a pause in which a thread beside the loop, that ticks all the time, hardly did.
    longest_s, second_s: the two longest; one alone may still be the machine's.
    """

    _TICK_S = 0.002
    _TICKS_OF_A_LIVING_PROCESS = 0.25

    def __init__(self) -> None:
        self.longest_s = self.second_s = 0.0
        self._num_ticks = 0
        self._ended = threading.Event()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[LoopLag]:
        """Measure while the block runs."""
        thread = threading.Thread(target=self._tick, daemon=True)
        thread.start()
        task = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()
            task.cancel()

    def _tick(self) -> None:
        while not self._ended.wait(self._TICK_S):
            self._num_ticks += 1

    async def _watch(self) -> None:
        while True:
            began, excused, ticks = time.monotonic(), _ran_or_runnable_s(), self._num_ticks
            await asyncio.sleep(self._TICK_S)
            lag = time.monotonic() - began - self._TICK_S - (_ran_or_runnable_s() - excused)
            if self._num_ticks - ticks >= self._TICKS_OF_A_LIVING_PROCESS * lag / self._TICK_S:
                self.longest_s, self.second_s = sorted((lag, self.longest_s, self.second_s))[:0:-1]


def _ran_or_runnable_s() -> float:
    """Give the time that this thread has computed or waited for a processor."""
    computed_ns, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return (int(computed_ns) + int(waited_ns)) / 1e9


async def deltas(engine: Any) -> AsyncGenerator[Sequence[KvEvent], None]:
    """Give what the engine's KV cache stores and removes from here on."""
    journal = engine.kv_journal
    async with contextlib.aclosing(journal.watch(journal.epoch, journal.sequence + 1)) as batches:
        async for batch in batches:
            yield batch.events
