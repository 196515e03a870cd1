"""Three times the capacity for two minutes: what is served, what is refused and how, and the memory.

First the peak: as many requests at once as keep the engine full. Then an open loop at `--factor` times the
peak's rate, Poisson, whatever comes back. Every request must end in one of: a whole stream,
RESOURCE_EXHAUSTED with RetryInfo, or DEADLINE_EXCEEDED if it had a deadline; anything else is lost. Exit
status 1 if a goal is missed.

    .venv/bin/python bench/overload_bench.py --target 127.0.0.1:50051 --pid PID
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter

import grpc
from wire import Outcome, percentile, send

from twinjet.v1 import service_pb2_grpc

NUM_CHANNELS = 4


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    raise SystemExit(f"process {pid} has no VmRSS")


class Load:
    """Sends requests over a few connections and keeps what became of them."""

    def __init__(self, stubs: list[service_pb2_grpc.InferenceServiceStub], args: argparse.Namespace) -> None:
        self.stubs = stubs
        self.args = args
        self.rng = random.Random(args.seed)
        self.outcomes: list[Outcome] = []
        self.number = 0

    async def one(self) -> None:
        self.number += 1
        args = self.args
        stub = self.stubs[self.number % len(self.stubs)]
        prompt = [self.rng.randrange(100, args.vocab) for _ in range(args.prompt_tokens)]
        tenant = f"tenant{self.number % args.tenants}"
        timeout = args.timeout_s or None
        self.outcomes.append(
            await send(
                stub, model=args.model, prompt=prompt, max_tokens=args.output_tokens, tenant=tenant,
                timeout_s=timeout,
            )
        )  # fmt: skip

    async def closed(self, concurrency: int, seconds: float) -> float:
        """Whole streams a second with `concurrency` requests always on the way."""
        end = time.perf_counter() + seconds

        async def worker() -> None:
            while time.perf_counter() < end:
                await self.one()

        start, before = time.perf_counter(), len(self.outcomes)
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        done = [o for o in self.outcomes[before:] if o.complete]
        return len(done) / (time.perf_counter() - start)

    async def open(self, rate: float, seconds: float) -> list[asyncio.Task[None]]:
        """Poisson arrivals for `seconds`; the tasks may still run."""
        tasks = []
        start = time.perf_counter()
        due = 0.0
        while due < seconds:
            tasks.append(asyncio.create_task(self.one()))
            due += self.rng.expovariate(rate)
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        return tasks


async def watch_memory(pid: int, samples: list[tuple[float, int]]) -> None:
    start = time.perf_counter()
    while True:
        samples.append((time.perf_counter() - start, rss_bytes(pid)))
        await asyncio.sleep(1.0)


async def run(args: argparse.Namespace) -> dict[str, object]:
    async with contextlib.AsyncExitStack() as stack:
        stubs = []
        for i in range(NUM_CHANNELS):
            options = [("grpc.use_local_subchannel_pool", 1), ("twinjet.channel", i)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(args.target, options))
            stubs.append(service_pb2_grpc.InferenceServiceStub(channel))
        load = Load(stubs, args)
        peak = await load.closed(args.concurrency, args.peak_s)
        if not peak:
            raise SystemExit(f"no request was served: {Counter(o.code for o in load.outcomes)}")
        load.outcomes.clear()
        memory: list[tuple[float, int]] = []
        watcher = asyncio.create_task(watch_memory(args.pid, memory)) if args.pid else None
        start = time.perf_counter()
        tasks = await load.open(args.factor * peak, args.seconds)
        window = time.perf_counter() - start
        served = sum(o.complete for o in load.outcomes)
        _, hung = await asyncio.wait(tasks, timeout=args.settle_s)
        for task in hung:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if watcher is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
    return judge(load.outcomes, len(tasks), len(hung), served / window, peak, memory)


def judge(
    outcomes: list[Outcome], sent: int, hung: int, goodput: float, peak: float,
    memory: list[tuple[float, int]],
) -> dict[str, object]:  # fmt: skip
    refused = [o for o in outcomes if o.code == "RESOURCE_EXHAUSTED"]
    without = [o for o in refused if not o.retry_after_s]
    expected = {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    lost = hung + sum(not o.complete and o.code not in expected for o in outcomes)
    early = [size for at, size in memory if at >= memory[-1][0] * 0.25][:5]
    growth = max(size for _, size in memory) - max(early) if memory else 0
    report: dict[str, object] = {
        "sent": sent,
        "codes": dict(Counter(o.code for o in outcomes)),
        "peak_per_s": peak,
        "goodput_per_s": goodput,
        "goodput_share": goodput / peak,
        "refused": len(refused),
        "refused_without_retry_info": len(without),
        "lost": lost,
        "hung": hung,
        "refusal_ms_p99": percentile([o.total_s for o in refused], 0.99) * 1e3 if refused else None,
        "retry_after_s": [
            min(o.retry_after_s or 0 for o in refused),
            max(o.retry_after_s or 0 for o in refused),
        ]
        if refused
        else None,
        "memory_growth_mib": growth / 2**20 if memory else None,
        "memory_mib": [round(size / 2**20, 1) for _, size in memory],
    }
    report["goals"] = {
        "goodput at least 90% of peak": goodput >= 0.9 * peak,
        "every refusal has RetryInfo": not without and bool(refused),
        "none lost": lost == 0,
        "memory flat (32 MiB)": growth < 32 * 2**20 if memory else None,
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="HOST:PORT")
    parser.add_argument("--model", default="", help="public model name; empty: the only one")
    parser.add_argument("--pid", type=int, default=0, help="the server's process, to watch its memory")
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--peak-s", type=float, default=20.0)
    parser.add_argument("--settle-s", type=float, default=60.0, help="time for the queue to empty at the end")
    parser.add_argument("--concurrency", type=int, default=64, help="requests that fill the engine")
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--timeout-s", type=float, default=0.0, help="gRPC deadline of each request; 0: none")
    parser.add_argument("--vocab", type=int, default=200, help="token ids are drawn below this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out")
    args = parser.parse_args()
    report = asyncio.run(run(args))
    shown = {key: value for key, value in report.items() if key != "memory_mib"}
    print(json.dumps(shown, indent=1), file=sys.stderr)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    goals = report["goals"]
    assert isinstance(goals, dict)
    sys.exit(1 if False in goals.values() else 0)


if __name__ == "__main__":
    main()
