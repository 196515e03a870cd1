"""A normal tenant's waiting times with and without a hostile tenant beside it that sends the worst grammars.

    PYTHONPATH=python python bench/hostile_tenant.py [--phase 30] [--rounds 2] [--json FILE]

Starts a server with the demo model on vLLM. Phases without and with the attack take turns, so that what else the
machine does meets both. Prints TTFT and ITL of the normal tenant, the ratios of their p99, the largest memory of the
server with its processes, and what the attack was answered. A request of the normal tenant: 32 tokens, every second
one with a small schema.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.server.processes import server
from twinjet.v1 import generation_pb2, sampling_pb2, service_pb2_grpc

SETTINGS = '[deployments.smollm2]\nengine = "vllm"\nmodel = "demo"\n'
SMALL = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}


def worst(i: int) -> dict[str, str]:
    """One of the costly constraints, never the same twice."""
    integer: Any = {"type": "integer", "title": str(i)}
    deep = integer
    for _ in range(9):
        deep = {"oneOf": [{"type": "object", "properties": {k: deep}, "required": [k]} for k in "ab"]}
    wide = {f"p{i}_{j:05d}": {"type": "string"} for j in range(9000)}
    kinds: list[Any] = [
        {"type": "array", "items": integer, "minItems": 10**18},
        {"type": "array", "items": integer, "maxItems": 10**6},
        {"type": "object", "properties": wide},
        deep,
        {
            "type": "object",
            "properties": {k: {"type": "string", "maxLength": 300} for k in list(wide)[:2000]},
        },
    ]
    if i % 7 == 5:
        return {"regex": f"(([a-z]{{1,900}}){{1,900}}x{i}){{1,900}}"}
    if i % 7 == 6:
        return {"ebnf": f'root ::= a a a a a a a a a a "{i}"\na ::= "" | [a-z] a | a a'}
    return {"json_schema": json.dumps(kinds[i % 7])}


class Load:
    """Calls one server until told to stop."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = service_pb2_grpc.InferenceServiceStub(self._channel)
        self.stop = threading.Event()
        self.codes: Counter[str] = Counter()
        self.ttft_s: list[float] = []
        self.itl_s: list[float] = []
        self._number = 0

    def _call(self, text: str, tenant: str, timeout_s: float, **sampling: Any) -> Any:
        request = generation_pb2.GenerateRequest(
            text=text, sampling=sampling_pb2.SamplingParams(**sampling), options={"tenant": tenant}
        )
        return self._stub.Generate(request, timeout=timeout_s)

    def attack(self) -> None:
        while not self.stop.is_set():
            self._number += 1
            try:
                list(self._call("x", "hostile", 10.0, max_tokens=16, constraint=worst(self._number)))
                self.codes["OK"] += 1
            except grpc.RpcError as error:
                self.codes[error.code().name] += 1  # type: ignore[attr-defined]
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # type: ignore[attr-defined]
                    self.stop.wait(0.2)

    def behave(self, until: float) -> None:
        while time.monotonic() < until:
            self._number += 1
            sampling: dict[str, Any] = {"max_tokens": 32, "temperature": 0.0}
            if self._number % 2:
                sampling["constraint"] = {"json_schema": json.dumps(SMALL)}
            else:
                sampling["ignore_eos"] = True
            last = began = time.monotonic()
            for event in self._call("Name a city.", "normal", 60.0, **sampling):
                if event.HasField("delta"):
                    now = time.monotonic()
                    (self.ttft_s if last == began else self.itl_s).append(now - last)
                    last = now


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


def memory(pid: int) -> int:
    found = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            found += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phase", type=float, default=30.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--attackers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {k: {"ttft": [], "itl": []} for k in ("without", "with")}
    codes: Counter[str] = Counter()
    most = [0]
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), SETTINGS) as (process, address):
        Load(address).behave(time.monotonic() + 5)
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                most[0] = max(most[0], memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        number = 0
        for _ in range(args.rounds):
            for name in ("without", "with"):
                attack, normal = Load(address), Load(address)
                attack._number, number = number, number + 10_000
                threads = [
                    threading.Thread(target=attack.attack) for _ in range(args.attackers * (name == "with"))
                ]
                for thread in threads:
                    thread.start()
                normal.behave(time.monotonic() + args.phase)
                attack.stop.set()
                for thread in threads:
                    thread.join()
                found[name]["ttft"] += normal.ttft_s
                found[name]["itl"] += normal.itl_s
                codes += attack.codes
        done.set()
        watcher.join()
        assert process.poll() is None, "the server died"
    for name, times in found.items():
        print(
            f"{name:8}",
            *(
                f"{k} p50 {statistics.median(v) * 1e3:.1f} p99 {p99(v) * 1e3:.1f} ms ({len(v)})"
                for k, v in times.items()
            ),
        )
    ratios = {k: p99(found["with"][k]) / p99(found["without"][k]) for k in ("ttft", "itl")}
    print(f"p99 with / without: {ratios}; memory at most {most[0] >> 20} MiB; the attack got {dict(codes)}")
    if args.json:
        args.json.write_text(
            json.dumps({"ratios": ratios, "memory_bytes": most[0], "codes": codes, "seconds": found})
        )


if __name__ == "__main__":
    main()
