"""A normal tenant's waiting times beside a hostile tenant that sends the worst grammars, and without it.

    PYTHONPATH=python python bench/hostile_tenant.py [--phase 30] [--rounds 2] [--json FILE]

Starts a server with the demo model on vLLM. In each round take turns: the normal tenant alone; beside the attack; and,
if the attack had requests admitted, beside a well-behaved tenant with as many, at the same times: what the engine gives
to those is no harm but the other tenant's share. The attack comes from a process of its own and sends what was made
before. A request of the normal tenant: 32 tokens, every second one with a small schema. Prints TTFT and ITL of the
normal tenant and their ratios to alone, what the attack was answered, the largest memory of the server with its
processes, and for each phase the processor time of the server's parts and how long the engine waited for a processor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.server.processes import server
from twinjet.v1 import generation_pb2, sampling_pb2, service_pb2_grpc

SETTINGS = '[deployments.smollm2]\nengine = "vllm"\nmodel = "demo"\n'
SMALL = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
_MARK = "7919471"
"""What is replaced in a constraint, so that it is never the same twice."""


def worst() -> list[dict[str, str]]:
    """The costly constraints, with _MARK in each."""
    integer: Any = {"type": "integer", "title": _MARK}
    deep = integer
    for _ in range(9):
        deep = {"oneOf": [{"type": "object", "properties": {k: deep}, "required": [k]} for k in "ab"]}
    wide = {f"p{j:05d}": {"type": "string"} for j in range(9000)}
    long = {k: {"type": "string", "maxLength": 300} for k in list(wide)[:2000]}
    schemas: list[Any] = [
        {"type": "array", "items": integer, "minItems": 10**18},
        {"type": "array", "items": integer, "maxItems": 10**6},
        {"type": "object", "title": _MARK, "properties": wide},
        deep,
        {"type": "object", "title": _MARK, "properties": long},
    ]
    return [
        *({"json_schema": json.dumps(schema)} for schema in schemas),
        {"regex": f"(([a-z]{{1,900}}){{1,900}}x{_MARK}){{1,900}}"},
        {"ebnf": f'root ::= a a a a a a a a a a "{_MARK}"\na ::= "" | [a-z] a | a a'},
    ]


class Caller:
    """Calls one server."""

    def __init__(self, address: str, tenant: str) -> None:
        self._stub = service_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(address))
        self._tenant = tenant

    def __call__(self, text: str, timeout_s: float, **sampling: Any) -> Any:
        request = generation_pb2.GenerateRequest(
            text=text,
            sampling=sampling_pb2.SamplingParams(**sampling),
            options=generation_pb2.RequestOptions(tenant=self._tenant),
        )
        return self._stub.Generate(request, timeout=timeout_s)


@dataclass
class Attack:
    """What an attack was answered. admitted_s: when its admitted requests started, from its beginning."""

    codes: Counter[str] = field(default_factory=Counter)
    admitted_s: list[float] = field(default_factory=list)


def attack(address: str, num_threads: int, first: int, start: Any, stop: Any, results: Any) -> None:
    """Send the worst from when told to until told to stop; runs in a process of its own."""
    constraints = worst()
    start.wait()
    found, began, lock = Attack(), time.monotonic(), threading.Lock()
    numbers = iter(range(first, sys.maxsize))

    def send() -> None:
        call = Caller(address, "hostile")
        while not stop.is_set():
            with lock:
                number = next(numbers)
            kind = number % len(constraints)
            constraint = {k: v.replace(_MARK, str(number)) for k, v in constraints[kind].items()}
            pause_s, started_s = 0.0, None
            try:
                for event in call("x", 10.0, max_tokens=16, constraint=constraint):
                    if event.HasField("started"):
                        started_s = time.monotonic() - began
                code = "OK"
            except grpc.RpcError as error:
                code = error.code().name
                pause_s = 0.2 * (code == "RESOURCE_EXHAUSTED")
            with lock:
                found.codes[f"{kind} {code}"] += 1
                if started_s is not None:
                    found.admitted_s.append(started_s)
            stop.wait(pause_s)

    threads = [threading.Thread(target=send) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(found)


class Neighbour:
    """A well-behaved tenant that sends requests of 16 tokens at given times."""

    def __init__(self, address: str, times_s: list[float]) -> None:
        self._call, self._times_s, self._stop = (
            Caller(address, "neighbour"),
            sorted(times_s),
            threading.Event(),
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        streams = []
        for at in self._times_s:
            if self._stop.wait(began + at - time.monotonic()):
                break
            streams.append(self._call("x", 60.0, max_tokens=16, ignore_eos=True))
        for stream in streams:
            list(stream)

    def end(self) -> None:
        """Let what is sent end, and send nothing more."""
        self._stop.set()
        self._thread.join()


@dataclass
class Times:
    """Seconds."""

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)

    def measure(self, address: str, phase_s: float) -> None:
        """Be a normal tenant for a while."""
        call, until, number = Caller(address, "normal"), time.monotonic() + phase_s, 0
        while time.monotonic() < until:
            number += 1
            sampling: dict[str, Any] = {"max_tokens": 32, "temperature": 0.0}
            if number % 2:
                sampling["constraint"] = {"json_schema": json.dumps(SMALL)}
            else:
                sampling["ignore_eos"] = True
            last = began = time.monotonic()
            for event in call("Name a city.", 60.0, **sampling):
                if event.HasField("delta"):
                    now = time.monotonic()
                    (self.ttft if last == began else self.itl).append(now - last)
                    last = now


def part_of(process: psutil.Process, server_pid: int) -> str:
    """Name the part of the server that a process is."""
    if process.pid == server_pid:
        return "server"
    return "grammar" if "twinjet.grammar.worker" in " ".join(process.cmdline()) else "engine"


def used(pid: int) -> dict[str, float]:
    """Processor seconds of the server's parts, ended children with their parents; and the engine's waiting."""
    found: defaultdict[str, float] = defaultdict(float)
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            part, times = part_of(process, pid), process.cpu_times()
            found[part] += times.user + times.system + times.children_user + times.children_system
            if part == "engine":
                for stat in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                    found["engine waited"] += int(stat.read_text().split()[1]) / 1e9
        except (psutil.NoSuchProcess, OSError):
            continue
    return found


def memory(pid: int) -> int:
    """Resident bytes of a process and those below it."""
    found = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            found += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


class Campaign:
    """The phases, in rounds."""

    def __init__(self, pid: int, address: str, phase_s: float, num_attackers: int) -> None:
        self._pid, self._address, self._phase_s, self._num_attackers = pid, address, phase_s, num_attackers
        self.times = {name: Times() for name in ("alone", "attack", "neighbour")}
        self.used: dict[str, defaultdict[str, float]] = {name: defaultdict(float) for name in self.times}
        self.codes: Counter[str] = Counter()
        self.num_admitted = 0
        self._number = 0

    def round(self) -> None:
        """Do each phase once."""
        context = multiprocessing.get_context("spawn")
        start, stop, results = context.Barrier(2), context.Event(), context.Queue()
        attacker = context.Process(
            target=attack, args=(self._address, self._num_attackers, self._number, start, stop, results)
        )
        # It has started long before it is let go.
        attacker.start()
        time.sleep(1)
        self._phase("alone", lambda: None)
        start.wait()
        found: list[Attack] = []

        def end() -> None:
            stop.set()
            found.append(results.get(timeout=60))
            attacker.join()

        self._phase("attack", end)
        self._number += 1_000_000
        self.codes += found[0].codes
        self.num_admitted += len(found[0].admitted_s)
        if found[0].admitted_s:
            self._phase("neighbour", Neighbour(self._address, found[0].admitted_s).end)

    def _phase(self, name: str, end: Callable[[], None]) -> None:
        before = used(self._pid)
        self.times[name].measure(self._address, self._phase_s)
        after = used(self._pid)
        for part in after:
            self.used[name][part] += after[part] - before[part]
        end()

    def ratios(self, name: str) -> dict[str, float]:
        """p50 and p99 of a phase to those of alone."""
        found = {}
        for kind in ("ttft", "itl"):
            of, alone = getattr(self.times[name], kind), getattr(self.times["alone"], kind)
            found[f"{kind}_p50"] = statistics.median(of) / statistics.median(alone)
            found[f"{kind}_p99"] = p99(of) / p99(alone)
        return found

    def show(self) -> None:
        """Print the table."""
        print("| phase | TTFT p50 | p99 | ITL p50 | p99 (ms) | requests | to alone | processor seconds |")
        print("|---|---|---|---|---|---|---|---|")
        for name, times in self.times.items():
            if not times.ttft:
                continue
            cells = [f"{f(v) * 1e3:.1f}" for v in (times.ttft, times.itl) for f in (statistics.median, p99)]
            ratios = ", ".join(f"{v:.2f}" for v in self.ratios(name).values())
            parts = ", ".join(f"{k} {v:.1f}" for k, v in sorted(self.used[name].items()))
            print(f"| {name} | {' | '.join(cells)} | {len(times.ttft)} | {ratios} | {parts} |")
        print(
            f"the attack got {dict(sorted(self.codes.items()))}; {self.num_admitted} requests of it were admitted"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phase", type=float, default=30.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--attackers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    most = [0]
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), SETTINGS) as (process, address):
        Times().measure(address, 5)
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                most[0] = max(most[0], memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        campaign = Campaign(process.pid, address, args.phase, args.attackers)
        for _ in range(args.rounds):
            campaign.round()
        done.set()
        watcher.join()
        assert process.poll() is None, "the server died"
    campaign.show()
    print(f"memory at most {most[0] >> 20} MiB")
    if args.json:
        found = {name: vars(times) for name, times in campaign.times.items()}
        args.json.write_text(json.dumps({"seconds": found, "used": campaign.used, "codes": campaign.codes}))


if __name__ == "__main__":
    main()
