"""What of an engine core's speed reaches gRPC clients, on one GPU: the core alone, then behind each front end.

    PYTHONPATH=python python bench/gpu/served.py --out DIR [--load build/bench/load] [--vllm-rs BINARY]

Needs vLLM's CUDA build, the extension with its CUDA side and the native door, and the load client of
bench/frontend. One engine of random weights for each row runs the whole time; cells go round the rows, so that noise
meets all of them. Tokens a second are counted while all streams are open, between the last one's first token
and the first one's end; the core's are engine_worker.py's. Rows: core, native and grpc (Twinjet through its own
door and through gRPC's library), rs (vLLM with its Rust front end over HTTP, counted over the whole run, as its
texts do not tell tokens). Writes served.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import make_served_shape

from engines import SIZES, Engine

PROMPT = list(range(1000, 1032))
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
}


def options_for(kv_bytes: int, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "load_format": "dummy", "max_num_seqs": 1024, "max_model_len": 2048, "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": kv_bytes,
        "compilation_config": {"cudagraph_capture_sizes": SIZES}, **more,
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A front end in a process of its own, with its engine below it."""

    def __init__(self, name: str, command: list[str], port: int, out: Path, env: dict[str, str]) -> None:
        self.name, self.port = name, port
        self.log = out / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def twinjet(door: str, model: Path, options: dict[str, Any], out: Path) -> Server:
    port = free_port()
    config = out / f"{door}.toml"
    lines = [f"{name} = {_toml(value)}" for name, value in options.items()]
    config.write_text(
        f'[server]\nport = {port}\ndoor = "{door}"\n[deployments.demo]\nmodel = "{model}"\n'
        "[deployments.demo.options]\n"
        + "\n".join(lines)
        + '\n[deployments.demo.scheduler]\npolicy = "fair"\n'
    )
    return Server(
        door, [sys.executable, "-m", "twinjet.cli", "serve", "--config", str(config)], port, out, {}
    )


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def rust(binary: Path, model: Path, options: dict[str, Any], out: Path) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "demo", "--no-enable-prefix-caching"]
    for name, value in options.items():
        if name != "enable_prefix_caching":
            text = value if isinstance(value, str) else json.dumps(value)
            command += [f"--{name.replace('_', '-')}", text]
    env = {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(binary)}
    return Server("rs", command, port, out, env | {"VLLM_USE_FLASHINFER_SAMPLER": "0"})


def body_for(row: str, mode: str, num_tokens: int) -> bytes:
    if row == "rs":
        settings = {
            "model": "demo",
            "prompt": PROMPT,
            "max_tokens": num_tokens,
            "stream": True,
            "ignore_eos": True,
        }
        return json.dumps(settings | MODES[mode]).encode()
    from twinjet.v1 import generation_pb2, sampling_pb2

    sampling = sampling_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True, **MODES[mode])
    return generation_pb2.GenerateRequest(
        model="demo", token_ids=PROMPT, sampling=sampling
    ).SerializeToString()


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.report: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "shape": options.shape,
            "options": options.options,
            "runs": [],
        }

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def load(
        self, server: Server, mode: str, streams: int, num_tokens: int, requests: int = 0
    ) -> dict[str, Any]:
        body = self.options.out / "body"
        body.write_bytes(body_for(server.name, mode, num_tokens))
        is_rust = server.name == "rs"
        where = "/v1/completions" if is_rust else "/twinjet.v1.InferenceService/Generate"
        command = [str(self.options.load), "--port", str(server.port), "--kind", "sse" if is_rust else "grpc"]
        command += ["--path", where, "--body", str(body), "--streams", str(streams), "--timeout", "60"]
        command += ["--connections", "8", "--requests", str(requests or streams)]
        if not is_rust:
            command += ["--tokens-path", "2.3"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return {"error": done.stderr.strip()[-300:]}
        found: dict[str, Any] = json.loads(done.stdout)
        found["tokens_per_s_in_all"] = round(found["requests"] * num_tokens / found["seconds"], 1)
        found["tokens_per_s"] = (
            round(found["full_tokens"] / found["full_seconds"], 1)
            if not is_rust and found["full_seconds"]
            else found["tokens_per_s_in_all"]
        )
        found["requests_per_s"] = round(found["requests"] / found["seconds"], 1)
        return found

    def wait(self, server: Server) -> bool:
        while self.elapsed() < self.options.start_limit:
            if server.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", server.port), 1).close()
                if self.load(server, "greedy", 1, 4).get("statuses") == {"OK": 1}:
                    print(f"[{self.elapsed():4.0f} s] {server.name} serves", flush=True)
                    return True
            time.sleep(1)
        print(f"{server.name} does not serve: {server.log.read_text()[-1500:]}", flush=True)
        return False

    def run(self, core: Engine, servers: list[Server]) -> None:
        options = self.options
        for number in range(-1, options.rounds):
            for mode in options.modes:
                for streams in options.streams:
                    rows: list[Engine | Server] = [core, *servers]
                    for row in rows[::-1] if number % 2 else rows:
                        if self.elapsed() > options.limit:
                            return
                        if isinstance(row, Engine):
                            found = row.ask(
                                mode=mode, streams=streams, tokens=options.tokens, prompt=32, round=number
                            )
                        else:
                            found = self.load(row, mode, streams, options.tokens)
                        self._keep(number, row.name, mode, streams, found)
        for number in range(-1, options.rounds):
            for server in servers:
                if self.elapsed() < options.limit:
                    found = self.load(server, "greedy", 512, 1, requests=4096)
                    self._keep(number, server.name, "one token", 512, found)

    def _keep(self, number: int, row: str, mode: str, streams: int, found: dict[str, Any]) -> None:
        if found.get("error") or found.get("statuses", {"OK": 0}).keys() != {"OK"}:
            print("error:", row, mode, streams, found, flush=True)
        if number >= 0:
            self.report["runs"].append({"row": row, "mode": mode, "streams": streams, **found})

    def profile(self, server: Server, streams: int) -> None:
        """Have py-spy watch the server's processes while it is loaded."""
        command = ["py-spy", "record", "--native", "--subprocesses", "--format", "raw", "--duration", "6"]
        for name, wanted in (
            ("streams", (streams, self.options.tokens, streams)),
            ("arrivals", (512, 1, 4096)),
        ):
            path = self.options.out / f"{server.name}-{name}.profile"
            watch = subprocess.Popen([*command, "--output", str(path), "--pid", str(server.process.pid)])
            while watch.poll() is None:
                print(f"watched, {name}: {self.load(server, 'greedy', *wanted)}", flush=True)


def summarise(runs: list[dict[str, Any]]) -> list[str]:
    cells: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        if not run.get("error"):
            cells.setdefault((run["mode"], run["streams"]), {}).setdefault(run["row"], []).append(run)
    lines = []
    for (mode, streams), rows in cells.items():
        cores = rows.get("core")
        base = statistics.median(r["tokens_per_s"] for r in cores) if cores else 0.0
        for row, found in rows.items():
            if mode == "one token":
                rate = statistics.median(r["requests_per_s"] for r in found)
                lines.append(f"{mode} {streams} {row}: {rate:,.0f} streams/s, ttft {found[-1]['ttft_ms']} ms")
                continue
            speed = [r["tokens_per_s"] for r in found]
            line = f"{mode} {streams} {row}: {statistics.median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f})"
            if base:
                line += f", {statistics.median(speed) / base:.3f} of the core"
            if row != "core":
                line += f", in all {statistics.median(r['tokens_per_s_in_all'] for r in found):,.0f}"
                line += f", ttft p50 and p99 {found[-1]['ttft_ms']} ms, gaps {found[-1]['gap_ms']} ms"
                line += f", {found[-1]['tokens'] / max(1, found[-1]['messages']):.2f} tokens a message"
                line += f", client {found[-1]['client_cpu_s'] / found[-1]['seconds']:.2f} cores"
            lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load", type=Path, default=Path("build/bench/load"))
    parser.add_argument("--vllm-rs", type=Path)
    parser.add_argument("--options", type=json.loads, default={}, help="more of vLLM's, for all rows: JSON")
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--doors", nargs="+", default=["native", "grpc"], choices=["native", "grpc"])
    parser.add_argument("--streams", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--modes", nargs="+", default=["greedy"], choices=list(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--start-limit", type=float, default=300, help="seconds for all to start")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no run begins")
    parser.add_argument("--profile", action="store_true", help="watch the native row with py-spy at the end")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    servers: list[Server] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_served_shape(options.shape, Path(folder))
        spec = {"model": str(model), "native": "all", "flashinfer": False, "environment": {}, "as_is": True}
        core = Engine("core", spec | {"options": options_for(6_000_000_000, options.options)}, options.out)
        try:
            behind = options_for(8_500_000_000, options.options)
            servers = [twinjet(door, model, behind, options.out) for door in options.doors]
            if options.vllm_rs is not None:
                servers.append(rust(options.vllm_rs, model, behind, options.out))
            bench.report["core"] = core.read()
            print(f"[{bench.elapsed():4.0f} s] core: {bench.report['core']}", flush=True)
            ready = [server for server in servers if bench.wait(server)]
            bench.run(core, ready)
            (options.out / "served.json").write_text(json.dumps(bench.report, indent=1) + "\n")
            print("\n".join(summarise(bench.report["runs"])), flush=True)
            if options.profile and ready and ready[0].name == "native":
                bench.profile(ready[0], max(options.streams))
        finally:
            core.stop()
            for server in servers:
                server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
