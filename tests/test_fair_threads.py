"""Jobs of known length on a few threads: callers share them, the short pass the long, and no thread is taken twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twinjet.fair_threads import FairThreads

LONG = 100


class Jobs:
    """Jobs that go on until they are let, and what was begun in which order."""

    def __init__(self, num_threads: int = 2) -> None:
        self.threads = FairThreads(LONG, num_threads)
        self.begun: list[str] = []
        self._gates: dict[str, threading.Event] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}

    async def start(self, name: str, size: int, caller: str = "a") -> None:
        gate = self._gates[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            assert gate.wait(30)
            return name

        self.tasks[name] = asyncio.create_task(self.threads.run(size, work, caller))
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
    threads = FairThreads(LONG, 2)

    def fail() -> None:
        raise ValueError("as it should")

    for _ in range(5):
        with pytest.raises(ValueError, match="as it should"):
            await threads.run(1000, fail, "a")


async def test_a_caller_that_brings_much_holds_up_nobody_else() -> None:
    jobs = Jobs()
    for i in range(40):
        await jobs.start(f"flood{i}", 90)
    await jobs.until(lambda: len(jobs.begun) == 2)
    await jobs.start("neighbour", 90, "b")
    await jobs.start("another", 10, "c")
    jobs.let_all()
    await asyncio.gather(*jobs.tasks.values())
    assert jobs.begun[:2] == ["flood0", "flood1"]
    assert set(jobs.begun[2:5]) >= {"neighbour", "another"}


async def test_a_caller_that_was_away_has_saved_nothing_up() -> None:
    jobs = Jobs()
    await jobs.start("b0", 10, "b")
    jobs.let("b0")
    await jobs.tasks["b0"]
    for i in range(8):
        await jobs.start(f"a{i}", 50)
    for i in range(8):
        await jobs.start(f"b{i + 1}", 50, "b")
    jobs.let_all()
    await asyncio.gather(*jobs.tasks.values())
    for end in range(5, 17):
        sides = [name[0] for name in jobs.begun[1:end]]
        # The first two of a were begun before any of b came.
        assert abs(sides.count("a") - sides.count("b")) <= 3


class Model:
    """The same order by looking at everything that waits; short jobs only, which are begun one at a time."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[tuple[int, int, int]]] = {}
        self.finish: dict[str, int] = {}
        self.begun: dict[str, int] = {}
        self.time = 0

    def add(self, caller: str, size: int, order: int) -> None:
        if not self.waiting.get(caller):
            self.finish[caller], self.begun[caller] = self.time, 0
        self.waiting.setdefault(caller, []).append((self.begun[caller] + size, order, size))

    def cancel(self, order: int) -> bool:
        before = sum(map(len, self.waiting.values()))
        for jobs in self.waiting.values():
            jobs[:] = [job for job in jobs if job[1] != order]
        return sum(map(len, self.waiting.values())) < before

    def begin(self) -> int:
        firsts = {caller: min(jobs) for caller, jobs in self.waiting.items() if jobs}
        tags = {caller: (self.finish[caller] + job[2], job[1]) for caller, job in firsts.items()}
        caller = min(tags, key=lambda one: tags[one])
        _, order, size = firsts[caller]
        self.waiting[caller].remove(firsts[caller])
        self.finish[caller] += size
        self.begun[caller] += size
        self.time = max(self.time, self.finish[caller])
        return order


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from("abcd"), st.integers(1, LONG)),
            st.just("end"),
            st.integers(0, 60),
        ),
        max_size=60,
    )
)
@example([("a", 60), ("a", 10), 1, "end"])
@settings(max_examples=100)
async def test_the_order_is_that_of_an_obvious_model(steps: list[tuple[str, int] | str | int]) -> None:
    jobs, model = Jobs(), Model()
    await jobs.start("kept", 1, "kept")
    await jobs.start("first", 1, "first")
    await jobs.until(lambda: len(jobs.begun) == 2)
    model.time = 1
    expected, num_waiting, running = ["kept", "first"], 0, "first"
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            await jobs.start(str(number), step[1], step[0])
            model.add(*step, number)
            num_waiting += 1
        elif isinstance(step, int):
            if model.cancel(step):
                jobs.tasks[str(step)].cancel()
                await asyncio.wait([jobs.tasks[str(step)]])
                num_waiting -= 1
        elif num_waiting:
            jobs.let(running)
            running = str(model.begin())
            expected.append(running)
            num_waiting -= 1
            await jobs.until(lambda: len(jobs.begun) == len(expected))
            assert jobs.begun == expected
    jobs.let_all()
    await asyncio.gather(*jobs.tasks.values(), return_exceptions=True)
