"""More calls than the server takes: each one gets an answer of ours, at once, and the others go on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import grpc
import pytest

from tests.server.harness import Harness, Serve, collect, details, kinds
from twinjet.engines.fake import FakeTokenizer
from twinjet.v1 import generation_pb2, sampling_pb2

Request = generation_pb2.GenerateRequest
Sampling = sampling_pb2.SamplingParams


async def _outcome(call: Any) -> str:
    """OK, or the code of a refusal that says when to come again."""
    try:
        assert kinds(await collect(call))[-1] == "summary"
    except grpc.aio.AioRpcError as error:
        found = details(error)
        assert found["RetryInfo"].retry_delay.ToMilliseconds() > 0
        return error.code().name
    return "OK"


async def _begin(h: Harness, text: str = "!stall") -> Any:
    """A stream that stays open until it is cancelled."""
    call = h.inference.Generate(Request(text=text, options={"report_queue": True}))
    await call.initial_metadata()
    return call


async def test_calls_beyond_the_limit_are_refused_at_once_and_room_comes_back(serve: Serve) -> None:
    h = await serve(server={"max_streams": 2})
    held = [await _begin(h) for _ in range(2)]
    for method in (h.inference.Generate, h.inference.Chat):
        began = time.monotonic()
        message = Request(text="x") if method is h.inference.Generate else generation_pb2.ChatRequest()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(method(message))
        assert time.monotonic() - began < 1
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        found = details(caught.value)
        assert found["RetryInfo"].retry_delay.ToMilliseconds() > 0
        assert found["QuotaFailure"].violations[0].subject == "server"
        assert "2 concurrent streams" in (caught.value.details() or "")
    held[0].cancel()
    await h.until(lambda: len(h.server.live) == 1)
    short = Request(text="x", sampling=Sampling(max_tokens=1))
    assert await _outcome(h.inference.Generate(short)) == "OK"
    held[1].cancel()


async def test_refusals_are_counted_whoever_makes_them(serve: Serve) -> None:
    h = await serve(server={"max_streams": 1})
    held = await _begin(h)
    for _ in range(3):
        assert await _outcome(h.inference.Generate(Request(text="x"))) == "RESOURCE_EXHAUSTED"

    def count() -> float:
        labels = {"method": "Generate", "code": "RESOURCE_EXHAUSTED"}
        return h.server.metrics.registry.get_sample_value("twinjet_calls_total", labels) or 0

    await h.until(lambda: count() == 3)
    held.cancel()


@pytest.mark.parametrize("limit", ["max_streams_per_connection", "max_streams_per_address"])
async def test_a_connection_and_an_address_have_limits_of_their_own(serve: Serve, limit: str) -> None:
    h = await serve(server={limit: 1})
    held = await _begin(h)
    short = Request(text="x", sampling=Sampling(max_tokens=1))
    assert await _outcome(h.inference.Generate(short)) == "RESOURCE_EXHAUSTED"
    async with grpc.aio.insecure_channel(
        h.server.address, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as other:
        answer = other.unary_stream(
            "/twinjet.v1.InferenceService/Generate",
            request_serializer=Request.SerializeToString,
            response_deserializer=generation_pb2.GenerateResponse.FromString,
        )(short)
        expected = "OK" if limit == "max_streams_per_connection" else "RESOURCE_EXHAUSTED"
        assert await _outcome(answer) == expected
    held.cancel()


async def test_a_thousand_calls_at_once_all_get_an_answer_of_ours(serve: Serve) -> None:
    h = await serve({"max_num_seqs": 64}, server={"max_streams": 100})
    short = Request(text="x", sampling=Sampling(max_tokens=4))
    outcomes = Counter(await asyncio.gather(*(_outcome(h.inference.Generate(short)) for _ in range(1000))))
    assert set(outcomes) <= {"OK", "RESOURCE_EXHAUSTED"}
    assert outcomes["OK"] >= 100
    await h.until_idle()


async def test_a_full_queue_refuses_before_it_tokenizes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = await serve({"max_num_seqs": 1}, deployments={
        "fake": {"engine": "fake", "options": {"max_num_seqs": 1}, "scheduler": {"max_waiting": 1}}
    })  # fmt: skip
    held = [await _begin(h) for _ in range(2)]
    dispatcher = h.server.deployments.by_name["fake"].dispatcher
    await h.until(lambda: dispatcher.load().waiting == 1)
    encoded = []
    encode = FakeTokenizer.encode

    def spy(self: FakeTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        encoded.append(text)
        return encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(FakeTokenizer, "encode", spy)
    assert await _outcome(h.inference.Generate(Request(text="too many"))) == "RESOURCE_EXHAUSTED"
    assert encoded == []
    for call in held:
        call.cancel()
