"""However a stream ends, it ends once, and nothing of it is left in the engine."""

from __future__ import annotations

import asyncio
import random
import time

import grpc
import pytest

from tests.server.harness import Serve, collect, details, kinds
from twinjet.engines.base import Run
from twinjet.engines.fake import FakeEngine, FakeTokenizer
from twinjet.errors import DeadlinePassed, DeadlineUnreachable
from twinjet.request import EngineRequest
from twinjet.server.handlers import _run
from twinjet.server.native_door import CallIsOver
from twinjet.server.status import to_failure
from twinjet.v1 import admin_pb2, generation_pb2, sampling_pb2

Request = generation_pb2.GenerateRequest
Sampling = sampling_pb2.SamplingParams


async def test_a_cancelled_stream_leaves_the_engine(serve: Serve) -> None:
    h = await serve({"step_s": 0.005})
    call = h.inference.Generate(Request(text="x"))
    await call.read()
    call.cancel()
    await h.until_idle()


async def test_cancelling_before_the_first_token_leaves_the_engine(serve: Serve) -> None:
    h = await serve()
    call = h.inference.Generate(Request(text="!stall"))
    await call.initial_metadata()
    call.cancel()
    await h.until_idle()


async def test_a_client_that_leaves_a_group_of_tasks_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def write() -> None:
        raise CallIsOver("the client has ended the call")

    async def behaviour(request: object, context: object) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(write())

    with pytest.raises(asyncio.CancelledError):
        await _run("Compare", behaviour, object(), object())
    assert not caplog.records


async def test_a_deadline_ends_the_engines_work(serve: Serve) -> None:
    h = await serve({"step_s": 0.005})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(h.inference.Generate(Request(text="x"), timeout=0.2))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await h.until_idle()


async def test_a_client_that_waits_beyond_its_deadline_is_told_the_reason(serve: Serve, door: str) -> None:
    h = await serve({"step_s": 0.005})
    # As metadata: the client's library then keeps no clock of its own, as if its packets had been slow.
    late = (("grpc-timeout", "200m"),)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(h.inference.Generate(Request(text="x"), metadata=late))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    if door == "native":  # gRPC's core may end the call before we do, and then gives no details
        assert details(caught.value)["ErrorInfo"].reason == "DEADLINE_PASSED"
    await h.until_idle()


async def test_a_deadline_counts_from_the_calls_arrival_whatever_came_before_admission(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = await serve()
    encode = FakeTokenizer.encode
    deadlines: list[float | None] = []
    submit = FakeEngine.submit

    def slow_encode(self: FakeTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        time.sleep(0.5)
        return encode(self, text, add_special_tokens=add_special_tokens)

    def spy(self: FakeEngine, request: EngineRequest, run: Run) -> None:
        deadlines.append(request.deadline)
        submit(self, request, run)

    monkeypatch.setattr(FakeTokenizer, "encode", slow_encode)
    monkeypatch.setattr(FakeEngine, "submit", spy)
    began = time.monotonic()
    await collect(h.inference.Generate(Request(text="x", sampling=Sampling(max_tokens=1)), timeout=20))
    chat = generation_pb2.ChatRequest(messages=[{"role": "user", "content": "x"}], sampling={"max_tokens": 1})
    between = time.monotonic()
    await collect(h.inference.Chat(chat, timeout=20))
    for start, deadline in zip((began, between), deadlines, strict=True):
        assert deadline is not None
        # gRPC sends the time that is left, in whole milliseconds at best.
        assert deadline >= start + 20 - 0.1


async def test_a_deadline_that_cannot_be_met_has_a_reason_of_its_own() -> None:
    passed, unreachable = to_failure(DeadlinePassed("x")), to_failure(DeadlineUnreachable("x"))
    assert passed.code is unreachable.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert b"DEADLINE_PASSED" in passed.trailing_metadata[0][1]
    assert b"DEADLINE_UNREACHABLE" in unreachable.trailing_metadata[0][1]


async def test_an_operator_can_abort(serve: Serve) -> None:
    h = await serve({"step_s": 0.005})
    call = h.inference.Generate(Request(text="x", options={"request_id": "one"}))
    await call.read()
    await h.admin.Abort(admin_pb2.AbortRequest(request_id="one"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert details(caught.value)["ErrorInfo"].reason == "ABORTED"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.admin.Abort(admin_pb2.AbortRequest(request_id="one"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    await h.until_idle()


async def test_a_failed_request_never_looks_finished(serve: Serve) -> None:
    h = await serve()
    call = h.inference.Generate(Request(text="!fail:3"))
    messages: list[generation_pb2.GenerateResponse] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call, messages)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert details(caught.value)["ErrorInfo"].reason == "REQUEST_FAILED"
    assert not {"finished", "summary"} & set(kinds(messages))
    await h.until_idle()


async def test_of_many_streams_each_ends_in_exactly_one_way(serve: Serve) -> None:
    """64 at once; a third is cancelled at random points, a third has deadlines that pass."""
    h = await serve({"step_s": 0.002, "max_num_seqs": 16, "num_blocks": 256})
    rng = random.Random(7)

    async def one(i: int) -> str:
        request = Request(text=f"stream {i}", sampling=Sampling(max_tokens=60))
        timeout = rng.uniform(0.01, 0.15) if i % 3 == 1 else None
        call = h.inference.Generate(request, timeout=timeout)
        after = rng.randrange(30) if i % 3 == 0 else None
        events: list[str] = []
        try:
            async for message in call:
                events.append(message.WhichOneof("event") or "")
                if after is not None and len(events) > after:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            assert "summary" not in events
            return error.code().name
        except asyncio.CancelledError:
            assert "summary" not in events
            return "CANCELLED"
        assert events[-1] == "summary" and events.count("summary") == 1
        return "OK"

    async with asyncio.timeout(30):
        ends = await asyncio.gather(*(one(i) for i in range(64)))
    assert {ends[i] for i in range(2, 64, 3)} == {"OK"}
    assert {ends[i] for i in range(1, 64, 3)} <= {"OK", "DEADLINE_EXCEEDED"}
    assert {ends[i] for i in range(0, 64, 3)} <= {"OK", "CANCELLED"}
    assert {"OK", "DEADLINE_EXCEEDED", "CANCELLED"} <= set(ends)
    await h.until_idle()
