"""Runs a comparison in one process: do both say the same, A against itself, A against B in blocks of A B B A.

Times are taken from the event loop's clock. In an open loop every latency counts from the intended start, so a slow
answer cannot thin out the load that would have shown it (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from twinjet.compare.analysis import Settings, block_totals
from twinjet.compare.recorded import RecordedSide
from twinjet.compare.records import Arm, Journal, LegFacts, Phase, Record, RunData, TokenChances
from twinjet.compare.statistics import Precision
from twinjet.compare.workload import Load, WorkItem, Workload
from twinjet.request import SamplingOverrides

LEGS: tuple[Arm, ...] = ("a", "b", "b", "a")


@dataclass(frozen=True, slots=True)
class Arrived:
    """What one message brought: new tokens with their text and chances, or the end of the output."""

    token_ids: Sequence[int] = ()
    reason: str = ""
    deployment: str = ""
    text: str = ""
    chances: Sequence[TokenChances] = ()
    num_prompt_tokens: int = 0


class Target(Protocol):
    """One side of a comparison: takes a request and streams what arrives."""

    name: str

    def run(
        self, item: WorkItem, sampling: SamplingOverrides, cache_salt: str
    ) -> AsyncGenerator[Arrived, None]:
        """Send one request. Any exception but cancellation counts as the request's failure."""
        ...


Watch = Callable[[WorkItem, Arrived], None]
"""Gets what arrives for a request, as it does. Called while times are taken: it must be quick."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a phase is: legs done of those planned. left_s: about what is left of it, None before that is known."""

    phase: Phase
    block: int
    num_blocks: int
    leg: int = 0
    left_s: float | None = None
    rate: float = 0.0

    @property
    def done(self) -> float:
        """Share of the phase, 0 to 1."""
        return (self.block + self.leg / len(LEGS)) / self.num_blocks


@dataclass(frozen=True, slots=True)
class _Leg:
    """What one leg sends, where it stands and how. keep: the answers' texts and chances too."""

    phase: Phase
    block: int
    leg: int
    items: Sequence[WorkItem]
    workload: Workload
    load: Load
    salt: str
    rate: float = 0.0
    keep: bool = False


@dataclass(slots=True)
class Driver:
    """Runs blocks and keeps what they gave in data and journal. requests_per_leg: at least 1.

    Blocks that data already holds (resumed) are not run again. num_same: requests whose answers are compared, 0 for none;
    num_logprobs: rivals a token to ask for then, None for no logprobs. watch: gets the first answer of each leg as it
    comes. recorded: takes the place of b, which may then be any target.
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
    num_same: int = 0
    num_logprobs: int | None = None
    watch: Callable[[Arm, WorkItem, Arrived], None] | None = None
    recorded: RecordedSide | None = None

    async def run(self) -> None:
        """Compare answers, run the self-test, fix the number of blocks by it, run them. What is done is in data."""
        await self.warm_up()
        await self.run_sameness()
        await self.run_phase("self", self.precision.min_blocks)
        planned = self.precision.num_blocks(block_totals(self.data, "self", self.settings))
        if self.recorded is not None:
            planned = min(planned, self.recorded.num_blocks("main"))
        await self.run_phase("main", planned)

    async def warm_up(self) -> None:
        """Send one leg's requests to each side and forget them: a first use is slower than any later one."""
        for target in (self.a, self.b) if self.recorded is None else (self.a,):
            items = self.workload.items[-self.requests_per_leg :]
            await run_leg(target, items, self.workload, self.load, f"{self.salt}-warm-up", self.seed)

    async def run_sameness(self) -> None:
        """Have both sides answer the same requests twice to their natural end, both at a time: no times are judged.

        The second answers tell by how much a side differs from itself.
        """
        if not self.num_same or self.data.complete_blocks("sameness"):
            return
        sampling = replace(self.workload.sampling, logprobs=self.num_logprobs)
        workload = replace(self.workload, fixed_length=False, sampling=sampling)
        items = [workload.items[i % len(workload.items)] for i in range(self.num_same)]
        load = Load("closed") if self.load.is_open else self.load
        for first in (0, 2):
            self.report(Progress("sameness", 0, 1, first))
            async with asyncio.TaskGroup() as group:
                for leg in (first, first + 1):
                    salt = f"{self.salt}-sameness-{leg}"
                    group.create_task(
                        self._leg(_Leg("sameness", 0, leg, items, workload, load, salt, keep=True))
                    )

    async def run_phase(self, phase: Phase, num_blocks: int, rate: float = 0.0) -> None:
        """Run the blocks of one phase that are missing."""
        done = set(self.data.complete_blocks(phase, rate))
        missing = [block for block in range(num_blocks) if block not in done]
        load = self.load if not rate else Load("poisson", rate=rate)
        clock = asyncio.get_running_loop().time
        began = clock()
        for count, block in enumerate(missing):
            for leg, arm in enumerate(LEGS):
                num_done = len(LEGS) * count + leg
                left = len(LEGS) * len(missing) - num_done
                left_s = (clock() - began) / num_done * left if num_done else None
                self.report(Progress(phase, block, num_blocks, leg, left_s, rate))
                # The first two legs send the same requests, the last two the next ones.
                first = (2 * block + leg // 2) * self.requests_per_leg
                size = len(self.workload.items)
                items = [self.workload.items[(first + i) % size] for i in range(self.requests_per_leg)]
                # Each arm has prefixes of its own in the cache, so that A's second twin finds none of the first's.
                salt = f"{self.salt}-{phase}-{arm}-{first // size}"
                await self._leg(_Leg(phase, block, leg, items, self.workload, load, salt, rate))

    async def _leg(self, leg: _Leg) -> None:
        arm = LEGS[leg.leg]
        if arm == "b" and leg.phase != "self" and self.recorded is not None:
            found = self.recorded.legs.get((leg.phase, leg.block, leg.leg, leg.rate))
            if found is not None:
                self._keep(*found)
            return
        target = self.a if arm == "a" or leg.phase == "self" else self.b
        seed = zlib.crc32(f"{self.seed} {leg.phase} {leg.block} {leg.leg // 2} {leg.rate}".encode())
        began, cpu = asyncio.get_running_loop().time(), time.process_time()
        records = await run_leg(
            target,
            leg.items,
            leg.workload,
            leg.load,
            leg.salt,
            seed,
            keep=leg.keep,
            watch=self._watch_of(arm),
        )
        seconds, cpu_s = asyncio.get_running_loop().time() - began, time.process_time() - cpu
        facts = LegFacts(leg.phase, leg.block, leg.leg, arm, seconds, cpu_s, leg.rate)
        self._keep(facts, [_placed(record, facts) for record in records])

    def _watch_of(self, arm: Arm) -> Watch | None:
        if (watch := self.watch) is None:
            return None
        return lambda item, arrived: watch(arm, item, arrived)

    def _keep(self, facts: LegFacts, records: Sequence[Record]) -> None:
        self.journal.leg(facts, records)
        self.data.legs.append(facts)
        self.data.records.extend(records)


async def run_leg(
    target: Target,
    items: Sequence[WorkItem],
    workload: Workload,
    load: Load,
    salt: str,
    seed: int,
    *,
    keep: bool = False,
    watch: Watch | None = None,
) -> list[Record]:
    """Send these requests to one target as load says and wait for all of them; records in order of items.

    keep: texts and chances too. watch: gets what arrives for the first item.
    """
    loop = asyncio.get_running_loop()

    async def one(item: WorkItem, intended_at: float) -> Record:
        sent_at = loop.time()
        times: list[float] = []
        ids: list[int] = []
        reason = deployment = error = ""
        texts: list[str] = []
        chances: list[TokenChances] = []
        shown = watch if item is items[0] else None
        num_prompt_tokens = 0
        try:
            async with aclosing(target.run(item, workload.sampling_of(item), salt)) as events:
                async for arrived in events:
                    now = loop.time()
                    times.extend([now] * len(arrived.token_ids))
                    ids.extend(arrived.token_ids)
                    reason = arrived.reason or reason
                    deployment = arrived.deployment or deployment
                    num_prompt_tokens = arrived.num_prompt_tokens or num_prompt_tokens
                    if keep:
                        texts.append(arrived.text)
                        chances.extend(arrived.chances)
                    if shown is not None:
                        shown(item, arrived)
        except Exception as failure:  # noqa: BLE001 - the measured thing's failures are data
            error = f"{type(failure).__name__}: {failure}"
        return Record(
            "main", 0, 0, "a", item.index, intended_at, sent_at, loop.time(),
            tuple(times), tuple(ids), reason, deployment, error, 0.0, "".join(texts), tuple(chances),
            num_prompt_tokens,
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
