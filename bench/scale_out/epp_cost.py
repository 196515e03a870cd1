"""What a pick costs: in the picker alone, and through its gRPC door as Envoy calls it.

    python bench/scale_out/epp_cost.py [--replicas 8] [--seconds 5]

The prompts are those of 600 prefixes, as token ids; every fourth is new. Prints JSON. "door" is one process of the
picker on one core, its client another; each request is a stream of two messages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import struct
import sys
import time
from typing import Any

import grpc

from twinjet._core import EppPrompt
from twinjet.epp import wire
from twinjet.epp.main import Epp
from twinjet.epp.orca import Reading
from twinjet.epp.picking import Ask, EndpointPicker, ModelFacts
from twinjet.epp.settings import EppConfig, IndexSettings, PickingSettings, SheddingSettings
from twinjet.v1 import generation_pb2


def messages(num_tokens: int, count: int, seed: int) -> list[bytes]:
    """Requests of which each shares its first nine tenths with others of its family."""
    rng = random.Random(seed)
    shared = num_tokens * 9 // 10
    families = [[rng.randrange(100_000) for _ in range(shared)] for _ in range(min(600, max(count // 4, 1)))]
    made = []
    for i in range(count):
        prefix = [rng.randrange(100_000) for _ in range(shared)] if i % 4 == 3 else rng.choice(families)
        tail = [rng.randrange(100_000) for _ in range(num_tokens - shared)]
        made.append(generation_pb2.GenerateRequest(model="m", token_ids=prefix + tail).SerializeToString())
    return made


def fill(picker: EndpointPicker, count: int) -> None:
    """Make replicas that are up."""
    picker.set_replicas(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}:50051" for i in range(count))
    for replica in picker.replicas.values():
        picker.set_facts(replica, {"m": ModelFacts(True, "d", kv_tokens=1_000_000)})
        picker.set_up(replica, is_up=True)
        picker.report(replica, Reading(0, 4, 0, 0.3, None, {}))


def alone(num_replicas: int, num_tokens: int, seconds: float) -> dict[str, float]:
    """Picks in this process, each with reading, hashing, ranking and remembering."""
    picker = EndpointPicker(PickingSettings(report_life_s=1e5), IndexSettings(), SheddingSettings())
    fill(picker, num_replicas)
    sent = messages(num_tokens, max(min(2000, 20_000_000 // num_tokens), 60), 1)
    times = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        message = sent[len(times) % len(sent)]
        # CPU time: what else runs on the machine does not count.
        at = time.thread_time()
        pick = picker.pick(Ask(EppPrompt(message, "Generate")))
        picker.finish(pick)
        times.append(time.thread_time() - at)
    return summary(times)


def summary(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100)
    return {
        "p50_ms": round(1e3 * cuts[49], 3), "p99_ms": round(1e3 * cuts[98], 3),
        "per_s": round(len(times) / sum(times)), "count": len(times),
    }  # fmt: skip


async def _door(num_replicas: int, ready: Any) -> None:
    config = EppConfig.model_validate(
        {"server": {"port": 0}, "replicas": {"addresses": ["127.0.0.1:1"]}, "picking": {"report_life_s": 1e5}}
    )
    epp = Epp(config)
    await epp.start()
    await asyncio.sleep(0.2)
    fill(epp.picker, num_replicas)
    ready.write(epp.address + "\n")
    ready.flush()
    await asyncio.Event().wait()


def request_messages(message: bytes) -> tuple[bytes, bytes]:
    path = wire.field(1, wire.field(1, b":path") + wire.field(3, b"/twinjet.v1.InferenceService/Generate"))
    head = wire.field(2, wire.field(1, path)) + wire.field(11, wire.number_field(1, wire.BUFFERED_PARTIAL))
    frame = b"\0" + struct.pack(">I", len(message)) + message
    return head, wire.field(4, wire.field(1, frame) + wire.number_field(2, 1))


async def _load(address: str, sent: list[bytes], seconds: float, at_once: int) -> tuple[list[float], float]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    times: list[float] = []
    async with grpc.aio.insecure_channel(address, options) as channel:
        process = channel.stream_stream(f"/{wire.SERVICE_NAME}/Process")
        pairs = [request_messages(m) for m in sent]
        began = time.perf_counter()

        async def one(start: int) -> None:
            place = start
            while time.perf_counter() - began < seconds:
                head, body = pairs[place % len(pairs)]
                place += at_once
                at = time.perf_counter()
                call = process()
                await call.write(head)
                await call.read()
                await call.write(body)
                answer = await call.read()
                times.append(time.perf_counter() - at)
                assert wire.DESTINATION.encode() in answer
                await call.done_writing()
                await call.read()

        await asyncio.gather(*(one(i) for i in range(at_once)))
        return times, time.perf_counter() - began


async def through_door(num_replicas: int, num_tokens: int, seconds: float) -> dict[str, Any]:
    """Streams from this process to a picker in another; its CPU time tells what one core could do."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--door", str(num_replicas), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    sent = messages(num_tokens, max(min(1000, 10_000_000 // num_tokens), 60), 2)
    await _load(address, sent, 0.5, 4)
    before = _cpu_s(process.pid)
    times, took_s = await _load(address, sent, seconds, 16)
    cpu_s = _cpu_s(process.pid) - before
    one, _ = await _load(address, sent, seconds / 2, 1)
    process.kill()
    await process.wait()
    return {
        "alone": summary(one), "of_16": summary(times), "per_s": round(len(times) / took_s),
        "cpu_ms": round(1e3 * cpu_s / len(times), 3), "per_core_s": round(len(times) / cpu_s),
    }  # fmt: skip


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 1000])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--door", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.door is not None:
        asyncio.run(_door(arguments.door, sys.stdout))
        return
    for num_replicas in arguments.replicas:
        for num_tokens in (1_000, 10_000, 100_000):
            row = {"replicas": num_replicas, "tokens": num_tokens}
            row["picker"] = alone(num_replicas, num_tokens, arguments.seconds)
            row["door"] = asyncio.run(through_door(num_replicas, num_tokens, arguments.seconds))
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
