"""The stream that Envoy opens, spoken by hand: what it never sends itself, and what it sends when clients misbehave."""

from __future__ import annotations

import asyncio
import gzip
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.epp.replicas import epp_beside, replicas, until
from twinjet.epp import wire
from twinjet.epp.main import Epp
from twinjet.protobuf_bytes import field, number_field
from twinjet.v1 import generation_pb2 as pb

PATH = "/twinjet.v1.InferenceService/Generate"
MESSAGE = pb.GenerateRequest(token_ids=range(500)).SerializeToString()
FRAME = b"\0" + struct.pack(">I", len(MESSAGE)) + MESSAGE


@pytest.fixture(params=["native", "grpc"])
async def epp(request: pytest.FixtureRequest) -> AsyncIterator[Epp]:
    """A picker over two replicas, through either door."""
    server = {"port": 0, "grace_s": 0.2, "door": request.param}
    picking = {"decide_s": 0.3, "max_body_bytes": 4000}
    async with replicas(2) as servers, epp_beside(servers, server=server, picking=picking) as epp:
        yield epp


@asynccontextmanager
async def stream(epp: Epp) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(epp.address) as channel:
        call = channel.stream_stream(f"/{wire.SERVICE_NAME}/Process")()
        yield call
        call.cancel()


def headers(
    path: str = PATH, *, mode: int | None = wire.FULL_DUPLEX_STREAMED, ends: bool = False, **others: str
) -> bytes:
    pairs = {":path": path} | {name.replace("_", "-"): value for name, value in others.items()}
    made = b"".join(field(1, field(1, k.encode()) + field(3, v.encode())) for k, v in pairs.items())
    message = field(2, field(1, made) + (number_field(3, 1) if ends else b""))
    return message if mode is None else message + field(11, number_field(1, mode) + number_field(2, mode))


def body(data: bytes, *, ends: bool = False) -> bytes:
    return field(4, field(1, data) + (number_field(2, 1) if ends else b""))


async def answers(call: Any, messages: Iterable[bytes], count: int) -> list[bytes]:
    for message in messages:
        await call.write(message)
    async with asyncio.timeout(30):
        return [await call.read() for _ in range(count)]


def destination(answer: bytes) -> str:
    """The addresses in an answer, "" without."""
    _, mark, rest = answer.partition(wire.DESTINATION.encode() + b"\x1a")
    return rest[1 : 1 + rest[0]].decode() if mark else ""


async def test_the_answer_waits_for_the_message_and_gives_the_body_back(epp: Epp) -> None:
    async with stream(epp) as call:
        pieces = [FRAME[:3], FRAME[3:400], FRAME[400:]]
        sent = [headers(), *(body(p) for p in pieces), body(b"", ends=True)]
        first, *rest = await answers(call, sent, 5)
        assert set(destination(first).split(",")) == {r.address for r in epp.picker.replicas.values()}
        assert rest == [wire.request_body(p, ends=False) for p in pieces] + [
            wire.request_body(b"", ends=True)
        ]
        assert sum(epp.picker.num_in_flight(r) for r in epp.picker.replicas.values()) == 1
    await until(lambda: not any(epp.picker.num_in_flight(r) for r in epp.picker.replicas.values()))


async def test_without_a_told_mode_it_is_full_duplex(epp: Epp) -> None:
    async with stream(epp) as call:
        first, back = await answers(call, [headers(mode=None), body(FRAME, ends=True)], 2)
        assert destination(first) and back == wire.request_body(FRAME, ends=True)


async def test_a_long_body_goes_on_when_enough_has_been_seen(epp: Epp) -> None:
    message = pb.GenerateRequest(text="x" * 200_000).SerializeToString()
    start = b"\0" + struct.pack(">I", len(message)) + message[:130_000]
    async with stream(epp) as call:
        first, *rest = await answers(call, [headers(), body(start)], 4)
        assert destination(first)
        pieces = [start[i : i + wire.MAX_CHUNK] for i in range(0, len(start), wire.MAX_CHUNK)]
        assert rest == [wire.request_body(p, ends=False) for p in pieces]


async def test_a_body_that_does_not_come_is_not_waited_for(epp: Epp) -> None:
    async with stream(epp) as call:
        first, back = await answers(call, [headers(), body(FRAME[:200])], 2)
        assert destination(first) and back == wire.request_body(FRAME[:200], ends=False)
        (late,) = await answers(call, [body(FRAME[200:], ends=True)], 1)
        assert late == wire.request_body(FRAME[200:], ends=True)


async def test_buffered_bodies_are_answered_with_the_destination(epp: Epp) -> None:
    async with stream(epp) as call:
        (first,) = await answers(call, [headers(mode=wire.BUFFERED)], 1)
        assert first == wire.request_headers()
        (second,) = await answers(call, [body(FRAME, ends=True)], 1)
        assert destination(second) and second[0] == 0x1A


@pytest.mark.parametrize(
    ("path", "mode", "ends"),
    [(PATH, wire.NONE, False), (PATH, wire.STREAMED, False), (PATH, wire.FULL_DUPLEX_STREAMED, True),
     ("/twinjet.v1.InferenceService/Embed", wire.FULL_DUPLEX_STREAMED, False), ("/x", wire.BUFFERED, False)],
)  # fmt: skip
async def test_where_no_prompt_will_come_the_headers_decide(
    epp: Epp, path: str, mode: int, ends: bool
) -> None:
    async with stream(epp) as call:
        (first,) = await answers(call, [headers(path, mode=mode, ends=ends)], 1)
        assert destination(first)
        if mode in (wire.STREAMED, wire.BUFFERED):
            assert await answers(call, [body(b"abc", ends=True)], 1) == [wire.buffered_body()]


@pytest.mark.parametrize(
    ("data", "encoding"),
    [(b"garbage that is no frame", ""), (b"\0\0\0\0\x0c" + b"\xff" * 12, ""), (b"\1" + FRAME[1:], "snappy"),
     (b"\1\0\0\0\x02zz", "gzip"), (b"", "")],
)  # fmt: skip
async def test_what_cannot_be_read_goes_by_load(epp: Epp, data: bytes, encoding: str) -> None:
    async with stream(epp) as call:
        first, back = await answers(call, [headers(grpc_encoding=encoding), body(data, ends=True)], 2)
        assert destination(first) and back == wire.request_body(data, ends=True)
    value = epp.metrics.registry.get_sample_value("twinjet_epp_picks_total", {"known": "load"})
    assert value == 1


async def test_compressed_prompts_are_known(epp: Epp) -> None:
    packed = gzip.compress(MESSAGE)
    data = b"\1" + struct.pack(">I", len(packed)) + packed
    homes = set()
    for sent, encoding in ((FRAME, ""), (data, "gzip")):
        async with stream(epp) as call:
            first, _ = await answers(call, [headers(grpc_encoding=encoding), body(sent, ends=True)], 2)
            homes.add(destination(first).split(",")[0])
    assert len(homes) == 1
    assert (
        epp.metrics.registry.get_sample_value("twinjet_epp_prompt_tokens_total", {"cached": "yes"}) or 0
    ) > 400


async def test_other_messages_are_let_through(epp: Epp) -> None:
    async with stream(epp) as call:
        trailers = field(6, field(1, b""))
        sent = [
            headers(),
            trailers,
            field(3, b""),
            field(5, field(1, b"abc")),
            field(7, b""),
        ]
        first, *rest = await answers(call, sent, 5)
        assert destination(first)
        assert rest == [
            wire.REQUEST_TRAILERS_GO_ON, wire.RESPONSE_HEADERS_GO_ON, wire.response_body(b"abc", ends=False),
            wire.RESPONSE_TRAILERS_GO_ON,
        ]  # fmt: skip


async def test_answers_whose_bodies_envoy_keeps_go_on_as_they_are(epp: Epp) -> None:
    message = headers(ends=True, mode=None) + field(11, number_field(2, wire.STREAMED))
    async with stream(epp) as call:
        _, back = await answers(call, [message, field(5, field(1, b"abc"))], 2)
        assert back == wire.RESPONSE_BODY_GOES_ON


async def test_what_is_no_message_ends_the_stream(epp: Epp) -> None:
    async with stream(epp) as call:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await answers(call, [b"\xff\xff\xff"], 1)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_tells_what_gateways_ask_for(epp: Epp) -> None:
    async with grpc.aio.insecure_channel(epp.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check

        async def status(name: str) -> int:
            return int((await check(health_pb2.HealthCheckRequest(service=name))).status)

        names = ["", "liveness", "readiness", wire.SERVICE_NAME]
        assert [await status(n) for n in names] == [1, 1, 1, 1]
        for server in epp.picker.replicas.values():
            epp.picker.set_up(server, is_up=False)
        epp._watcher._tell()
        async with asyncio.timeout(10):
            while await status("readiness") != 2:
                await asyncio.sleep(0.01)
        assert await status("liveness") == 1
