"""Calls through Envoy arrive as they were made: details, deadlines, cancels, gRPC-Web, JSON; and not where they may not."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import urllib.error
import urllib.request
from collections import Counter
from typing import Any

import grpc
import pytest

from tests.scale_out.conftest import StartEnvoy
from tests.server.harness import Harness, Serve, collect, kinds, text_of
from twinjet.engines.fake import FakeEngine
from twinjet.routing.prefix import PREFIX_KEY
from twinjet.v1 import admin_pb2, generation_pb2, model_pb2, service_pb2_grpc

Request = generation_pb2.GenerateRequest
DETAILS = "grpc-status-details-bin"
JSON = {"content-type": "application/json"}
GENERATE = "/twinjet.v1.InferenceService/Generate"


def stub(channel: grpc.aio.Channel) -> Any:
    return service_pb2_grpc.InferenceServiceStub(channel)


async def test_a_stream_has_all_its_events_and_no_load_report(serve: Serve, envoy: StartEnvoy) -> None:
    h = await serve()
    proxy = await envoy([h])
    async with proxy.channel() as channel:
        call = stub(channel).Generate(
            Request(text="x", sampling={"max_tokens": 20}), metadata=[("x-request-id", "mine")]
        )
        messages = await collect(call)
        assert kinds(messages)[0] == "started" and kinds(messages)[-1] == "summary"
        assert len(text_of(messages)) == 20
        assert dict(await call.initial_metadata())["twinjet-request-id"].startswith("mine-")
        assert "endpoint-load-metrics-bin" not in dict(await call.trailing_metadata())


BAD = [
    Request(),
    Request(text="x", model="none"),
    Request(text="x", sampling={"temperature": -1, "top_p": 7}),
    Request(text="x", options={"adapter": "none"}),
    Request(text="!fail"),
]


@pytest.mark.parametrize("request_", BAD, ids=["empty", "model", "range", "adapter", "internal"])
async def test_details_arrive_byte_for_byte_by_grpc_and_by_grpc_web(
    serve: Serve, envoy: StartEnvoy, request_: Request
) -> None:
    h = await serve()
    proxy = await envoy([h])

    async def refusal(channel: grpc.aio.Channel) -> tuple[int, str | None, bytes]:
        call = stub(channel).Generate(request_)
        with pytest.raises(grpc.aio.AioRpcError):
            await collect(call)
        return (
            (await call.code()).value[0],
            await call.details(),
            dict(await call.trailing_metadata())[DETAILS],
        )

    direct = await refusal(h.channel)
    assert direct[0] != 0 and direct[2]
    async with proxy.channel() as channel:
        assert await refusal(channel) == direct
    _, trailers = await _grpc_web(proxy.address, GENERATE, request_.SerializeToString())
    details = trailers[DETAILS]
    assert base64.b64decode(details + "=" * (-len(details) % 4)) == direct[2]
    assert int(trailers["grpc-status"]) == direct[0]


async def test_grpc_web_streams(serve: Serve, envoy: StartEnvoy) -> None:
    h = await serve()
    proxy = await envoy([h])
    request = Request(text="x", sampling={"max_tokens": 5})
    frames, trailers = await _grpc_web(proxy.address, GENERATE, request.SerializeToString())
    messages = [generation_pb2.GenerateResponse.FromString(frame) for frame in frames]
    assert kinds(messages)[-1] == "summary" and len(text_of(messages)) == 5
    assert trailers["grpc-status"] == "0" and "endpoint-load-metrics-bin" not in trailers


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
async def test_curl_gets_json(serve: Serve, envoy: StartEnvoy) -> None:
    h = await serve()
    proxy = await envoy([h])

    async def curl(method: str, body: str) -> tuple[int, list[Any]]:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sN", "-w", "\n%{http_code}", "-H", "content-type: application/json", "-d", body,
            f"http://{proxy.address}/twinjet.v1.{method}", stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        *lines, code = out.decode().splitlines()
        return int(code), [json.loads(line) for line in lines if line]

    code, events = await curl("InferenceService/Generate", '{"text": "x", "sampling": {"max_tokens": 4}}')
    assert code == 200
    assert "started" in events[0] and "summary" in events[-1]
    assert len("".join(event.get("delta", {}).get("text", "") for event in events)) == 4
    code, [models] = await curl("ModelService/ListModels", "{}")
    assert code == 200 and models["models"][0]["name"] == "fake"
    code, [error] = await curl("InferenceService/Generate", '{"text": "x", "sampling": {"top_p": 7}}')
    assert code == 400 and error["code"] == 3
    fields = [
        v["field"] for d in error["details"] for v in d.get("field_violations", d.get("fieldViolations", ()))
    ]
    assert fields == ["sampling.top_p"]
    code, [error] = await curl("InferenceService/Generate", '{"text": "x", "model": "none"}')
    assert code == 404 and error["code"] == 5


async def test_operators_calls_do_not_pass(serve: Serve, envoy: StartEnvoy) -> None:
    """The server takes Envoy, which is on its machine, for an operator."""
    h = await serve()
    proxy = await envoy([h])
    await h.admin.GetLoad(admin_pb2.GetLoadRequest())
    async with proxy.channel() as channel:
        admin = service_pb2_grpc.AdminServiceStub(channel)
        for call in (admin.GetLoad(admin_pb2.GetLoadRequest()), admin.Drain(admin_pb2.DrainRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        for method in (
            "/grpc.channelz.v1.Channelz/GetServers",
            "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics",
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(method)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for path in ("/twinjet.v1.AdminService/Drain", "//twinjet.v1.AdminService/Drain"):
        assert (await _post(proxy.address, path, b"{}", JSON))[0] == 404
    assert not h.server.deployments.is_draining


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Steps of the fake engine, by request id."""
    counts: Counter[str] = Counter()
    step = FakeEngine._step

    def count(self: FakeEngine, sequence: Any, rows: Any) -> None:
        counts[sequence.request.request_id] += 1
        step(self, sequence, rows)

    monkeypatch.setattr(FakeEngine, "_step", count)
    return counts


async def test_a_cancel_stops_the_engine_within_a_step(
    serve: Serve, envoy: StartEnvoy, steps: Counter[str]
) -> None:
    h = await serve({"step_s": 1.0})
    proxy = await envoy([h])
    async with proxy.channel() as channel:
        call = stub(channel).Generate(Request(text="x", options={"request_id": "r"}))
        while (await call.read()).WhichOneof("event") != "delta":
            pass
        before = steps["r"]
        call.cancel()
        await h.until_idle()
        assert steps["r"] <= before + 1


async def test_a_deadline_stops_the_engine_within_a_step_and_is_told_by_the_server(
    serve: Serve, envoy: StartEnvoy, steps: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = await serve({"step_s": 0.5})
    proxy = await envoy([h])
    deadlines: list[float] = []
    submit = FakeEngine.submit

    def spy(self: FakeEngine, request: Any, run: Any) -> None:
        deadlines.append(request.deadline)
        submit(self, request, run)

    monkeypatch.setattr(FakeEngine, "submit", spy)
    async with proxy.channel() as channel:
        call = stub(channel).Generate(Request(text="x", options={"request_id": "r"}), timeout=2.2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(deadlines) == 1 and deadlines[0] is not None
        await h.until_idle()
        assert 1 <= steps["r"] <= 2.2 / 0.5 + 1


@pytest.mark.parametrize(("text", "told"), [("!fail:3", ["started", "delta"]), ("!stall", ["code"])])
async def test_a_json_stream_that_fails_has_no_summary(
    serve: Serve, envoy: StartEnvoy, text: str, told: list[str]
) -> None:
    """The HTTP status has been sent by then, and Envoy writes the gRPC status into the body only if that is empty."""
    h = await serve()
    proxy = await envoy([h])
    body = json.dumps({"text": text, "sampling": {"max_tokens": 4}}).encode()
    code, _, data = await _post(proxy.address, GENERATE, body, JSON | {"grpc-timeout": "1500m"})
    lines = [json.loads(line) for line in data.splitlines()]
    assert code == 200
    assert [next(iter(line)) for line in lines[: len(told)]] == told
    assert not any("summary" in line for line in lines)
    await h.until_idle()


async def test_what_a_replica_does_not_take_goes_to_another(serve: Serve, envoy: StartEnvoy) -> None:
    """One refuses all by being drained, which its health has not told yet."""
    servers = [await serve() for _ in range(2)]
    proxy = await envoy(servers)
    servers[0].server.deployments.drain()
    async with proxy.channel() as channel:
        for _ in range(20):
            await collect(stub(channel).Generate(Request(text="x", sampling={"max_tokens": 1})))
    assert _served(servers[1]) == 20


async def test_what_a_replica_has_begun_is_not_tried_again(serve: Serve, envoy: StartEnvoy) -> None:
    servers = [await serve({"step_s": 0.05}) for _ in range(2)]
    proxy = await envoy(servers)
    async with proxy.channel() as channel:
        call = stub(channel).Generate(Request(text="x"))
        await call.read()
        (busy,) = (h for h in servers if len(h.server.live))
        busy.engine.die()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert all(h.server.live is not None and len(h.server.live) == 0 for h in servers)


async def test_a_prefix_key_keeps_calls_at_one_replica(serve: Serve, envoy: StartEnvoy) -> None:
    servers = [await serve() for _ in range(4)]
    proxy = await envoy(servers)
    async with proxy.channel() as channel:
        where: dict[int, int] = {}
        for i in range(12):
            prompt = Request(text=f"{i} " * 200, sampling={"max_tokens": 1})
            first = stub(channel).Generate(prompt)
            await collect(first)
            key = dict(await first.initial_metadata())[PREFIX_KEY]
            before = [_served(h) for h in servers]
            for _ in range(4):
                await collect(stub(channel).Generate(prompt, metadata=[(PREFIX_KEY, key)]))
            (where[i],) = (j for j, h in enumerate(servers) if _served(h) == before[j] + 4)
    assert len(set(where.values())) > 1


async def test_reflection_and_health_pass(serve: Serve, envoy: StartEnvoy) -> None:
    h = await serve()
    proxy = await envoy([h])
    async with proxy.channel() as channel:
        health = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await health(b"\x0a\x04fake") == b"\x08\x01"
        models = service_pb2_grpc.ModelServiceStub(channel)
        assert (await models.ListModels(model_pb2.ListModelsRequest())).models[0].name == "fake"


def _served(h: Harness) -> int:
    sample = h.server.metrics.registry.get_sample_value
    return int(sample("twinjet_calls_total", {"method": "Generate", "code": "OK"}) or 0)


async def _post(
    address: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, dict[str, str], bytes]:
    def read(answer: Any) -> tuple[int, dict[str, str], bytes]:
        with answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()

    def post() -> tuple[int, dict[str, str], bytes]:
        request = urllib.request.Request(f"http://{address}{path}", data=body, headers=headers)
        try:
            return read(urllib.request.urlopen(request, timeout=30))
        except urllib.error.HTTPError as error:
            return read(error)

    return await asyncio.to_thread(post)


async def _grpc_web(address: str, path: str, message: bytes) -> tuple[list[bytes], dict[str, str]]:
    """Call as a browser does; gives the messages and the trailers, which are a message or, of a refusal, headers."""
    body = b"\0" + len(message).to_bytes(4, "big") + message
    _, headers, data = await _post(
        address, path, body, {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
    )
    frames: list[bytes] = []
    trailers = headers
    while data:
        size = int.from_bytes(data[1:5], "big")
        flag, frame, data = data[0], data[5 : 5 + size], data[5 + size :]
        if flag & 0x80:
            lines = frame.decode().split("\r\n")
            trailers = {
                k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)
            }
        else:
            frames.append(frame)
    return frames, trailers
