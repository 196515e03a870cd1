"""Dynamo's unmodified front end and TensorRT-LLM sidecar serve OpenAI chat through OpenEngine."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.engines.factories import double_installed
from tests.protocols import dynamo
from tests.server.harness import Harness, Serve
from twinjet.protocols.openengine.control import ControlServicer
from twinjet.v1 import admin_pb2, generation_pb2

ON = {"openengine": {"enabled": True, "tenant": "dynamo"}}
ENGINES = {
    "fake": {"engine": "fake", "options": {"step_s": 0.01}},
    "tensorrt_llm": {"engine": "tensorrt_llm", "options": {"max_seq_len": 4096}},
}


@pytest.fixture(params=[("grpc", "fake"), ("native", "tensorrt_llm")], ids=lambda p: f"{p[1]}-{p[0]}")
def setup(request: pytest.FixtureRequest) -> Any:
    """The door and the engine: each engine once, each door once."""
    dynamo.require()
    return request.param


@pytest.fixture
def door(setup: tuple[str, str]) -> str:
    return setup[0]


async def test_openai_chat_streams_cancels_and_survives_an_engine(
    serve: Serve, setup: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborts: list[str] = []
    abort = ControlServicer.Abort

    async def noted(self: ControlServicer, request: Any, context: Any) -> Any:
        response = await abort(self, request, context)
        aborts.append(request.request_id)
        return response

    monkeypatch.setattr(ControlServicer, "Abort", noted)
    model = dynamo.write_model(tmp_path / "model")
    with contextlib.ExitStack() as stack:
        if setup[1] == "tensorrt_llm":
            stack.enter_context(double_installed("1.3"))
        deployment = ENGINES[setup[1]] | {"model": str(model), "max_restarts": 3}
        h = await serve(deployments={"toy": deployment}, protocols=ON)
        async with dynamo.running(h.server.address, model, tmp_path) as front:
            await _answers(h, front)
            await _streams(front)
            await _cancels(h, front, aborts)
            await _survives(h, front)


async def _answers(h: Harness, front: dynamo.Dynamo) -> None:
    """The text is the one that our own contract gives for the same prompt and settings."""
    sampling = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 11}
    status, body = await front.chat("Hello", **sampling, ignore_eos=True)
    assert status == 200, body
    prompt = [*b"user: Hello\nassistant: "]
    ours = generation_pb2.GenerateRequest(token_ids=prompt, sampling=sampling)
    messages = [m async for m in h.inference.Generate(ours)]
    text = "".join(m.delta.text for m in messages)
    assert body["choices"][0]["message"]["content"].rstrip("\ufffd") == text.rstrip("\ufffd")
    summary = messages[-1].summary.usage
    assert body["usage"]["prompt_tokens"] == len(prompt) == summary.prompt_tokens
    assert body["usage"]["completion_tokens"] == summary.output_tokens


async def _streams(front: dynamo.Dynamo) -> None:
    chunks = await front.stream(
        "Hello", max_tokens=8, seed=3, ignore_eos=True, logprobs=True, top_logprobs=2,
        stream_options={"include_usage": True},
    )  # fmt: skip
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    rows = [row for choice in choices for row in ((choice.get("logprobs") or {}).get("content") or [])]
    assert len(rows) == 8
    # Dynamo adds the token itself where it is not among the best.
    assert {len(row["top_logprobs"]) for row in rows} <= {2, 3}
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]
    assert chunks[-1]["usage"]["completion_tokens"] == 8


async def _cancels(h: Harness, front: dynamo.Dynamo, aborts: list[str]) -> None:
    """A client that leaves ends the engine's work; the sidecar says so by Abort, and gets an answer."""
    chunks = await front.stream("Hello", most=3, max_tokens=3000, ignore_eos=True)
    assert len(chunks) == 3
    await h.until(lambda: len(h.server.live) == 0)
    await h.until(lambda: len(aborts) > 0)
    load = await h.admin.GetLoad(admin_pb2.GetLoadRequest())
    assert [t.tenant for t in load.models[0].tenants] in ([], ["dynamo"])
    assert load.models[0].running == 0
    assert "failed to abort" not in front.logs().lower()


async def _survives(h: Harness, front: dynamo.Dynamo) -> None:
    """An engine that dies fails what it had, and is there again for what comes after."""
    num_engines = len(h.engines)
    other = asyncio.create_task(front.chat("bystander", max_tokens=3000, ignore_eos=True))
    await h.until(lambda: len(h.server.live) == 1)
    status, body = await front.chat("!die:3", max_tokens=50, ignore_eos=True)
    assert status >= 500, body
    status, body = await other
    assert status >= 500, body
    await h.until(lambda: len(h.engines) > num_engines)
    await h.until_ready()
    async with asyncio.timeout(dynamo.ANSWER_S):
        while (answer := await front.chat("Hello again", max_tokens=5, ignore_eos=True))[0] != 200:
            assert answer[0] == 503, answer
            await asyncio.sleep(0.2)
    assert answer[1]["usage"]["completion_tokens"] == 5
