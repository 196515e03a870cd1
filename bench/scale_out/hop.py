"""What a hop before a server costs: calls straight to it and through the hop by turns, ratios of their medians.

    PYTHONPATH=python python bench/scale_out/hop.py --direct HOST:PORT --through HOST:PORT [--metadata application=twinjet]

The server has the fake engine, which answers at once. Latency: one call at a time, of one token. Throughput: 32 streams
of 200 tokens. Then whether details, deadlines and cancels get through.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

import grpc

from twinjet.v1 import generation_pb2, service_pb2_grpc

Request = generation_pb2.GenerateRequest


async def one(stub: Any, metadata: Any, num_tokens: int) -> tuple[float, float]:
    """Seconds to the first message and to the end."""
    began = time.perf_counter()
    first = 0.0
    request = Request(text="x", sampling={"max_tokens": num_tokens, "ignore_eos": True})
    async for _ in stub.Generate(request, metadata=metadata):
        first = first or time.perf_counter() - began
    return first, time.perf_counter() - began


async def many(stub: Any, metadata: Any, num_streams: int, num_tokens: int) -> float:
    """Tokens a second of streams that run together."""
    began = time.perf_counter()
    await asyncio.gather(*(one(stub, metadata, num_tokens) for _ in range(num_streams)))
    return num_streams * num_tokens / (time.perf_counter() - began)


async def refusal(
    stub: Any, metadata: Any, request: Request, timeout_s: float | None = None
) -> dict[str, Any]:
    call = stub.Generate(request, metadata=metadata, timeout=timeout_s)
    began = time.perf_counter()
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        return {
            "code": error.code().name,
            "details_bytes": len(details),
            "s": round(time.perf_counter() - began, 2),
        }
    return {"code": "OK"}


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--direct", required=True)
    parser.add_argument("--through", required=True)
    parser.add_argument("--metadata", default="")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=50)
    arguments = parser.parse_args()
    extra = [tuple(pair.split("=", 1)) for pair in arguments.metadata.split(",") if pair]
    options = [("grpc.use_local_subchannel_pool", 1)]
    names = ("direct", "through")
    async with (
        grpc.aio.insecure_channel(arguments.direct, options=options) as direct,
        grpc.aio.insecure_channel(arguments.through, options=options) as through,
    ):
        stubs = dict(zip(names, map(service_pb2_grpc.InferenceServiceStub, (direct, through)), strict=True))
        first: dict[str, list[float]] = {name: [] for name in names}
        whole: dict[str, list[float]] = {name: [] for name in names}
        speed: dict[str, list[float]] = {name: [] for name in names}
        for stub in stubs.values():
            await one(stub, extra, 1)
        for _ in range(arguments.rounds):
            for _ in range(arguments.calls):
                for name, stub in stubs.items():
                    took = await one(stub, extra, 1)
                    first[name].append(took[0])
                    whole[name].append(took[1])
            for name, stub in stubs.items():
                speed[name].append(await many(stub, extra, 32, 200))
        result: dict[str, Any] = {}
        for label, values, unit in (("first_message", first, 1e3), ("one_token_call", whole, 1e3)):
            for name in names:
                ordered = sorted(values[name])
                result[f"{label}_{name}_p50_ms"] = round(statistics.median(ordered) * unit, 2)
                result[f"{label}_{name}_p99_ms"] = round(ordered[int(len(ordered) * 0.99)] * unit, 2)
        for name in names:
            result[f"tokens_per_s_{name}"] = round(statistics.median(speed[name]))
        for name, stub in stubs.items():
            result[f"bad_range_{name}"] = await refusal(stub, extra, Request(text="x", sampling={"top_p": 7}))
            stalled = Request(text="!stall", sampling={"max_tokens": 1})
            result[f"deadline_{name}"] = await refusal(stub, extra, stalled, 1.5)
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
