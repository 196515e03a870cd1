"""Two fake engines on one simulated machine that drifts and jitters, as sides of a comparison."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator

from twinjet.compare import analysis, driver, workload
from twinjet.compare.plan import default_metric
from twinjet.compare.records import RunData, TokenChances
from twinjet.compare.statistics import Precision, Verdict
from twinjet.engines.base import OutputEvent
from twinjet.engines.fake import FakeEngine
from twinjet.request import EngineRequest, SamplingOverrides, resolve_sampling

STEP_S = 0.02
PREFILL_TOKEN_S = 0.0005


class Machine:
    """Its speed wanders (an Ornstein-Uhlenbeck process, time constant 20 s) and each step jitters.

    drift, jitter: standard deviations of the logarithm of a step's time.
    """

    def __init__(self, seed: int, drift: float = 0.1, jitter: float = 0.15) -> None:
        self._rng = random.Random(seed)
        self._drift, self._jitter = drift, jitter
        self._state = self._rng.gauss(0, drift)
        self._at = 0.0

    def slowness(self, now: float) -> float:
        """Factor on the time of a step that begins at now, seconds."""
        kept = math.exp(-(now - self._at) / 20)
        self._at = now
        self._state = self._state * kept + math.sqrt(1 - kept * kept) * self._rng.gauss(0, self._drift)
        return math.exp(self._state + self._rng.gauss(0, self._jitter))


class SimulatedEngine(FakeEngine):
    """A fake engine on a Machine. slower: 0.05 is 5% more time for every step."""

    def __init__(self, name: str, machine: Machine, slower: float = 0.0) -> None:
        super().__init__(name, {"step_s": STEP_S, "prefill_token_s": PREFILL_TOKEN_S})
        self._machine = machine
        self._slower = slower

    async def _pause(self, step_s: float) -> None:
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(step_s * (1 + self._slower) * self._machine.slowness(now))


class EngineTarget:
    """An engine without a server in front, as a side of a comparison."""

    def __init__(self, name: str, engine: FakeEngine) -> None:
        self.name = name
        self._engine = engine
        self._count = 0

    async def run(
        self, item: workload.WorkItem, sampling: SamplingOverrides, cache_salt: str
    ) -> AsyncGenerator[driver.Arrived, None]:
        self._count += 1
        assert not isinstance(item.prompt, str)
        request = EngineRequest(
            request_id=f"{self.name}-{self._count}",
            prompt_token_ids=item.prompt,
            sampling=resolve_sampling(
                sampling, self._engine.describe(), num_prompt_tokens=len(item.prompt), seed=1
            ),
            cache_salt=cache_salt,
        )
        async for event in self._engine.generate(request):
            if isinstance(event, OutputEvent):
                chances = [
                    TokenChances(t.chosen.logprob, tuple((r.token_id, r.logprob) for r in t.top))
                    for t in event.logprobs
                ]
                reason = "" if event.finish is None else event.finish.reason
                yield driver.Arrived(event.token_ids, reason, text=event.text, chances=chances)


async def compare_twins(
    seed: int,
    planted: float,
    *,
    load: workload.Load | None = None,
    precision: Precision | None = None,
    requests_per_leg: int = 16,
) -> RunData:
    """Run a comparison of two simulated engines, B slower by the planted share."""
    machine = Machine(seed)
    engines = SimulatedEngine("a", machine), SimulatedEngine("b", machine, planted)
    for engine in engines:
        await engine.start(lambda _: None)
    items = workload.synthetic(32, 16, 4096, vocab_size=256, seed=seed)
    load = load or workload.Load("closed", concurrency=4)
    running = driver.Driver(
        EngineTarget("a", engines[0]),
        EngineTarget("b", engines[1]),
        workload.Workload(items),
        load,
        requests_per_leg,
        precision or Precision(half_width=0.02),
        # Blocks are planned by what is judged.
        analysis.Settings(metric=default_metric(load)),
        seed=seed,
    )
    await running.run()
    for engine in engines:
        await engine.stop()
    return running.data


def verdict(seed: int, data: RunData, metric: analysis.Metric = "token_time") -> Verdict:
    """The verdict. CPU time is not judged: on a simulated clock it means nothing."""
    settings = analysis.Settings(metric=metric, max_cpu=math.inf)
    return analysis.judge(data, settings, seed=seed)


def outcome(seed: int, data: RunData, metric: analysis.Metric = "token_time") -> str:
    """The verdict's outcome."""
    return verdict(seed, data, metric).outcome
