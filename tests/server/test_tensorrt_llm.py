"""The server with a TensorRT-LLM deployment: on the stand-in, and where the package is missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.engines.factories import DOUBLES, MODEL, double_installed
from tests.server.harness import Serve, details
from tests.server.processes import Service, command_of, descendants, is_alive, server
from tests.server.test_kv_zmq import Subscriber
from twinjet.client import AsyncClient, BadRequest, Options, RetryPolicy, Sampling, Unavailable
from twinjet.v1 import admin_pb2, generation_pb2, model_pb2, sampling_pb2

Request = generation_pb2.GenerateRequest
TRT = {"trt": {"engine": "tensorrt_llm", "model": str(MODEL), "options": {"max_seq_len": 2048}}}


@pytest.fixture(params=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    with double_installed(request.param):
        yield request.param


async def test_streams_from_the_stand_in(serve: Serve, version: str) -> None:
    h = await serve(deployments=TRT)
    sampling = sampling_pb2.SamplingParams(max_tokens=12, ignore_eos=True, seed=3, n=2, logprobs=2)
    messages = [m async for m in h.inference.Generate(Request(text="Hello", sampling=sampling))]
    assert messages[0].started.engine == "tensorrt_llm"
    ends = [m.finished for m in messages if m.HasField("finished")]
    assert sorted(end.output_index for end in ends) == [0, 1]
    assert {end.output_tokens for end in ends} == {12}
    assert messages[-1].summary.usage.output_tokens == 24
    assert messages[-1].summary.sampler == "twinjet"


async def _end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        continue


async def test_kv_events_are_watched_where_they_are_switched_on(serve: Serve, version: str) -> None:
    zmq = {"endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*"}
    h = await serve(deployments={"trt": TRT["trt"] | {"kv_events": True, "kv_zmq": zmq}})
    watch = h.admin.WatchKvEvents(admin_pb2.WatchKvEventsRequest())
    messages = [await watch.read()]
    prompt = [b % 100 for b in range(70)]
    sampling = sampling_pb2.SamplingParams(max_tokens=1)
    assert [m async for m in h.inference.Generate(Request(token_ids=prompt, sampling=sampling))]

    def told() -> list[int]:
        stored = [e.stored for m in messages for e in m.events if e.HasField("stored")]
        return [t for s in stored for t in s.token_ids]

    async with asyncio.timeout(30):
        while prompt[:64] != [t for t in told() if t in prompt][-64:]:
            messages.append(await watch.read())
    assert len({m.epoch for m in messages}) == 1
    assert {m.deployment for m in messages} == {"trt"}
    again = admin_pb2.WatchKvEventsRequest(epoch=messages[-1].epoch, start_sequence=messages[-1].sequence)
    delta = await h.admin.WatchKvEvents(again).read()
    assert delta.kind == admin_pb2.KV_BATCH_KIND_DELTA
    assert delta.events == messages[-1].events
    publisher = h.server.deployments.by_name["trt"].kv_publisher
    assert publisher is not None
    with contextlib.closing(Subscriber(publisher)) as subscriber:
        await subscriber.replay(0)
        told_by_zmq = [block[1] for block in subscriber.blocks.values()]
    assert prompt[:64] == [t for tokens in told_by_zmq for t in tokens if t in prompt][-64:]
    await h.engines[-1].stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _end(watch)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(caught.value)["ErrorInfo"].reason == "ENGINE_ENDED"


async def test_get_model_says_what_is_in_use(serve: Serve, version: str) -> None:
    h = await serve(deployments=TRT)
    model = (await h.models.GetModel(model_pb2.GetModelRequest())).model
    assert model.engine.name == "tensorrt_llm"
    assert model.engine.version.startswith(version)
    assert model.sampler.implementation == "twinjet"
    assert model.block_manager.implementation == "engine"
    assert "no public place" in model.block_manager.reason
    assert model.kv_cache.block_size == 32


async def test_what_is_not_possible_is_refused_by_name(serve: Serve, version: str) -> None:
    deployments = {"trt": TRT["trt"] | {"native_sampler": False}}
    h = await serve(deployments=deployments)
    request = Request(text="Hello", sampling=sampling_pb2.SamplingParams(allowed_token_ids=[97]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.inference.Generate(request).read()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert details(caught.value)["ErrorInfo"].metadata["capability"].lower().endswith("allowed_token_ids")


async def test_a_death_is_told_and_the_engine_comes_back(serve: Serve, version: str) -> None:
    h = await serve(deployments=TRT)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in h.inference.Generate(Request(text="!die:2")):
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await h.until(lambda: len(h.engines) == 2)
    await h.until_ready()
    messages = [m async for m in h.inference.Generate(Request(text="Hello", sampling={"max_tokens": 3}))]
    assert messages[-1].HasField("summary")


async def test_the_metadatas_trace_context_reaches_the_engine(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with double_installed("1.3"):
        h = await serve(deployments=TRT)
        llm = h.engines[0]._handle.llm
        seen, real = [], llm.generate_async
        monkeypatch.setattr(llm, "generate_async", lambda *a, **k: seen.append(k) or real(*a, **k))
        for sent in (trace, "00-nonsense"):
            metadata = (("traceparent", sent), ("tracestate", "a=1"))
            request = Request(text="Hello", sampling=sampling_pb2.SamplingParams(max_tokens=1))
            assert [m async for m in h.inference.Generate(request, metadata=metadata)]
    assert [k.get("trace_headers") for k in seen] == [{"traceparent": trace, "tracestate": "a=1"}, None]


@pytest.mark.parametrize(
    ("version", "number", "is_repeated"),
    [("1.3", signal.SIGINT, False), ("1.2", signal.SIGTERM, True)],
    ids=["Ctrl-C", "SIGTERM twice"],
)
def test_a_signal_to_the_process_group_is_for_the_server_alone(
    tmp_path: Path, version: str, number: signal.Signals, is_repeated: bool
) -> None:
    """Running requests finish, or end as the server says at a second one; MPI's processes go with the engine."""
    settings = (
        f'[deployments.trt]\nengine = "tensorrt_llm"\nmodel = "{MODEL}"\noptions = {{ max_seq_len = 2048 }}\n'
    )
    environment = {
        "PYTHONPATH": os.pathsep.join([str(DOUBLES), *sys.path]),
        "TENSORRT_LLM_DOUBLE": version,
        "TENSORRT_LLM_DOUBLE_DAEMON": "1",
    }
    with server(tmp_path, settings, environment=environment, grace_s=600) as (process, address):
        service = Service(process, address)
        (daemon,) = [pid for pid in descendants(process.pid) if b"mpi4py" in command_of(pid)]
        sampling = sampling_pb2.SamplingParams(max_tokens=1000, ignore_eos=True)
        # One never gets a token, so that it does not end in between.
        text = "!stall" if is_repeated else "Hello"
        events = service.inference.Generate(Request(text=text, sampling=sampling))
        service.until(lambda: service.load("trt").running == 1, 60)
        os.killpg(process.pid, number)
        service.until(lambda: service.status("trt") != health_pb2.HealthCheckResponse.SERVING, 60)
        if is_repeated:
            assert is_alive(daemon)
            os.killpg(process.pid, number)
            with pytest.raises(grpc.RpcError) as caught:
                list(events)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
            assert "shutting down" in caught.value.details()  # type: ignore[attr-defined]
        else:
            assert list(events)[-1].HasField("summary")
        assert process.wait(120) == 0
        assert not is_alive(daemon)
        service.channel.close()


CONFIG = """
[server]
port = 0
[deployments.llama]
engine = "tensorrt_llm"
model = "/models/llama"
[deployments.other]
engine = "fake"
"""


async def run_serve(tmp_path: Path, *flags: str) -> asyncio.subprocess.Process:
    config = tmp_path / "twinjet.toml"
    config.write_text(CONFIG)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "twinjet.cli", "serve", "--config", str(config), *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


async def test_a_missing_package_ends_the_server_with_what_to_install(tmp_path: Path) -> None:
    process = await run_serve(tmp_path)
    async with asyncio.timeout(120):
        output, _ = await process.communicate()
    assert process.returncode == 2
    assert b"pip install 'twinjet[tensorrt-llm]'" in output
    assert b"NVIDIA GPU" in output
    assert b"Traceback" not in output


async def test_a_missing_package_leaves_the_others_where_that_is_allowed(tmp_path: Path) -> None:
    process = await run_serve(tmp_path, "--allow-partial")
    assert process.stdout is not None
    seen = b""
    async with asyncio.timeout(120):
        while b"grpcurl" not in seen:
            line = await process.stdout.readline()
            assert line, f"the server ended: {seen.decode()}"
            seen += line
        process.send_signal(signal.SIGTERM)
        rest, _ = await process.communicate()
    assert process.returncode == 0, (seen + rest).decode()
    assert b"serving other on" in seen
    assert b'"model": "other"' in seen


TWO_PARTS = {
    name: TRT["trt"]
    | {
        "options": {
            "max_seq_len": 2048,
            "cache_transceiver_config": {"backend": "DEFAULT"},
            "disable_overlap_scheduler": name == "prefill",
        }
    }
    for name in ("prefill", "decode")
}


async def test_a_prompt_here_and_its_output_there(serve: Serve, version: str) -> None:
    h = await serve(deployments=TWO_PARTS)
    async with AsyncClient(h.server.address) as client:
        sampling = Sampling(max_tokens=20, ignore_eos=True, logprobs=2)
        first = await client.generate(
            "Hello", sampling, model="prefill", options=Options(prefill_only=True)
        ).completion()
        assert first.handoff is not None and not first.outputs and first.text == ""
        assert first.handoff.seed == first.summary.seed
        assert first.started.deployment == "prefill"
        second = await client.generate(
            "Hello", sampling, model="decode", options=Options(handoff=first.handoff)
        ).completion()
        assert second.summary.seed == first.handoff.seed
        whole = await client.generate(
            "Hello", replace(sampling, seed=first.handoff.seed), model="decode"
        ).completion()
        assert second.outputs == whole.outputs
        with pytest.raises(BadRequest, match="has been used"):
            await client.generate(
                "Hello", sampling, model="decode", options=Options(handoff=first.handoff)
            ).completion()
        chat = await client.chat(
            "Hi", Sampling(prompt_logprobs=None), model="prefill", options=Options(prefill_only=True)
        ).completion()
        assert chat.handoff is not None
        with pytest.raises(BadRequest, match=r"sampling\.n"):
            await client.generate(
                "x", Sampling(n=2), model="prefill", options=Options(prefill_only=True)
            ).completion()


async def test_a_handoff_that_an_engine_has_used_goes_nowhere_else(
    serve: Serve, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = await serve(
        deployments=TWO_PARTS | {"other": TWO_PARTS["decode"]},
        routes={
            "prefill": {"weights": {"prefill": 1}},
            "out": {"weights": {"decode": 1}, "fallback": ["other"]},
        },
    )
    decode, other = (next(e for e in h.engines if e._name == name) for name in ("decode", "other"))
    taken: list[Any] = []

    def wait_for_ever(request: Any) -> None:
        """Blocks that are on their way and do not come."""
        taken.append(request)
        decode._handle.llm._active.remove(request)

    monkeypatch.setattr(decode._handle.llm, "_take_over", wait_for_ever)
    monkeypatch.setattr(other, "submit", lambda *_: pytest.fail("it went elsewhere"))
    async with AsyncClient(h.server.address, retry=RetryPolicy(attempts=1)) as client:
        first = await client.generate(
            "Hello", model="prefill", options=Options(prefill_only=True)
        ).completion()
        options = Options(handoff=first.handoff)
        call = asyncio.create_task(client.generate("Hello", model="out", options=options).completion())
        await h.until(lambda: bool(taken))
        decode._on_death("killed")
        with pytest.raises(Unavailable, match="killed"):
            await call
