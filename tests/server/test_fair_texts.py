"""A flood of long texts, through both doors: others' texts are tokenized in between."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.harness import Serve, collect
from twinjet.engines.fake import FakeTokenizer
from twinjet.fair_threads import FairThreads
from twinjet.server.encoding import INLINE_CHARS
from twinjet.v1 import generation_pb2 as pb
from twinjet.v1 import sampling_pb2, service_pb2_grpc, tokenization_pb2

LONG = "x" * (INLINE_CHARS + 1)
NUM_THREADS = max(2, os.cpu_count() or 2)


class Texts:
    """What comes to be tokenized, for whom, and what of it was begun, by its first letter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.callers: list[str] = []
        self.begun: list[str] = []
        self.go = threading.Event()
        encode, run = FakeTokenizer.encode, FairThreads.run

        def gated(tokenizer: FakeTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
            if len(text) > INLINE_CHARS:
                self.begun.append(text.removeprefix("user: ")[0])
                assert self.go.wait(30)
            return encode(tokenizer, text, add_special_tokens=add_special_tokens)

        async def told(threads: FairThreads, size: int, work: Callable[[], Any], caller: str) -> Any:
            self.callers.append(caller)
            return await run(threads, size, work, caller)

        monkeypatch.setattr(FakeTokenizer, "encode", gated)
        monkeypatch.setattr(FairThreads, "run", told)


async def _ask(stub: service_pb2_grpc.InferenceServiceStub, method: str, text: str, tenant: str) -> None:
    options, sampling = pb.RequestOptions(tenant=tenant), sampling_pb2.SamplingParams(max_tokens=1)
    if method == "Generate":
        await collect(stub.Generate(pb.GenerateRequest(text=text, options=options, sampling=sampling)))
    elif method == "Chat":
        messages = [pb.ChatMessage(role="user", content=text)]
        await collect(stub.Chat(pb.ChatRequest(messages=messages, options=options, sampling=sampling)))
    elif method == "Tokenize":
        await stub.Tokenize(tokenization_pb2.TokenizeRequest(text=text))
    else:
        await stub.Detokenize(tokenization_pb2.DetokenizeRequest(token_ids=text.encode()))


@pytest.mark.parametrize("method", ["Generate", "Chat", "Tokenize", "Detokenize"])
@pytest.mark.parametrize("tenant", ["neighbour", ""])
async def test_a_flood_of_long_texts_holds_up_no_one_else(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, method: str, tenant: str
) -> None:
    harness = await serve()
    texts = Texts(monkeypatch)
    num_asked = NUM_THREADS + 20
    flood = [
        asyncio.create_task(_ask(harness.inference, "Generate", "f" + LONG, "flood"))
        for _ in range(num_asked)
    ]
    await harness.until(lambda: len(texts.callers) == num_asked and len(texts.begun) == NUM_THREADS)
    neighbour = asyncio.create_task(_ask(harness.inference, method, "n" + LONG, tenant))
    await harness.until(lambda: len(texts.callers) > num_asked)
    assert texts.callers == ["flood"] * num_asked + [texts.callers[-1]]
    is_told = tenant and method in ("Generate", "Chat")
    assert texts.callers[-1] == ("neighbour" if is_told else "address ipv4:127.0.0.1")
    texts.go.set()
    await asyncio.gather(*flood, neighbour)
    if method != "Detokenize":
        assert "n" in texts.begun[: NUM_THREADS + 3]
