"""What clients see of the scheduler: refusals with their details, places in the queue, accounts of tenants."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tests.server.harness import Harness, Serve, collect, details, kinds
from twinjet.v1 import admin_pb2, generation_pb2, sampling_pb2

Request = generation_pb2.GenerateRequest


def deployments(**scheduler: Any) -> dict[str, Any]:
    options = {"step_s": 0.005, "max_num_seqs": 1}
    return {"fake": {"engine": "fake", "options": options, "scheduler": scheduler}}


def request(max_tokens: int = 4, *, tenant: str = "", report_queue: bool = False) -> Request:
    return Request(
        text="x",
        sampling=sampling_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        options=generation_pb2.RequestOptions(tenant=tenant, report_queue=report_queue),
    )


async def refusal(h: Harness, asked: Request) -> dict[str, Any]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(h.inference.Generate(asked))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    found = details(caught.value)
    assert found["RetryInfo"].retry_delay.ToNanoseconds() > 0
    return found


async def test_a_full_queue_refuses_with_a_retry_delay_and_names_no_quota(serve: Serve) -> None:
    h = await serve(deployments=deployments(max_waiting=1, early_tokens=0))
    running = h.inference.Generate(request(4000))
    assert (await running.read()).HasField("started")
    waiting = asyncio.create_task(collect(h.inference.Generate(request())))
    dispatcher = h.server.deployments.by_name["fake"].dispatcher
    await h.until(lambda: dispatcher.totals().waiting == 1)
    assert "QuotaFailure" not in await refusal(h, request())
    running.cancel()
    assert kinds(await waiting)[-1] == "summary"


async def test_a_spent_quota_is_named_and_other_tenants_go_on(serve: Serve) -> None:
    h = await serve(
        deployments=deployments(tenants={"a": {"tokens_per_minute": 10}, "b": {"max_streams": 1}})
    )
    assert kinds(await collect(h.inference.Generate(request(40, tenant="a"))))[-1] == "summary"
    (violation,) = (await refusal(h, request(tenant="a")))["QuotaFailure"].violations
    assert violation.subject == "tenant:a"
    assert "10 tokens a minute" in violation.description
    running = h.inference.Generate(request(4000, tenant="b"))
    assert (await running.read()).HasField("started")
    (violation,) = (await refusal(h, request(tenant="b")))["QuotaFailure"].violations
    assert "1 concurrent streams" in violation.description
    running.cancel()
    assert kinds(await collect(h.inference.Generate(request(tenant="c"))))[-1] == "summary"


async def test_queued_events_tell_the_place_and_get_load_the_tenants(serve: Serve) -> None:
    h = await serve(deployments=deployments(early_tokens=0, report_interval_s=0.01))
    running = h.inference.Generate(request(4000, tenant="heavy"))
    assert (await running.read()).HasField("started")
    calls = []
    for place in range(2):
        call = h.inference.Generate(request(tenant="light", report_queue=True))
        queued = await call.read()
        assert queued.HasField("queued")
        assert queued.queued.position == place
        calls.append(call)
    (load,) = (await h.admin.GetLoad(admin_pb2.GetLoadRequest())).models
    assert {t.tenant: (t.waiting, t.running) for t in load.tenants} == {"heavy": (0, 1), "light": (2, 0)}
    running.cancel()
    for call in calls:
        messages = await collect(call)
        assert kinds(messages)[-1] == "summary"
    started = next(m.started for m in messages if m.HasField("started"))
    assert started.queue_position == 1


async def test_a_priority_above_the_deployments_bound_is_refused_and_the_bound_told(serve: Serve) -> None:
    h = await serve(deployments=deployments(max_priority=5))
    message = generation_pb2.ChatMessage(role="user", content="x")

    def asked(priority: int) -> tuple[Any, Any]:
        options = generation_pb2.RequestOptions(priority=priority)
        sampling = sampling_pb2.SamplingParams(max_tokens=2)
        chat = generation_pb2.ChatRequest(messages=[message], sampling=sampling, options=options)
        return h.inference.Generate(Request(text="x", sampling=sampling, options=options)), h.inference.Chat(
            chat
        )

    for call in asked(6):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = details(caught.value)["BadRequest"].field_violations
        assert violation.field == "options.priority"
        assert "-100 to 5" in violation.description
    for priority in (5, 0, -100):
        for call in asked(priority):
            assert kinds(await collect(call))[-1] == "summary"
