"""Loading, death and restart, failure to start, drain."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.harness import Harness, Serve, collect, details, kinds
from twinjet.client import AsyncClient, RetryPolicy, Unavailable
from twinjet.engines.supervisor import State
from twinjet.v1 import admin_pb2, generation_pb2, model_pb2, sampling_pb2

Request = generation_pb2.GenerateRequest
Sampling = sampling_pb2.SamplingParams
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ["", "fake", "twinjet.v1.InferenceService", "twinjet.v1.ModelService", "twinjet.v1.AdminService"]


async def _health(h: Harness, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(h.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def _watch(h: Harness, service: str) -> grpc.aio.UnaryStreamCall:
    return health_pb2_grpc.HealthStub(h.channel).Watch(health_pb2.HealthCheckRequest(service=service))


async def test_while_loading_the_port_answers_and_shows_progress(serve: Serve) -> None:
    h = await serve({"load_s": 1.0}, ready=False)
    assert [await _health(h, name) for name in SERVICES] == [NOT_SERVING] * 5
    await h.until(lambda: h.server.deployments.by_name["fake"].supervisor.progress.done > 0)
    model = (await h.models.GetModel(model_pb2.GetModelRequest())).model
    assert model.state == model_pb2.MODEL_STATE_LOADING
    assert model.loading.phase == "loading nothing"
    assert 0 < model.loading.done < 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(h.inference.Generate(Request(text="x")))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    found = details(caught.value)
    assert found["ErrorInfo"].reason == "LOADING"
    assert found["RetryInfo"].retry_delay.ToNanoseconds() > 0
    await h.until_ready()
    await h.until(lambda: h.server._health_updates.empty())
    assert [await _health(h, name) for name in SERVICES] == [SERVING] * 5
    model = (await h.models.GetModel(model_pb2.GetModelRequest())).model
    assert model.state == model_pb2.MODEL_STATE_READY
    assert not model.HasField("loading")
    assert model.limits.vocab_size == 258


async def test_health_can_be_watched_through_a_death(serve: Serve) -> None:
    h = await serve()
    watch = await _watch(h, "fake")
    seen = [(await watch.read()).status]
    h.engine.die()
    while seen[-2:] != [NOT_SERVING, SERVING]:
        seen.append((await watch.read()).status)
    assert seen == [SERVING, NOT_SERVING, SERVING]
    watch.cancel()


async def test_a_death_ends_every_stream_at_once_and_the_engine_restarts(serve: Serve) -> None:
    h = await serve({"step_s": 0.01})
    calls = [h.inference.Generate(Request(text=f"{i}")) for i in range(8)]
    for call in calls:
        assert (await call.read()).HasField("started")
    h.engine.die()
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(collect(call), 2)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        found = details(caught.value)
        assert found["ErrorInfo"].reason == "ENGINE_DIED_RUNNING"
        assert "RetryInfo" not in found, "nobody shall send as it is what may have ended the engine"
    await h.until(lambda: len(h.engines) == 2)
    await h.until_ready()
    assert kinds(await collect(h.inference.Generate(Request(text="x", sampling=Sampling(max_tokens=1)))))
    load = await h.admin.GetLoad(admin_pb2.GetLoadRequest())
    assert load.models[0].restarts == 1
    await h.until_idle()


async def test_a_death_tells_the_requests_that_only_waited_that_they_may_come_again(serve: Serve) -> None:
    h = await serve({"step_s": 0.01, "max_num_seqs": 1})
    calls = [h.inference.Generate(Request(text="x", options={"report_queue": True})) for _ in range(12)]
    dispatcher = h.server.deployments.by_name["fake"].dispatcher
    await h.until(lambda: dispatcher.load().waiting + dispatcher.load().running == len(calls))
    h.engine.die()
    told = []
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(collect(call), 2)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        found = details(caught.value)
        told.append((found["ErrorInfo"].reason, "RetryInfo" in found))
    assert set(told) == {("ENGINE_DIED_RUNNING", False), ("ENGINE_DIED", True)}


async def test_our_client_does_not_send_a_deadly_request_to_the_next_engine(serve: Serve) -> None:
    h = await serve(deployments={"fake": {"engine": "fake", "max_restarts": 3}})
    async with AsyncClient(h.server.address, retry=RetryPolicy(attempts=4, first_delay_s=0.01)) as client:
        for num_deaths in (1, 2):
            with pytest.raises(Unavailable) as caught:
                await client.generate("!die").text()
            assert caught.value.reason == "ENGINE_DIED_RUNNING"
            await h.until(lambda n=num_deaths: len(h.engines) > n)  # type: ignore[misc]
            await h.until_ready()
        assert len(h.engines) == 3, "one death for each call"


async def test_one_deployments_death_leaves_the_other_serving(serve: Serve) -> None:
    deployments = {name: {"engine": "fake", "options": {"step_s": 0.01}} for name in ("a", "b")}
    h = await serve(deployments=deployments)
    on_a = h.inference.Generate(Request(model="a", text="!die:3"))
    on_b = h.inference.Generate(Request(model="b", text="x", sampling=Sampling(max_tokens=50)))
    with pytest.raises(grpc.aio.AioRpcError):
        await collect(on_a)
    assert kinds(await collect(on_b))[-1] == "summary"
    assert await _health(h, "b") == SERVING
    await h.until_ready()


async def test_an_engine_that_makes_no_progress_is_restarted(serve: Serve) -> None:
    h = await serve(deployments={"fake": {"engine": "fake", "stall_s": 0.3}})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(h.inference.Generate(Request(text="!stall")))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await h.until(lambda: len(h.engines) == 2)
    await h.until_ready()


async def test_a_start_that_dies_is_tried_again(serve: Serve) -> None:
    h = await serve(deployments={"flaky": {"engine": "fake", "options": {"die_at_start": 2}}})
    assert len(h.engines) == 3


async def test_an_engine_that_never_starts_is_given_up_and_says_why(serve: Serve) -> None:
    deployments = {
        "good": {"engine": "fake"},
        "bad": {"engine": "fake", "max_restarts": 1, "options": {"die_at_start": 99}},
    }
    h = await serve(deployments=deployments, ready=False)
    bad = h.server.deployments.by_name["bad"].supervisor
    await h.until(lambda: bad.state is State.FAILED)
    model = (await h.models.GetModel(model_pb2.GetModelRequest(model="bad"))).model
    assert model.state == model_pb2.MODEL_STATE_FAILED
    assert model.failure == "gave up after 1 restarts"
    assert await _health(h, "bad") == NOT_SERVING
    assert await _health(h, "good") == SERVING


async def test_drain_lets_streams_finish_and_refuses_new_ones(serve: Serve) -> None:
    h = await serve({"step_s": 0.01})
    running = h.inference.Generate(Request(text="x", sampling=Sampling(max_tokens=30)))
    await running.read()
    drained = asyncio.ensure_future(h.admin.Drain(admin_pb2.DrainRequest(grace={"seconds": 5})))
    await h.until(lambda: h.server.deployments.is_draining)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(h.inference.Generate(Request(text="late")))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(caught.value)["ErrorInfo"].reason == "DRAINING"
    assert kinds(await collect(running))[-1] == "summary"
    result = await drained
    assert (result.finished, result.ended) == (1, 0)
    model = (await h.models.GetModel(model_pb2.GetModelRequest())).model
    assert model.state == model_pb2.MODEL_STATE_DRAINING
    assert await _health(h, "fake") == NOT_SERVING


async def test_drain_ends_what_outlasts_the_grace_with_unavailable(serve: Serve) -> None:
    h = await serve({"step_s": 0.05})
    running = h.inference.Generate(Request(text="x"))
    await running.read()
    result = await h.admin.Drain(admin_pb2.DrainRequest(grace={"nanos": 100_000_000}))
    assert (result.finished, result.ended) == (0, 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(running)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(caught.value)["ErrorInfo"].reason == "DRAINING"
    await h.until_idle()


async def test_routes_split_by_weight_and_fall_back(serve: Serve) -> None:
    deployments = {
        "a": {"engine": "fake"},
        "b": {"engine": "fake"},
        "spare": {"engine": "fake"},
    }
    routes = {"chat": {"weights": {"a": 3, "b": 1}, "fallback": ["spare"]}}
    h = await serve(deployments=deployments, routes=routes)
    request = Request(text="x", sampling=Sampling(max_tokens=1))

    async def served_by() -> str:
        return (await collect(h.inference.Generate(request)))[0].started.deployment

    counts = [await served_by() for _ in range(80)]
    assert set(counts) == {"a", "b"}
    # 80 draws at 3 : 1; fewer than 41 for a has a chance below 1e-4.
    assert counts.count("a") > 40
    for name in ("a", "b"):
        supervisor = h.server.deployments.by_name[name].supervisor
        await supervisor.stop()
        assert supervisor.state is State.RESTARTING
    assert await served_by() == "spare"
