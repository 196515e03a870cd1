"""Two tenants on a real engine: one sends 50 requests at once, one a request every two seconds.

Runs the same scene against two targets, one scheduled fairly, one first come first served (scheduler policy
"fcfs" of the same model and engine options), in turn, round by round. Shown: the light tenant's TTFT over all
rounds and its ratio, the median round's throughput and the median of the rounds' ratios, and how many requests
each engine has preempted since its start (to see some under fcfs, give the engines a KV cache too small for
their slots). Targets may be two servers or two deployments of one; only one has work at a time. The engine must
have fewer slots than requests in the burst for there to be a queue (max_num_seqs 8, say). AdminService must be
open to the caller, as it is on loopback.

    .venv/bin/python bench/fairness_bench.py --fair 127.0.0.1:50051 --fcfs 127.0.0.1:50052 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time

import grpc
from wire import Outcome, percentile, send

from twinjet.v1 import admin_pb2, service_pb2_grpc


async def preemptions(address: str, model: str) -> int | None:
    """Since the engine's start; None if it does not tell."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = admin_pb2.GetLoadRequest(model=model)
        (load,) = (await service_pb2_grpc.AdminServiceStub(channel).GetLoad(request)).models
    return load.preemptions if load.HasField("preemptions") else None


async def scene(address: str, model: str, args: argparse.Namespace, seed: int) -> dict[str, object]:
    """One round against one target."""
    rng = random.Random(seed)

    def prompt() -> list[int]:
        return [rng.randrange(100, args.vocab) for _ in range(args.prompt_tokens)]

    async with grpc.aio.insecure_channel(address) as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        start = time.perf_counter()
        heavy = [
            asyncio.create_task(
                send(stub, model=model, prompt=prompt(), max_tokens=args.output_tokens, tenant="heavy")
            )
            for _ in range(args.burst)
        ]
        done = asyncio.gather(*heavy)
        light: list[asyncio.Task[Outcome]] = []
        while not done.done():
            light.append(
                asyncio.create_task(
                    send(stub, model=model, prompt=prompt(), max_tokens=args.light_tokens, tenant="light")
                )
            )
            await asyncio.wait([done], timeout=args.every_s)
        outcomes = [*await done, *await asyncio.gather(*light)]
        seconds = time.perf_counter() - start
    failed = [o for o in outcomes if not o.complete]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {sorted({o.code for o in failed})}")
    return {
        "light_ttft_s": [o.ttft_s for o in outcomes if o.tenant == "light"],
        "heavy_ttft_s": [o.ttft_s for o in outcomes if o.tenant == "heavy"],
        "tokens": sum(o.tokens for o in outcomes),
        "prompt_tokens": len(outcomes) * args.prompt_tokens,
        "seconds": seconds,
    }


async def run(args: argparse.Namespace) -> dict[str, object]:
    targets = {"fair": (args.fair, args.fair_model), "fcfs": (args.fcfs, args.fcfs_model)}
    rounds: dict[str, list[dict[str, object]]] = {name: [] for name in targets}
    for number in range(args.warmup + args.rounds):
        order = list(targets) if number % 2 else list(reversed(targets))
        for name in order:
            result = await scene(*targets[name], args, number)
            if number >= args.warmup:
                rounds[name].append(result)
    report: dict[str, object] = {"rounds": rounds}
    speeds, p99 = {}, {}
    for name, results in rounds.items():
        light = [float(t) for r in results for t in r["light_ttft_s"]]  # type: ignore[attr-defined]
        speeds[name] = [
            (int(r["tokens"]) + int(r["prompt_tokens"])) / float(r["seconds"])  # type: ignore[call-overload, arg-type]
            for r in results
        ]
        p99[name] = percentile(light, 0.99)
        report[name] = {
            "light_requests": len(light),
            "light_ttft_p50_s": percentile(light, 0.5),
            "light_ttft_p99_s": p99[name],
            "tokens_per_s": statistics.median(speeds[name]),
            "preemptions": await preemptions(*targets[name]),
        }
    report["light_ttft_p99_ratio"] = p99["fcfs"] / p99["fair"]
    report["throughput_ratio"] = statistics.median(
        fair / fcfs for fair, fcfs in zip(speeds["fair"], speeds["fcfs"], strict=True)
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fair", required=True, help="HOST:PORT of the fairly scheduled target")
    parser.add_argument("--fcfs", required=True, help="HOST:PORT of the first-come-first-served target")
    parser.add_argument("--fair-model", default="", help="public model name; empty: the only one")
    parser.add_argument("--fcfs-model", default="")
    parser.add_argument("--burst", type=int, default=50)
    parser.add_argument("--every-s", type=float, default=2.0)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--light-tokens", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32_000, help="token ids are drawn below this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out")
    args = parser.parse_args()
    report = asyncio.run(run(args))
    for name in ("fair", "fcfs"):
        print(f"{name}: {json.dumps(report[name])}", file=sys.stderr)
    print(
        f"light tenant's p99 TTFT, fcfs/fair: {report['light_ttft_p99_ratio']:.2f} (goal: at least 5)\n"
        f"throughput, fair/fcfs: {report['throughput_ratio']:.3f} (goal: at least 0.97)",
        file=sys.stderr,
    )
    text = json.dumps(report, indent=1)
    if args.out:
        with open(args.out, "w") as file:
            file.write(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
