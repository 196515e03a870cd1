"""Runs a comparison: A against itself, then A against B, in blocks of A B B A, all in one process.

Times are taken from the event loop's clock. In an open loop every latency counts from the intended start, so a slow
answer cannot thin out the load that would have shown it (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from twinjet.compare.analysis import Settings, block_totals
from twinjet.compare.records import Arm, Journal, LegFacts, Phase, Record, RunData
from twinjet.compare.statistics import Precision
from twinjet.compare.workload import Load, WorkItem, Workload
from twinjet.request import SamplingOverrides

LEGS: tuple[Arm, ...] = ("a", "b", "b", "a")


@dataclass(frozen=True, slots=True)
class Arrived:
    """What one message brought: new tokens, or the end of the output."""

    token_ids: Sequence[int] = ()
    reason: str = ""
    deployment: str = ""


class Target(Protocol):
    """One side of a comparison: takes a request and streams what arrives."""

    name: str

    def run(
        self, item: WorkItem, sampling: SamplingOverrides, cache_salt: str
    ) -> AsyncGenerator[Arrived, None]:
        """Send one request. Any exception but cancellation counts as the request's failure."""
        ...


@dataclass(slots=True)
class Progress:
    """How far a run is: blocks done of those planned in this phase (0: not planned yet)."""

    phase: Phase
    block: int
    num_blocks: int


@dataclass(slots=True)
class Driver:
    """Runs blocks and keeps what they gave in data and journal. requests_per_leg: at least 1.

    Blocks that data already holds (resumed) are not run again.
    """

    a: Target
    b: Target
    workload: Workload
    load: Load
    requests_per_leg: int
    precision: Precision
    settings: Settings = field(default_factory=Settings)
    journal: Journal = field(default_factory=lambda: Journal(None))
    data: RunData = field(default_factory=RunData)
    report: Callable[[Progress], None] = lambda _: None
    salt: str = "compare"
    seed: int = 0

    async def run(self) -> None:
        """Run the self-test, fix the number of blocks by it, and run them. What is done is in data."""
        await self.warm_up()
        await self.run_phase("self", self.precision.min_blocks)
        planned = self.precision.num_blocks(block_totals(self.data, "self", self.settings))
        await self.run_phase("main", planned)

    async def warm_up(self) -> None:
        """Send one leg's requests to each side and forget them: a first use is slower than any later one."""
        for target in (self.a, self.b):
            items = self.workload.items[-self.requests_per_leg :]
            await run_leg(target, items, self.workload, self.load, f"{self.salt}-warm-up", self.seed)

    async def run_phase(self, phase: Phase, num_blocks: int, rate: float = 0.0) -> None:
        """Run the blocks of one phase that are missing."""
        done = set(self.data.complete_blocks(phase, rate))
        for block in range(num_blocks):
            if block not in done:
                self.report(Progress(phase, block, num_blocks))
                await self._block(phase, block, rate)

    async def _block(self, phase: Phase, block: int, rate: float) -> None:
        load = self.load if not rate else Load("poisson", rate=rate)
        for leg, arm in enumerate(LEGS):
            # The first two legs send the same requests, the last two the next ones.
            first = (2 * block + leg // 2) * self.requests_per_leg
            items = [
                self.workload.items[(first + i) % len(self.workload.items)]
                for i in range(self.requests_per_leg)
            ]
            target = self.a if arm == "a" or phase == "self" else self.b
            # Each arm has prefixes of its own in the cache, so that A's second twin finds none of the first's.
            salt = f"{self.salt}-{phase}-{arm}-{first // len(self.workload.items)}"
            seed = zlib.crc32(f"{self.seed} {phase} {block} {leg // 2} {rate}".encode())
            began, cpu = asyncio.get_running_loop().time(), time.process_time()
            records = await run_leg(target, items, self.workload, load, salt, seed)
            facts = LegFacts(
                phase, block, leg, arm,
                asyncio.get_running_loop().time() - began, time.process_time() - cpu, rate,
            )  # fmt: skip
            records = [_placed(record, facts) for record in records]
            self.journal.leg(facts, records)
            self.data.legs.append(facts)
            self.data.records.extend(records)


async def run_leg(
    target: Target, items: Sequence[WorkItem], workload: Workload, load: Load, salt: str, seed: int
) -> list[Record]:
    """Send these requests to one target as load says and wait for all of them; records in order of items."""
    loop = asyncio.get_running_loop()

    async def one(item: WorkItem, intended_at: float) -> Record:
        sent_at = loop.time()
        times: list[float] = []
        ids: list[int] = []
        reason = deployment = error = ""
        try:
            async with aclosing(target.run(item, workload.sampling_of(item), salt)) as events:
                async for arrived in events:
                    now = loop.time()
                    times.extend([now] * len(arrived.token_ids))
                    ids.extend(arrived.token_ids)
                    reason = arrived.reason or reason
                    deployment = arrived.deployment or deployment
        except Exception as failure:  # noqa: BLE001 - the measured thing's failures are data
            error = f"{type(failure).__name__}: {failure}"
        return Record(
            "main", 0, 0, "a", item.index, intended_at, sent_at, loop.time(),
            tuple(times), tuple(ids), reason, deployment, error,
        )  # fmt: skip

    if not load.is_open:
        return await _closed(one, items, load.concurrency)
    begin = loop.time()
    tasks: list[asyncio.Task[Record]] = []
    async with asyncio.TaskGroup() as group:
        for item, offset in zip(items, load.arrivals(len(items), seed=seed), strict=True):
            if (wait_s := begin + offset - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(one(item, begin + offset)))
    return [task.result() for task in tasks]


async def _closed(
    one: Callable[[WorkItem, float], Awaitable[Record]], items: Sequence[WorkItem], concurrency: int
) -> list[Record]:
    loop = asyncio.get_running_loop()
    records: dict[int, Record] = {}
    waiting = iter(enumerate(items))

    async def worker() -> None:
        for position, item in waiting:
            records[position] = await one(item, loop.time())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(worker())
    return [records[i] for i in range(len(items))]


def _placed(record: Record, facts: LegFacts) -> Record:
    values = {name: getattr(record, name) for name in Record.__slots__}
    return Record(
        **values
        | {"phase": facts.phase, "block": facts.block, "leg": facts.leg, "arm": facts.arm, "rate": facts.rate}
    )
