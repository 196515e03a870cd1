"""What a front end costs, measured behind a mock of vLLM's engine core: `make bench-frontend`.

Starts each front end with a mock of its own, then runs the cells in turn, so that noise of the machine meets
all of them; prints medians and writes JSON. CPU is what the kernel's scheduler counted for the front end's
processes (schedstat of every thread), without the mock and without the client.

Cells:
  lockstep  the next token of all streams comes when the client has the last one: CPU a token, one a message
  free      the engine never waits: CPU a token and tokens a second, with the merging that comes of it
  starts    streams of one token, 64 at a time: CPU a request and new streams a second
  paced     a token every 20 ms in every stream, evenly spaced arrivals at half the rate: TTFT and gaps
  memory    all streams open and silent: bytes a stream

    python bench/frontend/run.py --rows twinjet,rs_http --streams 1,32,256 --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mock_core import Control, environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROMPT = list(range(1000, 1032))
START_TIMEOUT_S = 180.0
QUIETS, QUIET_S, QUIET_SHARE = 4, 0.5, 0.03
MAX_MODEL_LEN = 8192
SLOTS = 16384


@dataclass
class FrontEnd:
    """One row: a running server and how to ask it. body: the request for so many tokens, encoded."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    control: Control
    control_path: Path
    kind: str
    path: str
    tokens_path: str
    body: Callable[[int], bytes]
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def pids(self) -> list[int]:
        """List the processes of the front end, without the mock."""
        found, todo = [], [self.process.pid]
        while todo:
            pid = todo.pop()
            if pid == self.control.pid:
                continue
            found.append(pid)
            with contextlib.suppress(FileNotFoundError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    todo += map(int, (task / "children").read_text().split())
        return found

    def cpu_s(self) -> float:
        """Give the CPU time of the front end so far."""
        total = 0
        for pid in self.pids():
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def memory_bytes(self) -> int:
        """Give the front end's memory: what is its own, and its share of what it shares."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += next(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss:")) * 1024
        return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Bench:
    """The front ends under test and where their files lie."""

    def __init__(self, folder: Path, model: Path, load: Path, python: str) -> None:
        self.folder, self.model, self._load, self._python = folder, model, load, python

    def _control(self, name: str) -> tuple[Control, Path]:
        path = self.folder / f"{name}.control"
        return Control.create(path), path

    def _spawn(
        self, name: str, command: list[str], env: dict[str, str], **more: Any
    ) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("wb")
        return subprocess.Popen(
            command,
            env=os.environ | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **more,
        )

    def twinjet(self, name: str) -> FrontEnd:
        """Start Twinjet, as twinjet_native with its own gRPC door. A checkout of another state: twinjet@PATH."""
        from google.protobuf import json_format

        tree = Path(name.partition("@")[2] or ROOT)
        sys.path.insert(0, str(ROOT / "python"))
        from twinjet.v1 import generation_pb2

        control, path = self._control(name.replace("/", "_"))
        port = free_port()
        options = {"max_num_seqs": SLOTS, "max_model_len": MAX_MODEL_LEN, "enable_prefix_caching": False}
        options["max_num_batched_tokens"] = SLOTS
        config = self.folder / f"{port}.toml"
        door = 'door = "native"\n' if name.startswith("twinjet_native") else ""
        lines = [f"{k} = {json.dumps(v)}" for k, v in options.items()]
        config.write_text(
            f'[server]\nport = {port}\n{door}[deployments.demo]\nmodel = "{self.model}"\n'
            "[deployments.demo.options]\n" + "\n".join(lines) + "\n[deployments.demo.scheduler]\n"
            "max_waiting = 0\n"
        )
        env = environment(path, self.model / "tokenizer.json")
        env["PYTHONPATH"] = os.pathsep.join([str(tree / "python"), str(HERE)])
        process = self._spawn(
            name.replace("/", "_"),
            [self._python, str(tree / "bench/frontend/twinjet_server.py"), "--config", str(config)],
            env,
        )

        def body(num_tokens: int) -> bytes:
            sampling = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True}
            message = json_format.ParseDict(
                {"model": "demo", "token_ids": PROMPT, "sampling": sampling}, generation_pb2.GenerateRequest()
            )
            return message.SerializeToString()

        return FrontEnd(
            name, process, port, control, path, "grpc", "/twinjet.v1.InferenceService/Generate", "2.3", body
        )

    def rs(self, name: str) -> FrontEnd:
        """Start vLLM's Rust front end on two ipc listeners, as vLLM's own supervisor does."""
        binary = os.environ.get("VLLM_RS", "vllm-rs")
        control, path = self._control(name)
        http = socket.create_server(("127.0.0.1", 0))
        listeners = []
        for end in ("input", "output"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.folder / f"{name}.{end}"))
            listener.listen(128)
            listeners.append(listener)
        fds = [x.fileno() for x in (http, *listeners)]
        arguments = {
            "model_tag": str(self.model), "max_model_len": MAX_MODEL_LEN, "served_model_name": ["demo"],
            "engine_ready_timeout_secs": 600, "http_timeout_keep_alive": 60,
        }  # fmt: skip
        flags = ("--listen-fd", "--input-listener-fd", "--output-listener-fd")
        command = [binary, "frontend"]
        for flag, fd in zip(flags, fds, strict=True):
            command += [flag, str(fd)]
        command += ["--args-json", json.dumps(arguments)]
        process = self._spawn(name, command, {}, pass_fds=fds)
        mock = self._mock(
            name, path, [f"--{end}=ipc://{self.folder}/{name}.{end}" for end in ("input", "output")]
        )
        port = http.getsockname()[1]
        for held in (http, *listeners):
            held.close()
        where = "/v1/completions"
        return FrontEnd(name, process, port, control, path, "sse", where, "", completions_body, [mock])

    def openai(self, name: str) -> FrontEnd:
        """Start vLLM's OpenAI server; a sitecustomize folder puts the mock in its engine's place."""
        control, path = self._control(name)
        port = free_port()
        env = environment(path, self.model / "tokenizer.json")
        env |= {"PYTHONPATH": str(HERE), "VLLM_PLUGINS": ""}
        command = [self._python, str(HERE / "openai_server.py"), "--model", str(self.model)]
        command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--disable-uvicorn-access-log"]
        process = self._spawn(name, command, env)
        where = "/v1/completions"
        return FrontEnd(name, process, port, control, path, "sse", where, "", completions_body)

    def _mock(self, name: str, control: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [self._python, str(HERE / "mock_core.py"), *arguments, f"--max-model-len={MAX_MODEL_LEN}"]
        return self._spawn(f"{name}.mock", command, environment(control, self.model / "tokenizer.json"))

    def load(self, end: FrontEnd, num_tokens: int, streams: int, **options: Any) -> dict[str, Any]:
        """Run the load client once; gives what it printed."""
        body = self.folder / "body"
        body.write_bytes(end.body(num_tokens))
        values = {
            "port": end.port, "kind": end.kind, "path": end.path, "body": body, "streams": streams,
            "connections": 1 if streams == 1 else 8, "control": end.control_path,
        } | options  # fmt: skip
        if end.tokens_path:
            values["tokens-path"] = end.tokens_path
        command = [str(self._load)]
        for key, value in values.items():
            command += [f"--{key}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the load client failed on {end.name}: {done.stderr.strip()}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def completions_body(num_tokens: int) -> bytes:
    return json.dumps(
        {
            "model": "demo", "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True,
        }
    ).encode()  # fmt: skip


def wait_serving(bench: Bench, end: FrontEnd) -> None:
    """Wait until one stream went through."""
    deadline = time.monotonic() + START_TIMEOUT_S
    end.control.put("lockstep", 0)
    error = ""
    while time.monotonic() < deadline:
        if end.process.poll() is not None:
            raise RuntimeError(f"{end.name} ended with code {end.process.returncode}; see its log")
        with contextlib.suppress(RuntimeError, ConnectionError):
            with socket.create_connection(("127.0.0.1", end.port), 1):
                pass
            result = bench.load(end, 4, 1, timeout=5)
            if result["statuses"] == {"OK": 1} and result["tokens"] == 4:
                wait_quiet(end, deadline)
                return
            error = json.dumps(result)
        time.sleep(0.5)
    raise RuntimeError(f"{end.name} did not serve within {START_TIMEOUT_S:.0f} s: {error}")


def wait_quiet(end: FrontEnd, deadline: float) -> None:
    """Wait until what a start leaves to do in the background is done: Twinjet writes a vocabulary for grammars."""
    before, num_quiet = end.cpu_s(), 0
    while num_quiet < QUIETS and time.monotonic() < deadline:
        time.sleep(QUIET_S)
        now = end.cpu_s()
        num_quiet = num_quiet + 1 if now - before < QUIET_SHARE * QUIET_S else 0
        before = now


def cell(bench: Bench, end: FrontEnd, mode: str, streams: int, num_tokens: int) -> dict[str, Any]:
    """Run one cell once."""
    control = end.control
    control.put("received", 0)
    control.put("emitted", 0)
    control.put("lockstep", int(mode == "lockstep"))
    control.put("step_us", 20_000 if mode == "paced" else 0)
    control.put("gather", streams if mode in ("lockstep", "free") else 1)
    options: dict[str, Any] = {"timeout": 100}
    if mode == "starts":
        num_tokens, options["requests"] = 1, streams * 20
    if mode == "paced":
        # On average half of the streams are open: each takes num_tokens steps.
        options |= {"rate": streams / 2 / (num_tokens * 0.02), "requests": streams * 2}
    if mode == "memory":
        return memory(bench, end, streams)
    before = end.cpu_s()
    result = bench.load(end, num_tokens, streams, **options)
    cpu = end.cpu_s() - before
    if result["statuses"] != {"OK": result["requests"]} and mode != "flood":
        raise RuntimeError(f"{end.name}, {mode}, {streams} streams: {result}")
    return result | {
        "cpu_s": cpu,
        "us_per_token": 1e6 * cpu / max(1, result["tokens"]),
        "us_per_request": 1e6 * cpu / max(1, result["done"]),
        "tokens_per_s": result["tokens"] / result["seconds"],
        "requests_per_s": result["done"] / result["seconds"],
        "tokens_per_message": result["tokens"] / max(1, result["messages"]),
    }


def memory(bench: Bench, end: FrontEnd, streams: int) -> dict[str, Any]:
    """Hold streams open before their first token and see what they weigh."""
    end.control.put("gather", 1 << 40)
    start, before = end.control.num_requests, end.memory_bytes()
    body = bench.folder / "body"
    body.write_bytes(end.body(2))
    command = [
        str(bench._load),
        "--port",
        str(end.port),
        "--kind",
        end.kind,
        "--path",
        end.path,
        "--body",
        str(body),
    ]
    command += ["--streams", str(streams), "--connections", "8", "--control", str(end.control_path)]
    command += ["--timeout", "90"] + (["--tokens-path", end.tokens_path] if end.tokens_path else [])
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        deadline = time.monotonic() + 60
        while end.control.num_requests - start < streams and time.monotonic() < deadline:
            time.sleep(0.05)
        arrived = end.control.num_requests - start
        held = end.memory_bytes() - before
        end.control.put("gather", 1)
        out, _ = client.communicate()
    return {"streams_open": arrived, "bytes_per_stream": held / max(1, arrived), **json.loads(out)}


TOKENS = {1: 256, 32: 256, 256: 64, 1024: 32, 8192: 8}
SHOWN = {
    "lockstep": ("us_per_token", "tokens_per_message"), "free": ("us_per_token", "tokens_per_s", "tokens_per_message"),
    "starts": ("us_per_request", "requests_per_s"), "paced": ("ttft_ms", "gap_ms"),
    "memory": ("bytes_per_stream",),
}  # fmt: skip


def summary(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    if isinstance(values[0], list):
        return " / ".join(f"{statistics.median(v[i] for v in values):.1f}" for i in range(2))
    return f"{statistics.median(values):,.1f} [{min(values):,.1f}-{max(values):,.1f}]"


@contextlib.contextmanager
def started(bench: Bench, names: list[str]) -> Iterator[list[FrontEnd]]:
    """Start front ends one after the other; end them and their mocks afterwards."""
    ends: list[FrontEnd] = []
    try:
        for name in names:
            begin = {"twinjet": bench.twinjet, "rs": bench.rs, "openai": bench.openai}
            ends.append(begin[name.partition("@")[0].partition("_")[0]](name))
            wait_serving(bench, ends[-1])
            print(f"{name} serves", file=sys.stderr, flush=True)
        yield ends
    finally:
        for end in ends:
            for process in [end.process, *end.others]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="twinjet", help="twinjet[@PATH], twinjet_native[@PATH], rs_http, openai"
    )
    parser.add_argument("--streams", default="1,32,256")
    parser.add_argument("--modes", default="lockstep,free,starts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=None, help="folder; default: the demo model")
    parser.add_argument("--load", type=Path, default=ROOT / "build/bench/load")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--keep-logs", type=Path, default=None)
    options = parser.parse_args()
    model = options.model
    if model is None:
        sys.path.insert(0, str(ROOT / "python"))
        from twinjet.models.demo import demo_model

        model = demo_model()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-frontend-") as folder:
        bench = Bench(Path(folder), model, options.load, sys.executable)
        try:
            with started(bench, options.rows.split(",")) as ends:
                for _ in range(options.rounds):
                    for mode in options.modes.split(","):
                        for streams in map(int, options.streams.split(",")):
                            for end in ends:
                                result = cell(bench, end, mode, streams, TOKENS.get(streams, 32))
                                runs.setdefault(f"{end.name} {mode} {streams}", []).append(result)
                resting = {end.name: end.memory_bytes() for end in ends}
        finally:
            if options.keep_logs is not None:
                options.keep_logs.mkdir(parents=True, exist_ok=True)
                for log in Path(folder).glob("*.log"):
                    shutil.copy(log, options.keep_logs)
    for name, found in runs.items():
        shown = ", ".join(f"{key} {summary(found, key)}" for key in SHOWN[name.split()[1]])
        print(f"{name}: {shown}")
    for name, size in resting.items():
        print(f"{name}: {size / 2**20:.0f} MiB")
    if options.out is not None:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "at": time.strftime("%Y-%m-%d %H:%M")}
        options.out.write_text(json.dumps({"machine": machine, "memory": resting, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
