"""Jobs of known length on a few threads: the short pass the long, the long come too, and no thread is taken twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from twinjet.shortest_first import ShortestFirst

LONG = 100


class Jobs:
    """Jobs that go on until they are let, and what was begun in which order."""

    def __init__(self, num_threads: int = 2) -> None:
        self.threads = ShortestFirst(LONG, num_threads)
        self.begun: list[str] = []
        self._gates: dict[str, threading.Event] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}

    async def start(self, name: str, size: int) -> None:
        gate = self._gates[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            assert gate.wait(30)
            return name

        self.tasks[name] = asyncio.create_task(self.threads.run(size, work))
        await asyncio.sleep(0)

    def let(self, name: str) -> None:
        self._gates[name].set()

    def let_all(self) -> None:
        for gate in self._gates.values():
            gate.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)


async def test_a_short_job_passes_the_long_ones_that_wait() -> None:
    jobs = Jobs()
    for i in range(4):
        await jobs.start(f"long{i}", 1000)
    await jobs.until(lambda: jobs.begun == ["long0"])  # the other thread is left to short ones
    await jobs.start("short", 10)
    await jobs.until(lambda: jobs.begun == ["long0", "short"])
    jobs.let_all()
    assert [await task for task in jobs.tasks.values()] == list(jobs.tasks)


async def test_short_jobs_do_not_pass_a_longer_one_for_ever() -> None:
    jobs = Jobs()
    await jobs.start("kept", 10)
    await jobs.start("short0", 10)
    await jobs.until(lambda: len(jobs.begun) == 2)
    await jobs.start("longer", 90)
    num_shorts = 1
    while "longer" not in jobs.begun:
        # One more short job always waits when a thread becomes free.
        await jobs.start(f"short{num_shorts}", 10)
        num_begun = len(jobs.begun)
        jobs.let(jobs.begun[-1])
        await jobs.until(lambda num=num_begun: len(jobs.begun) > num)
        num_shorts += 1
        assert num_shorts < 20, "more work went first than the longer job is itself"
    assert num_shorts > 5, "shorter ones go first"
    jobs.let_all()
    await asyncio.gather(*jobs.tasks.values())


@pytest.mark.parametrize("is_running", [True, False])
async def test_a_job_that_nobody_waits_for_keeps_its_thread_until_it_ends(is_running: bool) -> None:
    jobs = Jobs()
    await jobs.start("a", 10)
    await jobs.start("b", 10)
    await jobs.until(lambda: len(jobs.begun) == 2)
    if is_running:
        jobs.tasks["a"].cancel()
        await asyncio.wait([jobs.tasks["a"]])
    await jobs.start("c", 10)
    if not is_running:
        jobs.tasks["c"].cancel()
        await asyncio.wait([jobs.tasks["c"]])
    await jobs.start("d", 10)
    await asyncio.sleep(0)
    assert jobs.begun == ["a", "b"], "both threads are taken"
    jobs.let_all()
    await jobs.tasks["d"]
    assert ("c" in jobs.begun) is is_running
    await asyncio.gather(*jobs.tasks.values(), return_exceptions=True)


async def test_what_a_job_raises_is_raised_and_the_thread_is_free_again() -> None:
    threads = ShortestFirst(LONG, 2)

    def fail() -> None:
        raise ValueError("as it should")

    for _ in range(5):
        with pytest.raises(ValueError, match="as it should"):
            await threads.run(1000, fail)
