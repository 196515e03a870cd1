"""The same request gives the same tokens alone and among others, through the real service and our sampler."""

from __future__ import annotations

import asyncio

import grpc

from tests.server.harness import Harness, Serve, collect, details
from twinjet.v1 import generation_pb2, sampling_pb2

VARIED = [
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    {"temperature": 0.0},
]


def _request(i: int) -> generation_pb2.GenerateRequest:
    sampling = sampling_pb2.SamplingParams(max_tokens=24, seed=1000 + i, **VARIED[i % len(VARIED)])
    return generation_pb2.GenerateRequest(text=f"request {i}", sampling=sampling)


async def _tokens(h: Harness, i: int) -> list[int]:
    messages = await collect(h.inference.Generate(_request(i)))
    assert messages[-1].summary.sampler == "twinjet"
    return [token for message in messages for token in message.delta.token_ids]


async def test_concurrency_changes_no_token(serve: Serve) -> None:
    h = await serve({"output": "logits", "max_num_seqs": 16})
    alone = [await _tokens(h, i) for i in range(16)]
    together = await asyncio.gather(*(_tokens(h, i) for i in range(16)))
    shuffled = await asyncio.gather(*(_tokens(h, i) for i in reversed(range(16))))
    assert list(together) == alone
    assert list(reversed(shuffled)) == alone
    assert len({tuple(tokens) for tokens in alone}) == 16, "the requests were not different"


async def test_a_row_without_an_admissible_token_ends_alone(serve: Serve) -> None:
    h = await serve({"output": "logits", "max_num_seqs": 4})
    barred = generation_pb2.GenerateRequest(
        text="x", sampling=sampling_pb2.SamplingParams(allowed_token_ids=[97], bad_words=["a"])
    )
    alone = await _tokens(h, 0)
    failing, neighbour = await asyncio.gather(
        collect(h.inference.Generate(barred)), _tokens(h, 0), return_exceptions=True
    )
    assert isinstance(failing, grpc.aio.AioRpcError)
    assert details(failing)["ErrorInfo"].reason == "NO_ADMISSIBLE_TOKEN"
    assert neighbour == alone
    await h.until_idle()
