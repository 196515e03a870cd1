"""A stand-in for vLLM's engine core: its handshake, its sockets and its messages, and no model.

A front end cannot tell it from the real one by what it receives. Every step gives each running request one
token, always a lower-case word of the tokenizer. All that a step needs is encoded when the request comes, so
the mock costs a tenth of a microsecond a token and never is what a measurement waits for. It reads and writes its
sockets itself: libzmq's thread at this end would count as the front end's time.

Runs in a process of its own: `run` takes the arguments of vLLM's `EngineCoreProc.run_engine_core`, `main`
connects to sockets that exist already. What it does is read from a control page (see `Control`) at every step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import re
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

_CONTROL_ENV = "MOCK_CORE_CONTROL"
_TOKENIZER_ENV = "MOCK_CORE_TOKENIZER"

_ADD, _ABORT, _UTILITY = b"\x00", b"\x01", b"\x03"
_FINISHED_LENGTH = 1
_POLL_S = 20e-6
_OUTPUTS_A_LOOK = 64

SCHEDULER_STATS: dict[str, Any] = {
    "num_running_reqs": 0, "num_waiting_reqs": 0, "num_skipped_waiting_reqs": 0, "num_kv_fetch_reqs_by_stage": {},
    "step_counter": 0, "current_wave": 0, "kv_cache_usage": 0.0, "iteration_details": None,
    "prefix_cache_stats": {
        "reset": False, "requests": 0, "queries": 0, "hits": 0, "preempted_requests": 0, "preempted_queries": 0,
        "preempted_hits": 0,
    },
    "connector_prefix_cache_stats": None, "kv_cache_eviction_events": [], "spec_decoding_stats": None,
    "kv_connector_stats": None, "ec_connector_stats": None, "waiting_lora_adapters": {},
    "running_lora_adapters": {}, "cudagraph_stats": None, "perf_stats": None,
}  # fmt: skip
"""Every field of vLLM's SchedulerStats; `vllm-rs` refuses a message that lacks one."""

_pack = msgspec.msgpack.Encoder().encode


def _zmtp() -> Any:
    """Give Twinjet's module by its file: some front ends here have no Twinjet."""
    path = Path(__file__).parents[2] / "python/twinjet/engines/vllm/front/zmtp.py"
    spec = importlib.util.spec_from_file_location("zmtp", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zmtp = _zmtp()


def _connected(address: str) -> socket.socket:
    """Connect to an address of ZeroMQ's kind."""
    kind, _, where = address.partition("://")
    if kind == "ipc":
        made = socket.socket(socket.AF_UNIX)
        made.connect(where)
    else:
        host, _, port = where.rpartition(":")
        made = socket.create_connection((host.strip("[]"), int(port)))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setblocking(False)
    return made


class Control:
    """A page that the mock, the load client and the harness share.

    received: tokens that the client has counted, written by it. emitted: tokens that the mock has sent. Both
    only grow. gather: requests to wait for before the first step of a batch. step_us: time between the
    tokens of a stream; its first one comes at once, so that what a client waits for it is the front end's.
    lockstep: a step begins only when the client has every token of the one before. pid: the mock's, written by
    it, so that its work is not counted as the front end's. run: six digits with which the clients' request ids
    begin; six more are the request's number, from FIRST_OF_PROBE up if the probe sent it.

    Behind the fields lie two stamps for each number, in ns of the monotonic clock, written by the mock: when it had
    the request, and when it sent the first token. The load's numbers have one half of them, the probe's the other.
    """

    NUM_STAMPS = 1 << 16
    FIRST_OF_PROBE = 500_000
    STAMPS_AT = 4096
    SIZE = STAMPS_AT + NUM_STAMPS * 16
    _FIELDS = ("received", "emitted", "gather", "step_us", "lockstep", "num_requests", "pid", "run")

    def __init__(self, path: Path | str) -> None:
        with open(path, "r+b") as file:
            self._page = mmap.mmap(file.fileno(), self.SIZE)

    @classmethod
    def create(cls, path: Path) -> Control:
        path.write_bytes(bytes(cls.SIZE))
        return cls(path)

    def __getattr__(self, name: str) -> int:
        value: int = struct.unpack_from("=Q", self._page, 8 * self._FIELDS.index(name))[0]
        return value

    def put(self, name: str, value: int) -> None:
        """Write one field."""
        struct.pack_into("=Q", self._page, 8 * self._FIELDS.index(name), value)

    def row_of(self, request_id: str) -> int | None:
        """Give the row of a request's stamps; None if it is not of a client that numbers them."""
        at = request_id.find(f"{self.run:06d}")
        digits = request_id[at + 6 : at + 12]
        if at < 0 or len(digits) != 6 or not digits.isdigit():
            return None
        half, number = self.NUM_STAMPS // 2, int(digits)
        return number % half if number < self.FIRST_OF_PROBE else half + (number - self.FIRST_OF_PROBE) % half

    def stamp(self, row: int, index: int, at_ns: int) -> None:
        """Write the first or second stamp of a request."""
        struct.pack_into("=Q", self._page, self.STAMPS_AT + 16 * row + 8 * index, at_ns)


def word_tokens(tokenizer: Path) -> list[int]:
    """List the ids whose text is a space and a lower-case word."""
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    words = [index for text, index in vocabulary.items() if re.fullmatch("Ġ[a-z]{2,8}", text)]
    if not words:
        raise ValueError(f"{tokenizer} has no byte-level words")
    return sorted(words)


class _Stream:
    """One request: the encoded beginning of its outputs, and how many tokens it still gets."""

    __slots__ = ("head", "left", "num_prompt_tokens", "request_id", "row", "word")

    def __init__(self, request_id: str, max_tokens: int, num_prompt_tokens: int, row: int | None) -> None:
        self.request_id = request_id
        self.row = row
        # EngineCoreOutput is an array of 18 fields.
        self.head = b"\xdc\x00\x12" + _pack(request_id) + b"\x91"
        self.left = max_tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.word = hash(request_id) & 0xFFFF


def _tail(
    finish: int | None = None, events: list[Any] | None = None, prefill: dict[str, int] | None = None
) -> bytes:
    """Encode what follows the token ids in an output."""
    fields: list[Any] = [None] * 16
    fields[3], fields[5], fields[9], fields[11] = finish, events, prefill, 0
    return b"".join(map(_pack, fields))


class MockCore:
    """Serves one client of the engine core, until its process is killed."""

    def __init__(self, control: Control, words: list[int]) -> None:
        self._control = control
        control.put("pid", os.getpid())
        self._tokens = [_pack(word) for word in words]
        self._plain, self._finished = _tail(), _tail(_FINISHED_LENGTH)
        self._running: dict[str, _Stream] = {}
        self._waiting: deque[_Stream] = deque()
        self._step = 0
        self._is_gathering = True
        self._next_step = 0.0

    def connect(self, input_address: str, output_address: str, ready: dict[str, Any]) -> None:
        """Connect to a front end's sockets and tell it that the engine is ready."""
        self._input = zmtp.Connection(_connected(input_address), "DEALER", "ROUTER", b"\x00\x00")
        self._output = zmtp.Connection(_connected(output_address), "PUSH", "PULL")
        for end in (self._input, self._output):
            poll = select.poll()
            poll.register(end.fileno(), select.POLLIN)
            while not end.is_ready:
                poll.poll()
                end.fill()
        self._poll = select.poll()
        self._poll.register(self._input.fileno(), select.POLLIN)
        self._input.send([[_pack(ready)]])

    def serve(self) -> None:
        """Answer and step, for ever. Raises ConnectionError when the front end is gone."""
        while True:
            has_work = bool(self._running or self._waiting)
            if self._has_requests(self._idle_ms() if has_work else None):
                self._receive()
            if not self._running and not self._waiting:
                continue
            if self._may_step():
                self._next_step = time.monotonic() + self._control.step_us * 1e-6
                self._make_step()
            elif self._waiting and not self._is_gathering and self._control.step_us:
                self._emit([])
            else:
                time.sleep(_POLL_S)

    def _has_requests(self, limit_ms: int | None) -> bool:
        """Wait for some, and send meanwhile what the front end had no room for."""
        while self._output.has_unsent:
            self._output.flush()
            if limit_ms is not None or not self._output.has_unsent:
                break
            time.sleep(_POLL_S)
        return bool(self._poll.poll(limit_ms))

    def _idle_ms(self) -> int:
        """Give for how long nothing is to be done but to receive; a mock that spins takes the front end's core."""
        if not self._control.step_us or self._waiting or self._is_gathering:
            return 0
        return max(0, int(1e3 * (self._next_step - time.monotonic())))

    def _receive(self) -> None:
        self._input.fill()
        now = time.monotonic_ns()
        while (message := self._input.take()) is not None:
            kind, payload, *_ = message
            request = msgspec.msgpack.decode(payload, strict=False)
            if kind == _ADD:
                params = request[3] or {}
                row = self._control.row_of(request[0])
                if row is not None:
                    self._control.stamp(row, 0, now)
                stream = _Stream(request[0], params.get("max_tokens", 16), len(request[1] or ()), row)
                self._waiting.append(stream)
                self._control.put("num_requests", self._control.num_requests + 1)
            elif kind == _ABORT:
                self._abort(set(request))
            elif kind == _UTILITY:
                _, call_id, method, _ = request
                self._send(utility=[call_id, None, [None, _utility_result(method)]])

    def _abort(self, ids: set[str]) -> None:
        self._waiting = deque(stream for stream in self._waiting if stream.request_id not in ids)
        for request_id in ids & self._running.keys():
            del self._running[request_id]

    def _may_step(self) -> bool:
        control = self._control
        if self._is_gathering:
            if len(self._waiting) + len(self._running) < control.gather:
                return False
            self._is_gathering = False
        if control.lockstep and control.received < control.emitted:
            return False
        return time.monotonic() >= self._next_step

    def _make_step(self) -> None:
        self._emit(list(self._running.values()))

    def _emit(self, decoding: list[_Stream]) -> None:
        """Give each of these streams a token, and those that wait their first."""
        self._step += 1
        parts = list(self._starts())
        tokens, plain, step = self._tokens, self._plain, self._step
        count = len(tokens)
        ended = []
        for index, stream in enumerate(decoding, 1):
            # A real engine core takes requests in a thread of its own: what comes meanwhile is not stamped late.
            if index % _OUTPUTS_A_LOOK == 0 and self._poll.poll(0):
                self._receive()
            stream.left -= 1
            parts.append(stream.head)
            parts.append(tokens[(stream.word + step * 7919) % count])
            if stream.left:
                parts.append(plain)
            else:
                parts.append(self._finished)
                ended.append(stream.request_id)
        num_outputs = len(parts) // 3
        for stream in self._started:
            self._running[stream.request_id] = stream
        for request_id in ended:
            self._running.pop(request_id, None)
        for stream in self._started:
            if not stream.left:
                self._running.pop(stream.request_id, None)
                ended.append(stream.request_id)
        self._control.put("emitted", self._control.emitted + num_outputs)
        now = time.monotonic_ns()
        for stream in self._started:
            if stream.row is not None:
                self._control.stamp(stream.row, 1, now)
        self._send(parts, num_outputs, ended)
        if not self._running and not self._waiting:
            self._is_gathering = True

    def _starts(self) -> Iterator[bytes]:
        """Give the first outputs of the requests that waited; they run from then on."""
        self._started = list(self._waiting)
        self._waiting.clear()
        now = time.monotonic()
        events = [[1, now], [2, now]]
        names = ("type", "timestamp")
        for stream in self._started:
            stream.left -= 1
            prompt = {
                "num_prompt_tokens": stream.num_prompt_tokens, "num_computed_tokens": stream.num_prompt_tokens,
                "num_cached_tokens": 0, "num_local_cached_tokens": 0, "num_external_cached_tokens": 0,
                "num_cache_creation_tokens": 0,
            }  # fmt: skip
            yield stream.head
            yield self._tokens[(stream.word + self._step * 7919) % len(self._tokens)]
            finish = None if stream.left else _FINISHED_LENGTH
            yield _tail(finish, [dict(zip(names, event, strict=True)) for event in events], prompt)

    def _send(
        self,
        parts: list[bytes] | None = None,
        num_outputs: int = 0,
        ended: list[str] | None = None,
        utility: list[Any] | None = None,
    ) -> None:
        """Send an EngineCoreOutputs, an array of 9 fields."""
        stats = None
        if utility is None:
            stats = SCHEDULER_STATS | {"num_running_reqs": len(self._running), "step_counter": self._step}
        message = [b"\x99\x00", b"\xdd" + num_outputs.to_bytes(4, "big"), *(parts or ())]
        message += [_pack(stats), _pack(time.monotonic()), _pack(utility), _pack(ended or None)]
        message.append(b"\xc0\xc0\xc0")
        self._output.send([[b"".join(message)]])


def _utility_result(method: str) -> Any:
    return {
        "get_supported_tasks": ["generate"],
        "collective_rpc": [{"spec_version": 0, "target": "", "counters": {}, "reason": "a mock"}],
        "twinjet_scheduler_status": {
            "vllm_version": "mock",
            "block_manager": {"is_native": False, "reason": "off", "detail": "a mock"},
            "decode_path": {"is_native": False, "reason": "off", "detail": "a mock"},
            "prefix_hash": {"is_native": False, "reason": "off", "detail": "a mock"},
            "counters": {},
        },
        "reset_prefix_cache": True,
        "is_sleeping": False,
        "is_scheduler_paused": False,
    }.get(method)


def ready_response(max_model_len: int, max_num_seqs: int = 1 << 20) -> dict[str, Any]:
    """Make vLLM's EngineCoreReadyResponse of an engine that holds everything."""
    return {
        "max_model_len": max_model_len, "num_gpu_blocks": 1 << 22, "block_size": 32, "dp_stats_address": None,
        "dtype": "float32", "vllm_version": "0.32.0", "world_size": 1, "data_parallel_size": 1,
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1,
        "data_parallel_rank": 0, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": 1 << 20,
        "instance_id": "mock", "supports_lora": False, "max_loras": 0, "mamba_block_size": None,
        "kv_cache_size_tokens": 1 << 27, "kv_cache_max_concurrency": 1e4, "kv_events_config": None,
        "weight_transfer_backend": None, "enable_sleep_mode": False, "supports_draft_weight_updates": False,
        "effective_attention_block_size": 32,
    }  # fmt: skip


def _make() -> MockCore:
    words = word_tokens(Path(os.environ[_TOKENIZER_ENV]))
    return MockCore(Control(os.environ[_CONTROL_ENV]), words)


def run(*, handshake_address: str, vllm_config: Any = None, max_model_len: int = 8192, **_: Any) -> None:
    """Take the place of vLLM's EngineCoreProc.run_engine_core: shake hands, then serve."""
    if vllm_config is not None:
        max_model_len = vllm_config.model_config.max_model_len
    core = _make()
    handshake = zmq.Context.instance().socket(zmq.DEALER)
    handshake.setsockopt(zmq.IDENTITY, b"\x00\x00")
    handshake.connect(handshake_address)
    handshake.send(_pack({"status": "HELLO", "local": True, "headless": False}))
    addresses = msgspec.msgpack.decode(handshake.recv())["addresses"]
    core.connect(addresses["inputs"][0], addresses["outputs"][0], ready_response(max_model_len))
    handshake.send(_pack({"status": "READY", "local": True, "headless": False}))
    core.serve()


def environment(control: Path, tokenizer: Path) -> dict[str, str]:
    """Give the variables by which `run` and `main` find their control page and their words."""
    return {_CONTROL_ENV: str(control), _TOKENIZER_ENV: str(tokenizer)}


def main() -> None:
    """Serve a front end whose sockets exist already, or whose handshake socket does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input")
    parser.add_argument("--output")
    parser.add_argument("--handshake")
    parser.add_argument("--max-model-len", type=int, default=8192)
    options = parser.parse_args()
    if options.handshake:
        run(handshake_address=options.handshake, max_model_len=options.max_model_len)
    core = _make()
    core.connect(options.input, options.output, ready_response(options.max_model_len))
    core.serve()


if __name__ == "__main__":
    main()
