"""A client that reads slower than the engine writes: merged deltas first, then a clear end.

Clients take messages of 4 MiB, gRPC's default, and no larger ones.
"""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.server.harness import Serve, collect, details, kinds, text_of
from twinjet.v1 import generation_pb2, sampling_pb2

Request = generation_pb2.GenerateRequest
Sampling = sampling_pb2.SamplingParams

SMALL_WINDOW = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16_384),
]
"""Keeps the client's transport from reading megabytes ahead of the application."""

BULKY = Sampling(max_tokens=50_000, logprobs=20)
"""About 800 bytes a token on the wire."""


async def test_a_reader_that_stops_is_ended_and_its_work_stopped(serve: Serve) -> None:
    h = await serve(
        {"max_context_tokens": 100_000, "num_blocks": 10_000},
        server={"stalled_reader_s": 0.5, "max_pending_bytes": 1 << 30},
        channel_options=SMALL_WINDOW,
    )
    call = h.inference.Generate(Request(text="x", sampling=BULKY))
    assert (await call.read()).HasField("started")
    await h.until_idle()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(collect(call), 20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(caught.value)["ErrorInfo"].reason == "SLOW_READER"


async def test_what_waits_for_a_reader_is_bounded(serve: Serve) -> None:
    h = await serve(
        {"max_context_tokens": 100_000, "num_blocks": 10_000},
        server={"stalled_reader_s": 60, "max_pending_bytes": 64_000},
        channel_options=SMALL_WINDOW,
    )
    call = h.inference.Generate(Request(text="x", sampling=BULKY))
    assert (await call.read()).HasField("started")
    await h.until(lambda: len(h.server.live) == 0, timeout_s=20)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(collect(call), 20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "64000 bytes" in (caught.value.details() or "")


async def test_a_slow_reader_gets_everything_in_fewer_messages(serve: Serve) -> None:
    h = await serve({"max_context_tokens": 100_000, "num_blocks": 10_000}, channel_options=SMALL_WINDOW)
    request = Request(text="x", sampling=Sampling(max_tokens=3000, logprobs=20, seed=1))
    call = h.inference.Generate(request)
    messages = [await call.read()]
    await h.until(
        lambda: not h.server.deployments.by_name["fake"].dispatcher.load().request_ids, timeout_s=20
    )
    messages += await asyncio.wait_for(collect(call), 20)
    assert kinds(messages)[-1] == "summary"
    assert sum(len(m.delta.token_ids) for m in messages) == 3000
    assert max(len(m.delta.token_ids) for m in messages) > 100
    request.sampling.ClearField("logprobs")
    assert text_of(messages) == text_of(await collect(h.inference.Generate(request)))


async def test_what_was_merged_never_outgrows_what_a_client_takes(serve: Serve) -> None:
    h = await serve(
        {"max_context_tokens": 100_000, "num_blocks": 10_000},
        server={"max_pending_bytes": 1 << 30},
        channel_options=SMALL_WINDOW,
    )
    request = Request(text="x", sampling=Sampling(max_tokens=20_000, logprobs=20, seed=1, n=2))
    call = h.inference.Generate(request)
    messages = [await call.read()]
    await h.until(
        lambda: not h.server.deployments.by_name["fake"].dispatcher.load().request_ids, timeout_s=60
    )
    messages += await asyncio.wait_for(collect(call), 60)
    for index in range(2):
        deltas = [m.delta for m in messages if m.HasField("delta") and m.delta.output_index == index]
        assert sum(len(delta.token_ids) for delta in deltas) == 20_000
        assert [entry.chosen.token_id for delta in deltas for entry in delta.logprobs] == [
            token for delta in deltas for token in delta.token_ids
        ]
    assert sum(m.ByteSize() for m in messages) > 10 << 20
    assert kinds(messages).count("finished") == 2
    assert kinds(messages)[-1] == "summary"


async def test_logprobs_of_a_long_prompt_come_in_messages_that_a_client_takes(serve: Serve) -> None:
    h = await serve({"max_context_tokens": 100_000, "num_blocks": 10_000})
    ids = [i % 256 for i in range(20_000)]
    request = Request(token_ids=ids, sampling=Sampling(max_tokens=1, prompt_logprobs=20))
    messages = await asyncio.wait_for(collect(h.inference.Generate(request)), 60)
    parts = [m.prompt_logprobs for m in messages if m.HasField("prompt_logprobs")]
    assert [entry.chosen.token_id for part in parts for entry in part.tokens] == ids[1:]
    assert sum(part.ByteSize() for part in parts) > 4 << 20
