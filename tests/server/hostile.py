"""The worst that a client can send, and a neighbour who must not notice.

As a script it runs a server with the real vLLM, or with --engine fake, and prints for each attack what it was answered and
how long the neighbour's stream and his short calls had to wait meanwhile:

    python -m tests.server.hostile [--engine fake] [--door grpc] [--only WORD]
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from twinjet.protobuf_bytes import field, number_field, varint
from twinjet.v1 import (
    admin_pb2,
    compare_pb2,
    generation_pb2,
    model_pb2,
    routing_pb2,
)

GENERATE = "/twinjet.v1.InferenceService/Generate"
CHAT = "/twinjet.v1.InferenceService/Chat"
TOKENIZE = "/twinjet.v1.InferenceService/Tokenize"
DETOKENIZE = "/twinjet.v1.InferenceService/Detokenize"

# Field numbers, for messages that are too large to be made from objects in little time.
TEXT, TOKEN_IDS, SAMPLING, OPTIONS = 2, 3, 4, 5
STOP, STOP_IDS, BAD_WORDS, ALLOWED, BIAS, CONSTRAINT = 13, 14, 17, 18, 8, 22


@dataclass(frozen=True)
class Case:
    """One bad call and its due answer. field: what the first violation's begins with; "" where the answer names none."""

    name: str
    path: str
    make: Callable[[], bytes]
    code: str = "INVALID_ARGUMENT"
    field: str = ""


def _generate(**fields: Any) -> Callable[[], bytes]:
    return lambda: generation_pb2.GenerateRequest(**fields).SerializeToString()


def _sampling(*parts: bytes) -> bytes:
    return field(TEXT, b"x") + field(SAMPLING, b"".join(parts))


def _constraint(**kind: Any) -> Callable[[], bytes]:
    return _generate(text="x", sampling={"constraint": kind})


def nested(depth: int) -> bytes:
    """A message within a message, in a field that nobody knows."""
    data = b""
    for _ in range(depth):
        data = field(1000, data)
    return data


def _schema(value: Any) -> Callable[[], bytes]:
    return _constraint(json_schema=value if isinstance(value, str) else json.dumps(value))


MILLION = 1_000_000
AMBIGUOUS_BEHIND = "x{400}(((a{1,1000}){1,1000}){200,1000})b"
"""No trial of some dozens of tokens comes to what takes long."""

CASES = [
    Case("empty", GENERATE, lambda: b"", field="text"),
    Case("unknown fields alone", GENERATE, lambda: field(999, b"x") * 1000, field="text"),
    Case("unknown fields nested 90 deep", GENERATE, lambda: nested(90), field="text"),
    Case("a group that never ends", GENERATE, lambda: b"\x0b" * 5000, field="GenerateRequest"),
    Case("a million unknown fields", GENERATE, lambda: number_field(999, 1) * MILLION, field="GenerateRequest"),
    Case("known messages nested wrongly", GENERATE, lambda: field(SAMPLING, field(CONSTRAINT, b"\xff")), field="GenerateRequest"),
    Case("text that is no UTF-8", GENERATE, lambda: field(TEXT, b"\xff"), field="text"),
    Case("a million stops that are no UTF-8", GENERATE, lambda: _sampling(field(STOP, b"\xff") * MILLION), field="sampling.stop"),
    Case("100,000 stops", GENERATE, lambda: _sampling(field(STOP, b"s") * 100_000), field="sampling.stop"),
    Case("5 million empty stops", GENERATE, lambda: _sampling(field(STOP, b"") * 5 * MILLION), field="sampling.stop"),
    Case("2 million bad words", GENERATE, lambda: _sampling(field(BAD_WORDS, b"s") * 2 * MILLION), field="sampling.bad_words"),
    Case("10 million allowed ids", GENERATE, lambda: _sampling(field(ALLOWED, b"\x01" * 10 * MILLION)), field="sampling.allowed_token_ids"),
    Case("10 million stop ids", GENERATE, lambda: _sampling(field(STOP_IDS, b"\x01" * 10 * MILLION)), field="sampling.stop_token_ids"),
    Case("200,000 biases", GENERATE, lambda: _sampling(b"".join(field(BIAS, number_field(1, i) + b"\x15\0\0\0\0") for i in range(200_000))), field="sampling.logit_bias"),
    Case("a million token ids", GENERATE, lambda: field(TOKEN_IDS, b"\x01" * MILLION), field="token_ids"),
    Case("16 million token ids", GENERATE, lambda: field(TOKEN_IDS, b"\x01" * 16 * MILLION), field="token_ids"),
    Case("a token id of 2^31 - 1", GENERATE, lambda: field(TOKEN_IDS, varint(2**31 - 1)), field="token_ids"),
    Case("a text of 4 MiB", GENERATE, lambda: field(TEXT, b"a " * (2 << 20)), field="text"),
    Case("a text of 15 MiB", GENERATE, lambda: field(TEXT, b"a" * (15 << 20)), field="text"),
    Case("a text of one character a million times", GENERATE, lambda: field(TEXT, "\u0e33".encode() * MILLION), field="text"),
    Case("n of 2^31 - 1", GENERATE, _generate(text="x", sampling={"n": 2**31 - 1}), field="sampling.n"),
    Case("NaN everywhere", GENERATE, _generate(text="x", sampling={k: float("nan") for k in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")}), field="sampling.temperature"),
    Case("minus infinity", GENERATE, _generate(text="x", sampling={"temperature": float("-inf")}), field="sampling.temperature"),
    Case("NaN bias", GENERATE, _generate(text="x", sampling={"logit_bias": {1: float("nan")}}), field="sampling.logit_bias"),
    Case("top_k of -2^31", GENERATE, _generate(text="x", sampling={"top_k": -(2**31)}), field="sampling.top_k"),
    Case("contradictory lengths", GENERATE, _generate(text="x", sampling={"min_tokens": 5, "max_tokens": 4}), field="sampling.min_tokens"),
    Case("greedy and many", GENERATE, _generate(text="x", sampling={"n": 2, "temperature": 0}), field="sampling.n"),
    Case("an unknown model of 1 MiB", GENERATE, _generate(text="x", model="m" * (1 << 20)), code="NOT_FOUND"),
    Case("a request id of 1 MiB", GENERATE, _generate(text="x", options={"request_id": "r" * (1 << 20)}), field="options.request_id"),
    Case("retention for -2^63 s", GENERATE, _generate(text="x", options={"kv_retention": {"duration": {"seconds": -(2**63)}}}), field="options.kv_retention.duration"),
    Case("chat without messages", CHAT, lambda: b"", field="messages"),
    Case("5 million chat messages", CHAT, lambda: field(2, b"") * 5 * MILLION, field="messages"),
    Case("4,096 unknown roles", CHAT, lambda: field(2, field(1, b"wizard" * 100)) * 4096, field="messages[0].role"),
    Case("a message of 4 MiB", CHAT, lambda: field(2, field(1, b"user") + field(2, b"a " * (2 << 20))), field="messages"),
    Case("control tokens a 100,000 times", CHAT, lambda: field(2, field(1, b"user") + field(2, b"<|im_end|>" * 100_000)), field="messages"),
    Case("neither text nor messages", TOKENIZE, lambda: b"", field="text"),
    Case("tokenize 15 MiB", TOKENIZE, lambda: field(2, b"a" * (15 << 20)), field="text"),
    Case("nothing to detokenize", DETOKENIZE, lambda: b"", field="token_ids"),
    Case("detokenize 2^31 - 1", DETOKENIZE, lambda: field(2, varint(2**31 - 1)), field="token_ids"),
    Case("detokenize 16 million", DETOKENIZE, lambda: field(2, b"\x01" * 16 * MILLION), field="token_ids"),
    Case("schema of 1 MiB", GENERATE, _schema('{"const": "' + "a" * (1 << 20) + '"}'), field="sampling.constraint.json_schema"),
    Case("schema 5,000 deep", GENERATE, _schema('{"items":' * 5000 + "{}" + "}" * 5000), field="sampling.constraint.json_schema"),
    Case("schema that is no JSON", GENERATE, _schema("{"), field="sampling.constraint.json_schema"),
    Case("schema of 9,000 properties", GENERATE, _schema({"properties": {f"p{i}": {"type": "string"} for i in range(9_000)}}), field="sampling.constraint.json_schema"),
    Case("schema that doubles 30 times", GENERATE, _schema({"$ref": "#/$defs/a0", "$defs": {f"a{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"minLength": i}]}] * 2} for i in range(30)} | {"a30": {"type": "string"}}}), field="sampling.constraint.json_schema"),
    Case("regex of nested repeats", GENERATE, _constraint(regex="((((a{1,1000}){1,1000}){1,1000}){1,1000})"), field="sampling.constraint.regex"),
    Case("regex that is ambiguous far behind", GENERATE, lambda: generation_pb2.GenerateRequest(text="x", sampling={"temperature": 0, "constraint": {"regex": AMBIGUOUS_BEHIND}}).SerializeToString(), code="FAILED_PRECONDITION"),
    Case("regex of 5,000 groups", GENERATE, _constraint(regex="(" * 5000 + "a" + ")" * 5000), field="sampling.constraint.regex"),
    Case("regex unclosed", GENERATE, _constraint(regex="("), field="sampling.constraint.regex"),
    Case("ebnf that goes left for ever", GENERATE, _constraint(ebnf="root ::= root"), field="sampling.constraint.ebnf"),
    Case("ebnf of 9,000 rules", GENERATE, _constraint(ebnf="root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(9_000)) + "r9000 ::= s"), field="sampling.constraint.ebnf"),
    Case("ebnf 20,000 deep", GENERATE, _constraint(ebnf="root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000), field="sampling.constraint.ebnf"),
    Case("1,025 choices", GENERATE, _constraint(choice={"values": ["x"] * 1025}), field="sampling.constraint.choice"),
    Case("structural tag that is no JSON", GENERATE, _constraint(structural_tag="{"), code="UNIMPLEMENTED"),
    Case("structural tag 5,000 deep", GENERATE, _constraint(structural_tag='{"type":"structural_tag","format":' * 5000), code="UNIMPLEMENTED"),
]  # fmt: skip
"""Sizes stay below max_request_bytes; what is beyond it never reaches a handler."""


class Answer:
    """How a call ended. fields: those that its BadRequest names."""

    def __init__(self, error: grpc.RpcError | None) -> None:
        self.code = "OK" if error is None else error.code().name  # type: ignore[attr-defined]
        self.message = "" if error is None else error.details() or ""  # type: ignore[attr-defined]
        self.fields: list[str] = []
        self.reason = ""
        trailers = {} if error is None else dict(error.trailing_metadata() or ())  # type: ignore[attr-defined]
        if details := trailers.get("grpc-status-details-bin"):
            for packed in status_pb2.Status.FromString(details).details:
                bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
                if packed.Unpack(bad):
                    self.fields += [violation.field for violation in bad.field_violations]
                elif packed.Unpack(info):
                    self.reason = info.reason

    def __str__(self) -> str:
        return f"{self.code} {' '.join(self.fields[:3]) or self.reason or self.message[:80]}"


def ask(channel: grpc.Channel, path: str, data: bytes, timeout_s: float = 120.0, **call: Any) -> Answer:
    """Send bytes as a request and read to the end."""
    try:
        for _ in channel.unary_stream(path)(data, timeout=timeout_s, **call):
            pass
    except grpc.RpcError as error:
        return Answer(error)
    return Answer(None)


class Raw:
    """A connection of HTTP/2 frames written by hand, for what no client library would send."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._buffer = b""
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def call(
        self, stream: int, path: str, data: bytes | None, *extra: tuple[str, str], end: bool = True
    ) -> None:
        """Begin a call; data: its request as it stands on the wire, None for headers alone."""
        self.send(headers(stream, path, *extra))
        if data is not None:
            pieces = [data[i : i + 16384] for i in range(0, len(data), 16384)]
            for i, piece in enumerate(pieces):
                self.send(frame(0, int(end and i == len(pieces) - 1), stream, piece))

    def read(self) -> tuple[int, int, int, bytes] | None:
        """The next frame: type, flags, stream, payload. None at the end."""
        with contextlib.suppress(ConnectionError):
            while len(self._buffer) < 9 or len(self._buffer) < 9 + self._length():
                data = self._socket.recv(1 << 16)
                if not data:
                    return None
                self._buffer += data
            length = self._length()
            head, payload = self._buffer[:9], self._buffer[9 : 9 + length]
            self._buffer = self._buffer[9 + length :]
            return head[3], head[4], int.from_bytes(head[5:9], "big") & 0x7FFFFFFF, payload
        return None

    def _length(self) -> int:
        return int.from_bytes(self._buffer[:3], "big")

    def until_over(self, stream: int) -> str:
        """Read until a stream, or the connection, has ended; gives what ended it."""
        while (found := self.read()) is not None:
            kind, flags, number, payload = found
            if kind == 7:
                return f"GOAWAY {int.from_bytes(payload[4:8], 'big')}"
            if kind == 4 and not flags & 1:
                self.send(frame(4, 1, 0, b""))
            elif number == stream and kind == 3:
                return f"RST_STREAM {int.from_bytes(payload[:4], 'big')}"
            elif number == stream and kind in (0, 1) and flags & 1:
                return "END_STREAM"
        return "closed"

    def close(self) -> None:
        self._socket.close()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(stream: int, path: str, *extra: tuple[str, str]) -> bytes:
    """HEADERS of a gRPC call, each field literal and unindexed."""
    fields = [
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"),
        ("te", "trailers"), ("content-type", "application/grpc"), *extra,
    ]  # fmt: skip
    block = b"".join(b"\0" + _hpack_string(name) + _hpack_string(value) for name, value in fields)
    first, rest = block[:16384], block[16384:]
    out = frame(1, 0 if rest else 4, stream, first)
    while rest:
        piece, rest = rest[:16384], rest[16384:]
        out += frame(9, 0 if rest else 4, stream, piece)
    return out


def _hpack_string(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    return b"\x7f" + varint(len(data) - 127) + data


def grpc_message(data: bytes, *, is_compressed: bool = False) -> bytes:
    """A message with gRPC's prefix."""
    return bytes([is_compressed]) + struct.pack(">I", len(data)) + data


# Attacks: each gives what happened, counted.

Attack = Callable[[str], Counter[str]]


def _is_constrained(case: Case) -> bool:
    if case.path != GENERATE:
        return False
    try:
        request = generation_pb2.GenerateRequest.FromString(case.make())
    except DecodeError:
        return False
    return request.sampling.HasField("constraint")


def _case_attack(case: Case) -> Attack:
    def run(address: str) -> Counter[str]:
        data = case.make()
        with _channel(address) as channel:
            answer = ask(channel, case.path, data)
        is_due = answer.code == case.code and (
            not case.field or any(f.startswith(case.field) for f in answer.fields)
        )
        return Counter([str(answer) if is_due else f"WRONG: {answer}: {answer.message[:100]}"])

    return run


@contextlib.contextmanager
def _channel(address: str) -> Iterator[grpc.Channel]:
    options = [
        ("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0),
    ]  # fmt: skip
    with grpc.insecure_channel(address, options=options) as channel:
        yield channel


def gzip_bomb(address: str) -> Counter[str]:
    """Two hundred megabytes of zeros in as many kilobytes, which a stream's window lets through."""
    bomb = gzip.compress(bytes(200 << 20), 9)
    raw = Raw(address)
    raw.call(1, GENERATE, grpc_message(bomb, is_compressed=True), ("grpc-encoding", "gzip"))
    ended = raw.until_over(1)
    raw.close()
    return Counter([ended])


def metadata_bombs(address: str) -> Counter[str]:
    """Headers of 15 KiB, 60 KiB and a megabyte, and ten thousand small ones."""
    ends: Counter[str] = Counter()
    for extra in (
        [("x-a", "a" * 15_000)],
        [("x-a", "a" * 60_000)],
        [("x-a", "a" * 1_000_000)],
        [(f"x-{i}", "") for i in range(10_000)],
    ):
        raw = Raw(address)
        with contextlib.suppress(OSError):
            raw.call(1, GENERATE, grpc_message(field(TEXT, b"")), *extra)
        ends[raw.until_over(1)] += 1
        raw.close()
    return ends


def slow_connections(address: str, number: int = 1000, seconds: float = 8.0) -> Counter[str]:
    """Many connections, each of which sends a call a byte a second."""
    host, _, port = address.rpartition(":")
    data = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + headers(1, GENERATE)
    sockets = []
    for _ in range(number):
        connection = socket.create_connection((host, int(port)), timeout=10)
        connection.setblocking(False)
        sockets.append(connection)
    lost: set[int] = set()
    for i in range(int(seconds)):
        for j, connection in enumerate(sockets):
            if j not in lost:
                try:
                    connection.send(data[i : i + 1])
                except OSError:
                    lost.add(j)
        time.sleep(1)
    for connection in sockets:
        connection.close()
    return Counter({"held": number - len(lost), "closed by the server": len(lost)})


def half_open(address: str, number: int = 500) -> Counter[str]:
    """Calls whose message never comes, one connection each, dropped without a word."""
    raws = [Raw(address) for _ in range(number)]
    for raw in raws:
        raw.call(1, GENERATE, None)
    time.sleep(2)
    for raw in raws:
        raw.close()
    return Counter({"opened": number})


def stopped_readers(address: str, number: int = 16) -> Counter[str]:
    """Streams of many outputs whose client never reads or gives window."""
    request = generation_pb2.GenerateRequest(
        text="x", sampling={"max_tokens": 400, "ignore_eos": True, "logprobs": 5}
    ).SerializeToString()
    raws = [Raw(address) for _ in range(number)]
    for raw in raws:
        raw.send(frame(4, 0, 0, struct.pack(">HI", 4, 0)))  # a window of nothing for every stream
        raw.call(1, GENERATE, grpc_message(request))
    time.sleep(6)
    for raw in raws:
        raw.close()
    return Counter({"never read": number})


def cancel_storm(address: str, number: int = 3000) -> Counter[str]:
    """Calls that are reset as soon as they are made, on one connection."""
    request = grpc_message(
        generation_pb2.GenerateRequest(
            text="x", sampling={"max_tokens": 500, "ignore_eos": True}
        ).SerializeToString()
    )
    raw = Raw(address)
    sent = 0
    with contextlib.suppress(OSError):
        for i in range(number):
            stream = 2 * i + 1
            raw.call(stream, GENERATE, request)
            raw.send(frame(3, 0, stream, struct.pack(">I", 8)))
            sent += 1
    raw.close()
    return Counter({"reset": sent})


def same_id(address: str, number: int = 50) -> Counter[str]:
    """One request id, many times at once."""
    request = generation_pb2.GenerateRequest(
        text="x", sampling={"max_tokens": 50, "ignore_eos": True}, options={"request_id": "same"}
    ).SerializeToString()
    with _channel(address) as channel, ThreadPoolExecutor(number) as pool:
        answers = list(pool.map(lambda _: ask(channel, GENERATE, request), range(number)))
    return Counter(str(answer) for answer in answers)


def many_tenants(address: str, number: int = 3000) -> Counter[str]:
    """Short requests, each of another tenant."""
    with _channel(address) as channel, ThreadPoolExecutor(32) as pool:
        answers = pool.map(
            lambda i: ask(
                channel,
                GENERATE,
                generation_pb2.GenerateRequest(
                    token_ids=[1], sampling={"max_tokens": 1}, options={"tenant": f"t{i}" + "x" * 100}
                ).SerializeToString(),
            ),
            range(number),
        )
        return Counter(str(answer) for answer in answers)


def deadlines(address: str) -> Counter[str]:
    """None at all, a nanosecond, ten years, and texts that are no time."""
    request = grpc_message(
        generation_pb2.GenerateRequest(text="x", sampling={"max_tokens": 1}).SerializeToString()
    )
    ends: Counter[str] = Counter()
    for timeout in ("0n", "1n", "87600H", "99999999H", "-1S", "1", "S", "999999999S", "1X"):
        raw = Raw(address)
        raw.call(1, GENERATE, request, ("grpc-timeout", timeout))
        ends[f"{timeout}: {raw.until_over(1)}"] += 1
        raw.close()
    return ends


def control_plane(address: str) -> Counter[str]:
    """What the other RPCs say to nonsense."""
    admin, model = "/twinjet.v1.AdminService/", "/twinjet.v1.ModelService/"
    seconds = {"seconds": -1}
    huge = {"seconds": 2**62}
    calls: list[tuple[str, Message]] = [
        (admin + "Abort", admin_pb2.AbortRequest()),
        (admin + "Abort", admin_pb2.AbortRequest(request_id="x" * 10_000)),
        (admin + "Drain", admin_pb2.DrainRequest(grace=seconds)),
        (admin + "Drain", admin_pb2.DrainRequest(grace={"nanos": -1})),
        (admin + "RemoveDeployment", routing_pb2.RemoveDeploymentRequest(name="x", grace=huge)),
        (admin + "RemoveDeployment", routing_pb2.RemoveDeploymentRequest(name="x" * 100_000)),
        (admin + "SetRoute", routing_pb2.SetRouteRequest()),
        (
            admin + "SetRoute",
            routing_pb2.SetRouteRequest(route={"model": "m", "weights": {"x": float("nan")}}),
        ),
        (admin + "SetRoute", routing_pb2.SetRouteRequest(route={"model": "m", "sticky": 77})),
        (admin + "AddDeployment", routing_pb2.AddDeploymentRequest()),
        (
            admin + "AddDeployment",
            routing_pb2.AddDeploymentRequest(name="d", settings={"engine": "x" * 100_000}),
        ),
        (admin + "Compare", compare_pb2.CompareRequest()),
        (
            admin + "Compare",
            compare_pb2.CompareRequest(
                deployment_a="fake", deployment_b="fake", slo={"ttft": huge}, ladder=[float("nan")]
            ),
        ),
        (admin + "WatchKvEvents", admin_pb2.WatchKvEventsRequest(model="x" * 100_000)),
        (admin + "GetLoad", admin_pb2.GetLoadRequest(model="x" * 100_000)),
        (admin + "ResetPrefixCache", admin_pb2.ResetPrefixCacheRequest(model="x")),
        (model + "GetModel", model_pb2.GetModelRequest(model="x" * 100_000)),
        (model + "LoadAdapter", model_pb2.LoadAdapterRequest()),
        (model + "LoadAdapter", model_pb2.LoadAdapterRequest(name="a", path="/../../etc")),
        (model + "UnloadAdapter", model_pb2.UnloadAdapterRequest(name="x" * 100_000)),
        (model + "ListAdapters", model_pb2.ListAdaptersRequest(model="x" * 100_000)),
        ("/twinjet.v1.InferenceService/Embed", generation_pb2.GenerateRequest()),
        ("/twinjet.v1.InferenceService/Nothing", generation_pb2.GenerateRequest()),
    ]
    ends: Counter[str] = Counter()
    with _channel(address) as channel:
        for path, request in calls:
            ends[f"{path.rpartition('/')[2]}: {ask(channel, path, request.SerializeToString())}"] += 1
            for noise in (b"\xff" * 100, b"\x0a\x02\xff\xff"):
                answer = ask(channel, path, noise, 5)
                if answer.code in ("INTERNAL", "UNKNOWN"):
                    ends[f"WRONG {path}: noise: {answer}"] += 1
    return ends


def seeds(address: str) -> Counter[str]:
    """Seeds of 2^63 and its neighbours are no mistake."""
    with _channel(address) as channel:
        return Counter(
            str(
                ask(
                    channel,
                    GENERATE,
                    generation_pb2.GenerateRequest(
                        text="x", sampling={"seed": seed, "max_tokens": 2, "n": 2}
                    ).SerializeToString(),
                )
            )
            for seed in (0, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
        )


def watchers(address: str, number: int = 2000) -> Counter[str]:
    """Health watchers and reflection streams that never end."""
    raw = Raw(address)
    request = grpc_message(health_pb2.HealthCheckRequest().SerializeToString())
    for i in range(number):
        raw.call(2 * i + 1, "/grpc.health.v1.Health/Watch", request)
    reflection = Raw(address)
    noise = grpc_message(field(3, b"x" * 100_000)) * 20
    reflection.call(1, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", noise, end=False)
    time.sleep(3)
    raw.close()
    reflection.close()
    return Counter({"watching": number})


def big_at_once(address: str, number: int = 24) -> Counter[str]:
    """Messages of 15 MiB, many at once."""
    data = field(SAMPLING, field(STOP, b"s") * 5_000_000) + field(TEXT, b"x")
    with _channel(address) as channel, ThreadPoolExecutor(number) as pool:
        return Counter(str(a) for a in pool.map(lambda _: ask(channel, GENERATE, data), range(number)))


def long_texts_at_once(address: str, number: int = 400) -> Counter[str]:
    """Texts of nearly 4 MiB, many at once, over several connections."""
    data = field(TEXT, b"ab " * (1_390_000))
    channels, answers = [], []
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(number) as pool:
        channels = [stack.enter_context(_channel(address)) for _ in range(16)]
        answers = list(
            pool.map(lambda i: ask(channels[i % 16], (GENERATE, TOKENIZE)[i % 2], data, 300.0), range(number))
        )
    return Counter(f"{a.code} {a.reason}" for a in answers)


def load_watchers(address: str, number: int = 2000) -> Counter[str]:
    """Streams of load reports, each as often as they come."""
    raw = Raw(address)
    request = grpc_message(field(1, number_field(2, 1)))
    for i in range(number):
        raw.call(2 * i + 1, "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics", request)
    deadline = time.monotonic() + 5
    reports = 0
    while time.monotonic() < deadline and (found := raw.read()) is not None:
        kind, _, stream, payload = found
        if kind == 0:
            reports += 1
            # Read, so that the next ones may come.
            size = struct.pack(">I", len(payload))
            raw.send(frame(8, 0, 0, size) + frame(8, 0, stream, size))
    raw.close()
    return Counter({"reports": reports})


def any_calls(address: str, number: int = 1500) -> Counter[str]:
    """Every method, with messages made to hurt; see any_call."""
    from tests.server.any_call import campaign

    with _channel(address) as channel:
        return campaign(channel, "fake", "fake", number, int(os.environ.get("SEED", "0")))


ATTACKS: dict[str, Attack] = {case.name: _case_attack(case) for case in CASES} | {
    attack.__name__: attack
    for attack in (
        gzip_bomb, metadata_bombs, deadlines, control_plane, seeds, same_id, many_tenants, big_at_once, half_open,
        slow_connections, stopped_readers, cancel_storm, watchers, long_texts_at_once, load_watchers, any_calls,
    )
}  # fmt: skip


# The neighbour.


def neighbour(address: str, pipe: Connection) -> None:
    """Stream steadily and ask for the server's health; tell on demand of the longest waits since the last demand."""
    lock = threading.Lock()
    gaps: list[float] = []
    checks: list[float] = []
    failures: Counter[str] = Counter()
    channel = grpc.insecure_channel(address)
    request = generation_pb2.GenerateRequest(
        text="Once upon a time", sampling={"max_tokens": 1500, "ignore_eos": True, "temperature": 0}
    ).SerializeToString()

    def stream() -> None:
        while True:
            last = None
            try:
                for _ in channel.unary_stream(GENERATE)(request):
                    now = time.monotonic()
                    if last is not None:
                        with lock:
                            gaps.append(now - last)
                    last = now
            except grpc.RpcError as error:
                with lock:
                    failures[str(Answer(error))] += 1
                time.sleep(0.1)

    def check() -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            began = time.monotonic()
            try:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
            except grpc.RpcError as error:
                with lock:
                    failures[f"Check: {Answer(error)}"] += 1
            with lock:
                checks.append(time.monotonic() - began)
            time.sleep(0.01)

    for target in (stream, check):
        threading.Thread(target=target, daemon=True).start()
    while pipe.recv():
        with lock:
            told = list(gaps), list(checks), Counter(failures)
            gaps.clear()
            checks.clear()
            failures.clear()
        pipe.send(told)


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3 if ordered else float("nan")


def _memory_mib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    return 0


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("vllm", "fake"), default="vllm")
    parser.add_argument("--door", choices=("native", "grpc"), default="native")
    parser.add_argument("--only", default="", help="attacks whose name holds this word")
    arguments = parser.parse_args()
    from tests.server.processes import server

    options = "[deployments.fake.options]\nstep_s = 0.01\n" if arguments.engine == "fake" else ""
    settings = f'door = "{arguments.door}"\n[protocols.openengine]\nenabled = true\n[deployments.fake]\nengine = "{arguments.engine}"\n{options}'
    num_wrong = 0
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), settings) as (process, address):
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        other = multiprocessing.get_context("spawn").Process(
            target=neighbour, args=(address, theirs), daemon=True
        )
        other.start()

        def waits() -> tuple[list[float], list[float], Counter[str]]:
            ours.send(True)
            told: tuple[list[float], list[float], Counter[str]] = ours.recv()
            return told

        time.sleep(3)
        waits()
        # The fake engine has no constraints, and refuses them for that.
        left_out = {case.name for case in CASES if arguments.engine == "fake" and _is_constrained(case)}
        attacks = {"(nothing)": lambda _: time.sleep(5) or Counter()} | {
            name: attack
            for name, attack in ATTACKS.items()
            if arguments.only in name and name not in left_out
        }
        print(
            f"{'attack':42} {'s':>6} {'gap p50':>8} {'p99':>7} {'worst':>7} {'check':>7} {'MiB':>6}  ms; answers"
        )
        for name, attack in attacks.items():
            began = time.monotonic()
            try:
                ends = attack(address)
            except Exception as error:  # noqa: BLE001 - the other attacks go on
                ends = Counter([f"WRONG: {type(error).__name__}: {error}"])
            took = time.monotonic() - began
            time.sleep(0.3)
            gaps, checks, failures = waits()
            num_wrong += sum("WRONG" in end for end in ends) + len(failures)
            print(
                f"{name[:42]:42} {took:6.2f} {statistics.median(gaps or [0]) * 1e3:8.1f} {_quantile(gaps, 0.99):7.1f} "
                f"{max(gaps, default=0) * 1e3:7.1f} {max(checks, default=0) * 1e3:7.1f} {_memory_mib(process.pid):6}  "
                + "; ".join(f"{n} x {end}" if n > 1 else end for end, n in ends.items())
                + (f" NEIGHBOUR: {dict(failures)}" if failures else ""),
                flush=True,
            )
        ours.send(False)
        other.join(5)
        log = (Path(folder) / "server.log").read_text()
        for line in log.splitlines():
            if "Traceback" in line or "ERROR" in line or "failed" in line:
                print("LOG:", line[:300])
        if os.environ.get("KEEP_LOG"):
            Path(os.environ["KEEP_LOG"]).write_text(log)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
