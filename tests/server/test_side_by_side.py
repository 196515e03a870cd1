"""Two engines behind one name: the split, weights changed under load, one of them killed, and what both say.

With the fake engine beside the TensorRT-LLM stand-in; (engine) with the real vLLM and the small real model beside it; and with
that model twice on vLLM, with Twinjet's sampler and block manager and without them.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines.factories import DOUBLES, MODEL
from tests.server.processes import descendants, server
from twinjet.client import AsyncClient, Completion, Options, RetryPolicy, Route, Sampling, Unavailable

FAKE = '[deployments.first]\nengine = "fake"\noptions = { output = "logits" }\n'
VLLM = '[deployments.first]\nengine = "vllm"\nmodel = "demo"\n'
STAND_IN = f"""
[deployments.second]
engine = "tensorrt_llm"
model = "{MODEL}"
options = {{ max_seq_len = 2048 }}
"""
STOCK = """
[deployments.second]
engine = "vllm"
model = "demo"
native_sampler = false
native_block_manager = false
"""
PAIRS = {"fake": FAKE + STAND_IN, "vllm": VLLM + STAND_IN, "native_and_stock": VLLM + STOCK}
REST = """
[deployments.copies]
engine = "fake"
[routes.both]
weights = { first = 70, second = 30 }
mirror = "copies"
mirror_share = 0.1
[routes.first]
weights = { first = 1 }
[routes.second]
weights = { second = 1 }
[routes.copies]
weights = { copies = 1 }
[mirror]
folder = "FOLDER"
max_streams = 1000
"""
NUM_AT_ONCE = 50
NUM_ASKED = {"fake": 150, "vllm": 500, "native_and_stock": 150}
"""Requests whose split is counted. Two real engines on the same two cores are slow."""


@dataclass
class Twins:
    """The server, and a client of it that never tries again."""

    client: AsyncClient
    pid: int
    records: Path
    is_real: bool
    num_asked: int

    async def ask(self, number: int, max_tokens: int = 2, model: str = "both", **options: Any) -> Completion:
        sampling = Sampling(max_tokens=max_tokens, ignore_eos=True, seed=number)
        return await self.client.generate(
            f"Question {number}", sampling, model=model, options=Options(**options)
        ).completion()

    def num_copies(self) -> int:
        """Copies whose answers have been recorded."""
        return sum(len(file.read_text().splitlines()) for file in self.records.glob("*.jsonl"))

    async def served_by(self, count: int) -> Counter[str]:
        """Ask that many times; a request that fails fails the test."""
        gate = asyncio.Semaphore(NUM_AT_ONCE)

        async def one(number: int) -> str:
            async with gate:
                return (await self.ask(number)).started.deployment

        return Counter(await asyncio.gather(*(one(number) for number in range(count))))


def _engines(name: str) -> Any:
    marks = [] if name == "fake" else [pytest.mark.engine, pytest.mark.timeout(600)]
    return pytest.param(name, marks=marks, id=name)


@pytest.fixture(params=[_engines(name) for name in PAIRS])
async def twins(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Twins]:
    is_real = request.param != "fake"
    if is_real:
        request.getfixturevalue("demo_model_path")
    path = [str(DOUBLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(path), "TENSORRT_LLM_DOUBLE": "1.3"}
    records = tmp_path / "records"
    settings = PAIRS[request.param] + REST.replace("FOLDER", str(records))
    with server(tmp_path, settings, environment=environment) as (process, address):
        async with AsyncClient(address, retry=RetryPolicy(attempts=1)) as client:
            for name in ("first", "second", "copies"):
                await _until_ready(client, name)
            yield Twins(client, process.pid, records, is_real, NUM_ASKED[request.param])


async def _until_ready(client: AsyncClient, name: str) -> None:
    async with asyncio.timeout(240):
        while (await client.get_model(name)).state != "ready":
            await asyncio.sleep(0.1)


async def test_side_by_side(twins: Twins) -> None:
    if not twins.is_real:
        await _check_equal(twins)
    count = twins.num_asked
    served = await twins.served_by(count)
    expected = 0.7 * count
    # Drawn anew each time: one run in 400 would leave three standard errors.
    assert abs(served["first"] - expected) <= 4 * (expected * 0.3) ** 0.5
    margin = 4 * (0.1 * count * 0.9) ** 0.5
    async with asyncio.timeout(60):
        while twins.num_copies() < 0.1 * count - margin:
            await asyncio.sleep(0.05)

    assert twins.num_copies() <= 0.1 * count + margin

    # Weights changed under load: what runs goes on where it is, and nothing is dropped.
    running = [asyncio.create_task(twins.ask(number, max_tokens=40)) for number in range(40)]
    await asyncio.sleep(0)
    await twins.client.set_route(Route("both", weights={"second": 1.0}))
    assert await twins.served_by(20) == {"second": 20}
    for answer in await asyncio.gather(*running):
        assert answer.summary.usage.output_tokens == 40

    # One killed: later requests go to the other.
    dead = await _kill_one(twins)
    other = "second" if dead == "first" else "first"
    await twins.client.set_route(Route("both", weights={dead: 1.0}, fallback=(other,)))
    served = await twins.served_by(20)
    assert served.total() == 20
    # An engine that is started again in half a second may have had the last of them.
    assert served[other] == 20 if twins.is_real else served[other] > 0


async def _kill_one(twins: Twins) -> str:
    """Kill an engine; gives its deployment once the server knows."""
    if not twins.is_real:
        with pytest.raises(Unavailable):
            await twins.client.generate("!die:2", Sampling(max_tokens=8), model="first").completion()
        return "first"
    below = descendants(twins.pid)
    # Engines are forked from the forkserver.
    os.kill(next(pid for pid, parent in below.items() if parent in below), signal.SIGKILL)
    async with asyncio.timeout(10):
        while True:
            for name in ("first", "second"):
                if (await twins.client.get_model(name)).state != "ready":
                    return name
            await asyncio.sleep(0.02)


async def _check_equal(twins: Twins) -> None:
    """The same seeded requests through both, whose logits are equal: every token and log probability is."""
    answers = [
        await asyncio.gather(*(twins.ask(number, max_tokens=24, model=model) for number in range(40)))
        for model in ("first", "second")
    ]
    for one, other in zip(*answers, strict=True):
        assert (one.started.engine, other.started.engine) == ("fake", "tensorrt_llm")
        assert one.outputs == other.outputs
