"""Writes to a reader that stops: interrupted by whoever asks, and by the watch over all writers."""

from __future__ import annotations

import asyncio

import pytest

from twinjet.errors import SlowReader
from twinjet.server.stream import StreamWriter, WriterWatch


async def _block(_: object) -> None:
    await asyncio.Event().wait()


async def test_a_blocked_write_can_be_interrupted() -> None:
    blocked = asyncio.Event()

    async def write(_: object) -> None:
        blocked.set()
        await asyncio.Event().wait()

    writer = StreamWriter(write)
    task = asyncio.create_task(writer.write(b"x"))
    await blocked.wait()
    writer.interrupt(SlowReader("enough"))
    with pytest.raises(SlowReader, match="enough"):
        await task
    with pytest.raises(SlowReader, match="enough"):
        await writer.write(b"y")


async def test_a_cancelled_write_stays_cancelled() -> None:
    writer = StreamWriter(_block)
    task = asyncio.create_task(writer.write(b"x"))
    await asyncio.sleep(0)
    writer.interrupt(SlowReader("enough"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_one_watch_ends_blocked_writes_and_no_others() -> None:
    watch = WriterWatch(0.2)
    blocked, idle = StreamWriter(_block), StreamWriter(_block)
    watch.add(blocked)
    watch.add(idle)
    began = asyncio.get_running_loop().time()
    with pytest.raises(SlowReader, match=r"nothing for 0\.2 s"):
        await asyncio.wait_for(blocked.write(b"x"), 5)
    assert asyncio.get_running_loop().time() - began >= 0.2
    watch.discard(blocked)
    task = asyncio.create_task(idle.write(b"x"))
    watch.discard(idle)
    await asyncio.sleep(0.4)
    assert not task.done(), "one that is no longer watched"
    task.cancel()
