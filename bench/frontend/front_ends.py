"""The rows of the bench: each starts a front end with a mock of its own (mock_core.py), and knows how to ask it.

twinjet, with `native` (the native door), `tls` and `limited` (1,000 streams) behind underscores, and @PATH for
another checkout; rs_grpc and rs_http, vLLM's Rust front end; openai, vLLM's Python server; smg and smg_rs,
smg-grpc-servicer, which is what `vllm serve --grpc` runs. peers.sh installs all but the first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mock_core import Control, environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEERS = Path(os.environ.get("PEERS", ROOT / ".cache/frontend-peers"))
PROMPT = list(range(1000, 1032))
START_TIMEOUT_S = 180.0
QUIETS, QUIET_S, QUIET_SHARE = 4, 0.5, 0.03
MAX_MODEL_LEN = 8192
SLOTS = 16384
LIMIT = 1000


@dataclass
class FrontEnd:
    """One row: a running server and how to ask it. body: the request for so many tokens, encoded.

    tokens_path: field numbers that lead from a response to its token ids; "" for server-sent events.
    """

    name: str
    process: subprocess.Popen[bytes]
    port: int
    control: Control
    control_path: Path
    path: str
    tokens_path: str
    body: Callable[[int], bytes]
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    has_tls: bool = False

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

    def mock_cpu_s(self) -> float:
        """Give the CPU time of the mock so far."""
        tasks = Path(f"/proc/{self.control.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def memory_bytes(self) -> int:
        """Give the front end's memory: what is its own, and its share of what it shares."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += next(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss:")) * 1024
        return total

    def load_options(self) -> dict[str, Any]:
        """Give the load client's options that depend on the row alone."""
        options: dict[str, Any] = {"port": self.port, "path": self.path, "control": self.control_path}
        options["kind"] = "grpc" if self.tokens_path else "sse"
        if self.tokens_path:
            options["tokens-path"] = self.tokens_path
        if self.has_tls:
            options["tls"] = 1
        return options


def _imported_from() -> Path:
    found = importlib.util.find_spec("twinjet")
    if found is None or found.origin is None:
        raise RuntimeError("twinjet is neither installed nor on PYTHONPATH")
    return Path(found.origin).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wire(*fields: tuple[int, int | float | str | bytes | list[int]]) -> bytes:
    """Encode a protobuf message whose schema is not at hand.

    An int is a varint, a float a fixed32, a list a packed field of varints.
    """

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    encoded = b""
    for number, value in fields:
        if isinstance(value, int):
            encoded += varint(number << 3) + varint(value)
            continue
        if isinstance(value, float):
            encoded += varint(number << 3 | 5) + struct.pack("<f", value)
            continue
        if isinstance(value, list):
            value = b"".join(map(varint, value))
        elif isinstance(value, str):
            value = value.encode()
        encoded += varint(number << 3 | 2) + varint(len(value)) + value
    return encoded


class Bench:
    """Starts front ends and asks them; their files lie in folder."""

    def __init__(self, folder: Path, model: Path, load: Path) -> None:
        self.folder, self.model, self._load = folder, model, load

    def begin(self, name: str) -> FrontEnd:
        """Start a row's server. Raises ValueError for a name that is none."""
        what = name.partition("@")[0]
        if what in ("rs_grpc", "rs_http"):
            return self._rust(what)
        if what in ("smg", "smg_rs"):
            return self._smg(what)
        if what == "openai":
            return self._openai(what)
        first, *rest = what.split("_")
        if first != "twinjet" or set(rest) - {"native", "tls", "limited"}:
            raise ValueError(f"there is no row {name}")
        return self._twinjet(name, set(rest))

    def load(self, end: FrontEnd, num_tokens: int, streams: int, **options: Any) -> dict[str, Any]:
        """Run the load client once; gives what it printed."""
        with self.loading(end, num_tokens, streams, **options) as client:
            out, error = client.communicate()
        if client.returncode != 0:
            raise RuntimeError(f"the load client failed on {end.name}: {error.strip()}")
        result: dict[str, Any] = json.loads(out)
        return result

    def loading(self, end: FrontEnd, num_tokens: int, streams: int, **options: Any) -> subprocess.Popen[str]:
        """Start the load client."""
        body = self.folder / "body"
        body.write_bytes(end.body(num_tokens))
        values = {"body": body, "streams": streams, "connections": 1 if streams == 1 else 8}
        command = [str(self._load)]
        for key, value in (values | end.load_options() | options).items():
            command += [f"--{key}", str(value)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

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

    def _twinjet(self, name: str, kinds: set[str]) -> FrontEnd:
        tree = Path(name.partition("@")[2] or ROOT)
        # Its own row runs what this process would import: in a checkout that is not built, what is installed.
        package = tree / "python" if "@" in name else _imported_from()
        label = name.replace("/", "_")
        control, path = self._control(label)
        port = free_port()
        options = {"max_num_seqs": SLOTS, "max_model_len": MAX_MODEL_LEN, "enable_prefix_caching": False}
        options["max_num_batched_tokens"] = SLOTS
        server: dict[str, Any] = {"port": port, "door": "native" if "native" in kinds else "grpc"}
        if "limited" in kinds:
            server["max_streams"] = LIMIT
        if "tls" in kinds:
            server["tls_cert"], server["tls_key"] = map(str, self._certificate())
        sections = {
            "server": server,
            "deployments.demo": {"model": str(self.model)},
            "deployments.demo.options": options,
            "deployments.demo.scheduler": {"max_waiting": 0},
        }
        config = self.folder / f"{label}.toml"
        config.write_text(
            "".join(
                f"[{title}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
                for title, values in sections.items()
            )
        )
        env = environment(path, self.model / "tokenizer.json")
        env["PYTHONPATH"] = os.pathsep.join([str(package), str(HERE)])
        command = [sys.executable, str(tree / "bench/frontend/twinjet_server.py"), "--config", str(config)]
        process = self._spawn(label, command, env)

        return FrontEnd(
            name, process, port, control, path, TWINJET_PATH, "2.3", twinjet_body, has_tls="tls" in kinds
        )

    def _certificate(self) -> tuple[Path, Path]:
        certificate, key = self.folder / "server.crt", self.folder / "server.key"
        if not key.exists():
            command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
            command += ["-subj", "/CN=localhost", "-out", str(certificate), "-keyout", str(key)]
            subprocess.run(command, check=True, capture_output=True)
        return certificate, key

    def _rust(self, name: str) -> FrontEnd:
        """Start vLLM's Rust front end on two ipc listeners, as vLLM's own supervisor does."""
        binary = os.environ.get("VLLM_RS", str(PEERS / "vllm-rs"))
        control, path = self._control(name)
        http, grpc = (socket.create_server(("127.0.0.1", 0), backlog=4096) for _ in range(2))
        listeners = []
        for end in ("input", "output"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.folder / f"{name}.{end}"))
            listener.listen(128)
            listeners.append(listener)
        arguments = {
            "model_tag": str(self.model), "max_model_len": MAX_MODEL_LEN, "served_model_name": ["demo"],
            "engine_ready_timeout_secs": 600, "http_timeout_keep_alive": 60,
        }  # fmt: skip
        flags = ("--listen-fd", "--grpc-listen-fd", "--input-listener-fd", "--output-listener-fd")
        fds = [x.fileno() for x in (http, grpc, *listeners)]
        command = [binary, "frontend"]
        for flag, fd in zip(flags, fds, strict=True):
            command += [flag, str(fd)]
        command += ["--args-json", json.dumps(arguments)]
        process = self._spawn(name, command, {}, pass_fds=fds)
        mock = self._mock(
            name, path, [f"--{end}=ipc://{self.folder}/{name}.{end}" for end in ("input", "output")]
        )
        port = (grpc if name == "rs_grpc" else http).getsockname()[1]
        for held in (http, grpc, *listeners):
            held.close()

        if name == "rs_http":
            return FrontEnd(
                name, process, port, control, path, "/v1/completions", "", completions_body, [mock]
            )
        where = "/vllm.Inference/GenerateStream"
        return FrontEnd(name, process, port, control, path, where, "2.4", rust_body, [mock])

    def _openai(self, name: str) -> FrontEnd:
        more = ["--served-model-name", "demo", "--disable-uvicorn-access-log"]
        server = self._vllm(name, "openai", more, {})
        return FrontEnd(name, *server, "/v1/completions", "", completions_body)

    def _smg(self, name: str) -> FrontEnd:
        env = {"SMG_VLLM_SERVICER_IMPL": "rust" if name == "smg_rs" else "python"}
        server = self._vllm(name, "grpc", [], env)
        return FrontEnd(name, *server, SMG_PATH, "1.1", smg_body)

    def _vllm(
        self, name: str, kind: str, more: list[str], env: dict[str, str]
    ) -> tuple[subprocess.Popen[bytes], int, Control, Path]:
        control, path = self._control(name)
        port = free_port()
        env = environment(path, self.model / "tokenizer.json") | env | {"PYTHONPATH": str(HERE)}
        command = [str(PEERS / "bin/python"), str(HERE / "vllm_server.py"), kind]
        command += ["--model", str(self.model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--max-model-len", str(MAX_MODEL_LEN), *more]
        return self._spawn(name, command, env), port, control, path

    def _mock(self, name: str, control: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(HERE / "mock_core.py"), *arguments, f"--max-model-len={MAX_MODEL_LEN}"]
        return self._spawn(f"{name}.mock", command, environment(control, self.model / "tokenizer.json"))


REQUEST_ID = "@@@@@@@@@@@@"
"""The load client makes it another one for each request, and the mock knows the request by it."""


def completions_body(num_tokens: int) -> bytes:
    """Ask OpenAI's completions."""
    return json.dumps(
        {
            "model": "demo", "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "request_id": REQUEST_ID,
        }
    ).encode()  # fmt: skip


TWINJET_PATH = "/twinjet.v1.InferenceService/Generate"
SMG_PATH = "/vllm.grpc.engine.VllmEngine/Generate"


def twinjet_body(num_tokens: int, top_p: float = 0.0) -> bytes:
    """Ask twinjet.v1, for text and token ids; top_p 0 is greedy."""
    from google.protobuf import json_format

    from twinjet.v1 import generation_pb2

    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True}
    if top_p:
        sampling |= {"temperature": 1.0, "top_p": top_p}
    message = json_format.ParseDict(
        {"model": "demo", "token_ids": PROMPT, "sampling": sampling, "options": {"request_id": REQUEST_ID}},
        generation_pb2.GenerateRequest(),
    )
    return message.SerializeToString()


def rust_body(num_tokens: int) -> bytes:
    """Ask vllm.Inference, for text and token ids."""
    stopping = wire((1, num_tokens), (6, 1))
    response = wire((5, 1))
    return wire((1, REQUEST_ID), (2, "demo"), (4, wire((1, PROMPT))), (5, 0.0), (8, stopping), (9, response))


def smg_body(num_tokens: int, top_p: float = 0.0) -> bytes:
    """Ask vllm.grpc.engine.VllmEngine, which gives token ids and no text; top_p 0 is greedy."""
    temperature = 1.0 if top_p else 0.0
    sampling = wire((1, temperature), (2, top_p or 1.0), (7, 1.0), (8, num_tokens), (14, 1), (15, 1))
    return wire((1, REQUEST_ID), (2, wire((2, PROMPT))), (4, sampling), (5, 1))


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


@contextlib.contextmanager
def started(bench: Bench, names: list[str]) -> Iterator[list[FrontEnd]]:
    """Start front ends one after the other; end them and their mocks afterwards, also when a signal ends the run."""
    ends: list[FrontEnd] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for name in names:
            ends.append(bench.begin(name))
            wait_serving(bench, ends[-1])
            print(f"{name} serves", file=sys.stderr, flush=True)
        yield ends
    finally:
        for end in ends:
            for process in [end.process, *end.others]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
