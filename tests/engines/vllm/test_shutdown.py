"""A wanted end of the engine is no failure to vLLM's reader of its outputs."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

from twinjet._core import Vocabulary
from twinjet.engines.vllm.front.engine import VllmEngine
from twinjet.engines.vllm.front.startup import Running
from twinjet.engines.vllm.front.stock import StockLink
from twinjet.errors import EngineDied
from twinjet.models.token_texts import TokenTextsFile


class _Llm:
    """As AsyncLLM: a task reads what the engine sends, and the end of the engine is an error to it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sent: asyncio.Queue[Exception] = asyncio.Queue()
        self.output_handler = asyncio.create_task(self._read())

    async def _read(self) -> None:
        raise await self._sent.get()

    def shutdown(self, timeout: float) -> None:
        self._loop.call_soon_threadsafe(self._sent.put_nowait, RuntimeError("the engine is dead"))


async def test_the_reader_is_cancelled_before_the_engine_ends() -> None:
    llm = _Llm()
    await asyncio.sleep(0)
    nothing: Any = SimpleNamespace(processes=[], remove=lambda: None)
    texts = TokenTextsFile(Vocabulary("byte_level", ["a"], special=[]))
    running = Running(StockLink(llm, nothing, ()), nothing, nothing, nothing, nothing, nothing, texts, "")
    running.watch(asyncio.get_running_loop(), lambda _: None)
    await asyncio.to_thread(running.shutdown)
    await asyncio.wait([llm.output_handler])
    assert llm.output_handler.cancelled()


async def test_counters_that_were_asked_for_when_the_engine_ended_are_no_error() -> None:
    asked = asyncio.Event()

    class Components:
        def claim(self) -> bool:
            return not asked.is_set()

        async def refresh(self) -> None:
            asked.set()
            raise EngineDied("the engine was stopped")

    told: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context))
    engine = VllmEngine("m", "m", {}, native_sampler=False, native_block_manager=False)
    engine._refresh(SimpleNamespace(components=Components()))  # type: ignore[arg-type]
    await asked.wait()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    assert not engine._background
    assert told == []
