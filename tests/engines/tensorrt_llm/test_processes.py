"""Threads that hang, tasks that swallow a cancellation, workers that stay behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from twinjet.engines.tensorrt_llm.front.processes import (
    end_tasks,
    in_daemon_thread,
    kill_processes,
    worker_processes,
)


async def test_a_threads_value_and_error_come_back() -> None:
    assert await in_daemon_thread(lambda: 5, "test") == 5
    with pytest.raises(ZeroDivisionError):
        await in_daemon_thread(lambda: 1 // 0, "test")


async def test_a_hung_call_can_be_left_behind() -> None:
    release = threading.Event()
    future = in_daemon_thread(lambda: release.wait(10), "test")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(future, 0.01)
    release.set()


async def test_a_swallowed_cancellation_is_repeated() -> None:
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while swallowed < 3:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await end_tasks([task, None])
    assert task.done()
    assert swallowed == 3


def test_workers_are_known_by_their_command_lines_and_killed() -> None:
    code = "import sys; sys.stdin.read()"
    before = worker_processes()
    worker = subprocess.Popen([sys.executable, "-c", code, "mpi4py.futures.server"], stdin=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", code, "something else"], stdin=subprocess.PIPE)
    try:
        found = worker_processes() - before
        assert found == {worker.pid}
        assert kill_processes(found | {other.pid}) == 1, "only what is a worker"
        assert worker.wait(10) == -9
        assert other.poll() is None
        assert kill_processes(found) == 0
    finally:
        for process in (worker, other):
            process.kill()
            process.communicate()
