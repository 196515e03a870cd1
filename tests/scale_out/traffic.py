"""Calls that are always under way, and how many of them each server answered."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from tests.server.harness import Harness, collect
from twinjet.client._channel import SERVICE_CONFIG
from twinjet.v1 import generation_pb2, service_pb2_grpc

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NODE_FOLDER = ROOT / ".cache" / "interop"
NODE_PACKAGES = ["@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.0"]
CALLS = 8
SHORT = generation_pb2.GenerateRequest(text="x", sampling={"max_tokens": 1})


def service_config() -> str:
    """The service config that docs/scale-out.md gives, with reports and weights ten times as often."""
    balancing: Any = SERVICE_CONFIG["loadBalancingConfig"]
    changed = {"blackoutPeriod": "0s", "weightUpdatePeriod": "0.1s", "oobReportingPeriod": "0.1s"}
    policy = {"weighted_round_robin": balancing[0]["weighted_round_robin"] | changed}
    return json.dumps(SERVICE_CONFIG | {"loadBalancingConfig": [policy]})


def several(servers: Sequence[Harness]) -> str:
    """The address of all of them, for a client that balances."""
    return "ipv4:" + ",".join(h.server.address for h in servers)


def served(servers: Sequence[Harness]) -> Counter[int]:
    """How many calls each server has answered."""
    sample = [h.server.metrics.registry.get_sample_value for h in servers]
    labels = {"method": "Generate", "code": "OK"}
    return Counter({i: int(n) for i, s in enumerate(sample) if (n := s("twinjet_calls_total", labels))})


@asynccontextmanager
async def python_calls(
    target: str,
    config: str | None = None,
    request: generation_pb2.GenerateRequest = SHORT,
    calls: int = CALLS,
) -> AsyncIterator[None]:
    """Keep calls under way from a stock Python client. config: its service config."""
    options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
    if config is not None:
        options.append(("grpc.service_config", config))
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)

        async def caller() -> None:
            while True:
                await collect(stub.Generate(request))

        tasks = [asyncio.create_task(caller()) for _ in range(calls)]
        try:
            yield
            assert not any(task.done() for task in tasks), [t.exception() for t in tasks if t.done()]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def install_node_client() -> bool:
    """Have grpc-js where Node finds it; False where there is no npm."""
    if shutil.which("npm") is None:
        return False
    if not (NODE_FOLDER / "node_modules" / "@grpc" / "proto-loader").exists():
        install = ["npm", "install", "--prefix", str(NODE_FOLDER), "--no-fund", "--no-audit", *NODE_PACKAGES]
        subprocess.run(install, check=True, capture_output=True, timeout=240)
    return True


@asynccontextmanager
async def node_calls(target: str, config: str, num_tokens: int = 1) -> AsyncIterator[None]:
    """Keep calls under way from a stock Node client."""
    process = await asyncio.create_subprocess_exec(
        "node", str(HERE / "client.js"), target, config, str(ROOT / "proto"), str(CALLS), str(num_tokens),
        stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"NODE_PATH": str(NODE_FOLDER / "node_modules")},
    )  # fmt: skip
    assert process.stdin is not None and process.stderr is not None
    try:
        yield
        assert process.returncode is None, (await process.stderr.read()).decode()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_split(
    servers: Sequence[Harness], num_calls: int, fits: Callable[[Counter[int]], bool], timeout_s: float = 240.0
) -> Counter[int]:
    """Count windows of at least so many calls until one fits; gives it. Raises AssertionError with the last one."""
    counts: Counter[int] = Counter()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                before = served(servers)
                while (counts := served(servers) - before).total() < num_calls:
                    await asyncio.sleep(0.02)
                if fits(counts):
                    return counts
    except TimeoutError:
        raise AssertionError(f"never the split wanted; the last one: {dict(counts)}") from None
