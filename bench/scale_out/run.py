"""How several replicas share calls, behind Envoy and with no proxy: `PYTHONPATH=python python bench/scale_out/run.py`.

    --rows split,slow,kill,roll   --seconds S   --replicas 2,8   --balancers envoy,python,node   --out FILE

split   shares of calls beside those that the replicas' own reports imply, replicas of different speeds
slow    how long a replica that slows down to a quarter keeps its calls, and how long it is without once it is back
kill    one of four replicas killed under 200 streams: what fails, and what is sent to it afterwards
roll    every replica drained and restarted in turn under load: what fails, and how long calls take

Replicas are processes with the fake engine, every other one behind the native door; JSON, a line a row.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.models.orca import OrcaLoadReport, OrcaLoadReportRequest, weight  # noqa: E402
from tests.scale_out.envoy import Envoy  # noqa: E402
from tests.scale_out.replicas import Replica, replicas  # noqa: E402
from tests.scale_out.test_restarts import Stream  # noqa: E402
from tests.scale_out.traffic import install_node_client, node_calls  # noqa: E402
from twinjet.client._channel import SERVICE_CONFIG  # noqa: E402
from twinjet.v1 import service_pb2_grpc  # noqa: E402

CONFIG = json.dumps(SERVICE_CONFIG)
PERIOD_S = 0.25
"""How often a balancer has reports and looks at them, by deploy/envoy and by SERVICE_CONFIG."""


@contextlib.asynccontextmanager
async def behind_envoy(folder: Path, servers: Sequence[Replica]) -> AsyncIterator[Envoy]:
    proxy = Envoy(folder / "envoy", [s.address for s in servers])
    try:
        await proxy.until_healthy(len(servers))
        yield proxy
    finally:
        await proxy.stop()


class Load:
    """Streams that are always under way, and what became of them."""

    def __init__(self, target: str, config: str | None, num_callers: int, num_tokens: int) -> None:
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if config is not None:
            options.append(("grpc.service_config", config))
        self._channel = grpc.aio.insecure_channel(target, options=options)
        self._stub = service_pb2_grpc.InferenceServiceStub(self._channel)
        self._num_tokens = num_tokens
        self.done: list[tuple[float, float, Stream]] = []
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._call()) for _ in range(num_callers)]

    async def _call(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            stream = await Stream(self._stub, self._num_tokens).run()
            self.done.append((time.monotonic(), time.monotonic() - began, stream))

    async def close(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._channel.close()

    def shares(self, since: float, until: float) -> Counter[str]:
        return Counter(s.replica for at, took, s in self.done if since <= at - took < until)


class Reports:
    """The weights that the replicas' reports out of band imply, as they were over time."""

    def __init__(self, servers: Sequence[Replica]) -> None:
        self._latest = dict.fromkeys((s.name for s in servers), 0.0)
        self._times: list[float] = []
        self._shares: list[dict[str, float]] = []
        self._tasks = [asyncio.create_task(self._read(s)) for s in servers]

    async def _read(self, server: Replica) -> None:
        request = OrcaLoadReportRequest()
        request.report_interval.nanos = 250_000_000
        async with grpc.aio.insecure_channel(server.address) as channel:
            ask = channel.unary_stream(
                "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics",
                request_serializer=OrcaLoadReportRequest.SerializeToString,
                response_deserializer=OrcaLoadReport.FromString,
            )
            async for report in ask(request):
                self._latest[server.name] = weight(report)
                if all(self._latest.values()):
                    total = sum(self._latest.values())
                    self._times.append(time.monotonic())
                    self._shares.append({name: w / total for name, w in self._latest.items()})

    def at(self, when: float) -> dict[str, float]:
        """The share of each replica by the reports that were there at a time."""
        return self._shares[max(bisect.bisect_right(self._times, when) - 1, 0)]

    def implied(self, times: Sequence[float]) -> dict[str, float]:
        """The share of each in calls that began at these times: each counts by what the weights were then."""
        totals: Counter[str] = Counter()
        for when in times:
            totals.update(self.at(when))
        return {name: totals[name] / len(times) for name in self._latest}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def served(servers: Sequence[Replica]) -> dict[str, int]:
    """Calls that each replica answered with OK, from its metrics."""
    return {s.name: await s.num_served() for s in servers}


async def split(folder: Path, arguments: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    for count in arguments.replicas:
        for balancer in arguments.balancers:
            place = folder / f"split-{count}-{balancer}"
            place.mkdir()
            steps = [0.004 * 2 ** (2 * i / count) for i in range(count)]
            options = [f"step_s = {step}, max_num_seqs = 32" for step in steps]
            async with contextlib.AsyncExitStack() as stack:
                servers = await stack.enter_async_context(replicas(place, count, options))
                several = "ipv4:" + ",".join(s.address for s in servers)
                reports = Reports(servers)
                load = None
                if balancer == "node":
                    if not install_node_client():
                        continue
                    await stack.enter_async_context(node_calls(several, CONFIG, num_tokens=16))
                elif balancer == "envoy":
                    proxy = await stack.enter_async_context(behind_envoy(place, servers))
                    load = Load(proxy.address, None, 8 * count, 16)
                else:
                    load = Load(several, CONFIG, 8 * count, 16)
                await asyncio.sleep(10)
                began = time.monotonic()
                before = await served(servers)
                await asyncio.sleep(arguments.seconds)
                ended = time.monotonic()
                after = await served(servers)
                if load is None:
                    counts = {name: after[name] - before[name] for name in after}
                    times = [began + (ended - began) * i / 999 for i in range(1000)]
                else:
                    await load.close()
                    counts = {s.name: load.shares(began, ended)[s.name] for s in servers}
                    times = [at - took for at, took, _ in load.done if began <= at - took < ended]
                # A balancer has a report for half of both its periods before it goes by it, on the average.
                implied = reports.implied([when - PERIOD_S for when in times])
                await reports.close()
            total = sum(counts.values())
            errors = {
                name: (counts[name] / total - p) / (p * (1 - p) / total) ** 0.5 for name, p in implied.items()
            }
            yield {
                "row": "split", "replicas": count, "balancer": balancer, "calls": total,
                "shares": {n: round(c / total, 4) for n, c in counts.items()},
                "implied": {n: round(p, 4) for n, p in implied.items()},
                "worst_standard_errors": round(max(map(abs, errors.values())), 2),
                "worst_difference": round(max(abs(counts[n] / total - p) for n, p in implied.items()), 4),
            }  # fmt: skip


async def slow(folder: Path, arguments: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    for balancer in arguments.balancers:
        if balancer == "node":
            continue
        place = folder / f"slow-{balancer}"
        place.mkdir()
        async with contextlib.AsyncExitStack() as stack:
            servers = await stack.enter_async_context(
                replicas(place, 4, ["step_s = 0.02, max_num_seqs = 64"] * 4, steerable=True)
            )
            if balancer == "envoy":
                target, config = (await stack.enter_async_context(behind_envoy(place, servers))).address, None
            else:
                target, config = "ipv4:" + ",".join(s.address for s in servers), CONFIG
            load = Load(target, config, 64, 10)
            await asyncio.sleep(10)
            rows = []
            for _ in range(arguments.repeats):
                lost = await _until_share(load, servers[1], 0.08, below=0.125)
                back = await _until_share(load, servers[1], 0.02, below=None)
                rows.append((lost, back))
                await asyncio.sleep(3)
            await load.close()
        yield {
            "row": "slow", "balancer": balancer, "half_of_its_calls_gone_after_s": [round(r[0], 2) for r in rows],
            "nine_tenths_back_after_s": [round(r[1], 2) for r in rows],
            "errors": sum(s.error is not None for _, _, s in load.done),
        }  # fmt: skip


async def _until_share(
    load: Load, server: Replica, step_s: float, below: float | None, window_s: float = 0.5
) -> float:
    """Set a replica's step and wait until its share of the calls begun in a window has followed; seconds since."""
    server.steer(step_s)
    began = time.monotonic()
    while True:
        await asyncio.sleep(0.05)
        now = time.monotonic()
        # Calls are counted when they have ended, which at the slow replica takes a second.
        counts = load.shares(now - window_s - 1.0, now - 1.0)
        if now - began < window_s + 1.0 or not counts:
            continue
        share = counts[server.name] / counts.total()
        if (share < below) if below is not None else (share > 0.9 / 4):
            return now - 1.0 - window_s / 2 - began


async def kill(folder: Path, _: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    place = folder / "kill"
    place.mkdir()
    async with (
        replicas(place, 4, "step_s = 0.05, max_num_seqs = 128") as servers,
        behind_envoy(place, servers) as proxy,
        proxy.channel() as channel,
    ):
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        streams = [Stream(stub, 200) for _ in range(200)]
        tasks = [asyncio.create_task(stream.run()) for stream in streams]
        while not all(stream.num_tokens for stream in streams):
            await asyncio.sleep(0.02)
        at = Counter(stream.replica for stream in streams)
        servers[1].kill()
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        tried = proxy.requests()[servers[1].address]["rq_total"]
        later = await asyncio.gather(*(Stream(stub, 5).run() for _ in range(500)))
        sent = proxy.requests()[servers[1].address]["rq_total"] - tried
        await asyncio.gather(*tasks)
    failed = Counter(s.replica for s in streams if s.error)
    yield {
        "row": "kill", "streams": dict(at), "killed": "r1", "failed": dict(failed),
        "statuses": dict(Counter(s.error.code().name for s in streams if s.error)),
        "later_calls": len(later), "later_failed": sum(s.error is not None for s in later),
        "sent_to_the_killed_one_after_the_first_failure": sent,
        "whole": sum(s.is_whole and s.num_tokens == 200 for s in streams),
    }  # fmt: skip


async def roll(folder: Path, arguments: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    place = folder / "roll"
    place.mkdir()
    async with (
        replicas(place, 4, "step_s = 0.01, max_num_seqs = 128") as servers,
        behind_envoy(place, servers) as proxy,
    ):
        load = Load(proxy.address, None, 64, 50)
        await asyncio.sleep(3)
        for _ in range(arguments.repeats):
            for server in servers:
                await server.drain_and_stop()
                await server.start()
                await proxy.until_healthy(len(servers))
        await load.close()
        retried = sum(s["rq_total"] for s in proxy.requests().values()) - len(load.done)
    yield {
        "row": "roll", "restarts": 4 * arguments.repeats, "calls": len(load.done), "tried_again": retried,
        "failed": dict(Counter(s.error.code().name for _, _, s in load.done if s.error)),
        "not_whole": sum(not s.is_whole for _, _, s in load.done),
    }  # fmt: skip


async def main() -> None:
    rows = {"split": split, "slow": slow, "kill": kill, "roll": roll}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(rows))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--replicas", default="2,8", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--balancers", default="envoy,python,node", type=lambda text: text.split(","))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.rows.split(","):
            async for row in rows[name](Path(folder), arguments):
                line = json.dumps(row)
                print(line, flush=True)
                if arguments.out is not None:
                    with arguments.out.open("a") as out:
                        out.write(line + "\n")


if __name__ == "__main__":
    asyncio.run(main())
