"""The native door carries streams past Python: the handler begins and ends them, and steps in for slow readers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.harness import Serve, collect, kinds, text_of
from twinjet.server import native_door
from twinjet.server.stream import StreamWriter
from twinjet.v1 import generation_pb2, sampling_pb2

Request = generation_pb2.GenerateRequest
Sampling = sampling_pb2.SamplingParams


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What handlers wrote in Python."""
    messages: list[bytes] = []
    write = StreamWriter.write

    async def spy(self: StreamWriter, message: bytes) -> None:
        messages.append(message)
        await write(self, message)

    monkeypatch.setattr(StreamWriter, "write", spy)
    return messages


@pytest.fixture
def door() -> str:
    if not native_door.is_available():
        pytest.skip("this build has no native door")
    return "native"


async def test_python_writes_only_the_summary(serve: Serve, written: list[bytes]) -> None:
    h = await serve({"step_s": 0.001})
    # Not plain, so that a handler serves it (see test_plain.py).
    options = generation_pb2.RequestOptions(priority=0)
    request = Request(text="x", sampling=Sampling(max_tokens=200, min_tokens=200, seed=1), options=options)
    messages = await collect(h.inference.Generate(request))
    assert kinds(messages)[0] == "started" and kinds(messages)[-2:] == ["finished", "summary"]
    assert len(messages) > 100
    assert written == [messages[-1].SerializeToString()]


async def test_text_is_the_same_however_it_travels(serve: Serve, written: list[bytes]) -> None:
    """A reader that stops for a while: the handler's own writes follow the native ones, and are followed by them."""
    window: list[tuple[str, Any]] = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
    h = await serve({"max_context_tokens": 100_000, "num_blocks": 10_000}, channel_options=window)
    request = Request(text="x", sampling=Sampling(max_tokens=5000, min_tokens=5000, logprobs=20, seed=1))
    call = h.inference.Generate(request)
    messages = [await call.read()]
    await h.until(lambda: len(written) > 0)
    messages += await collect(call)
    assert len(written) > 1
    assert sum(len(m.delta.token_ids) for m in messages) == 5000
    request.sampling.ClearField("logprobs")
    assert text_of(messages) == text_of(await collect(h.inference.Generate(request)))
