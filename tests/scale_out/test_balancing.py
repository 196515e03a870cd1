"""Calls are spread as the servers' reports imply, by Envoy and by clients with no proxy at all."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.models.orca import OrcaLoadReport, OrcaLoadReportRequest, weight
from tests.scale_out.conftest import StartEnvoy
from tests.scale_out.envoy import policy
from tests.scale_out.traffic import (
    SHORT,
    install_node_client,
    node_calls,
    python_calls,
    service_config,
    several,
    until_split,
)
from tests.server.harness import Harness, Serve, collect
from twinjet.scheduler.orca import ENVOY_SCALE, OrcaReport
from twinjet.server.load_reports import LoadReports
from twinjet.v1 import generation_pb2

NUM_CALLS = 300
NUM_NODE_CALLS = 100
"""grpc-js 1.14.7 reads its .proto files anew for every report, and does some tens of calls a second."""


def quick(config: dict[str, Any]) -> None:
    """Reports and weights more often than in the configuration for users."""
    policy(config).update(blackout_period="0s", weight_update_period="0.1s", oob_reporting_period="0.1s")


@pytest.fixture
def balancer(request: pytest.FixtureRequest, envoy: StartEnvoy) -> Any:
    """What spreads the calls."""

    async def by_envoy(servers: list[Harness]) -> AbstractAsyncContextManager[None]:
        return python_calls((await envoy(servers, quick)).address)

    async def by_python(servers: list[Harness]) -> AbstractAsyncContextManager[None]:
        return python_calls(several(servers), service_config())

    async def by_node(servers: list[Harness]) -> AbstractAsyncContextManager[None]:
        if not await asyncio.to_thread(install_node_client):
            pytest.skip("npm is missing")
        return node_calls(several(servers), service_config())

    return {"envoy": by_envoy, "python": by_python, "node": by_node}[request.param]


@pytest.mark.parametrize(
    ("balancer", "num_servers", "door", "rate"),
    [
        ("envoy", 2, "grpc", 0.3),
        ("envoy", 8, "native", 20.0),
        ("python", 2, "grpc", 20.0),
        ("python", 8, "native", 0.3),
        ("node", 2, "native", 0.3),
        ("node", 8, "grpc", 20.0),
    ],
    indirect=["balancer"],
)
async def test_the_split_is_that_of_the_reported_weights(
    serve: Serve,
    balancer: Any,
    num_servers: int,
    rate: float,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Replicas with few, long answers a second, too: a balancer that rounds weights must not see them as equal."""
    servers = [await serve() for _ in range(num_servers)]
    reports = [
        OrcaReport(
            application_utilization=u,
            rps=rate * (1 + i % 2),
            # One refuses some of its calls.
            eps=rate / 2 if i == num_servers - 1 else 0.0,
            utilization={},
            named_metrics={"scaled_utilization": u * ENVOY_SCALE, "utilization": 0.5},
        )
        for i, u in enumerate(0.9 - 0.6 * j / (num_servers - 1) for j in range(num_servers))
    ]
    said = {id(h.server.load_reports): r.encode() for h, r in zip(servers, reports, strict=True)}
    monkeypatch.setattr(LoadReports, "_report", lambda self, *, details: said[id(self)])
    weights = [weight(OrcaLoadReport.FromString(r.encode())) for r in reports]
    shares = [w / sum(weights) for w in weights]

    def fits(counts: Counter[int]) -> bool:
        n = counts.total()
        return all(abs(counts[i] / n - p) < 3 * (p * (1 - p) / n) ** 0.5 for i, p in enumerate(shares))

    num_calls = NUM_NODE_CALLS if request.node.callspec.params["balancer"] == "node" else NUM_CALLS
    async with await balancer(servers):
        await until_split(servers, num_calls, fits)


@pytest.mark.parametrize("balancer", ["envoy", "python"], indirect=True)
@pytest.mark.parametrize("door", ["native"])
async def test_a_replica_that_slows_down_loses_calls_and_gets_them_back(serve: Serve, balancer: Any) -> None:
    """By what the servers report themselves; the quickest answers take 8 steps of 4 ms."""
    servers = [await serve({"step_s": 0.004, "max_num_seqs": 16}) for _ in range(4)]
    async with await balancer(servers):
        await until_split(
            servers, 200, lambda counts: min(counts[i] for i in range(4)) > 0.8 * counts.total() / 4
        )
        slowed = servers[1].engine
        normal = slowed._options
        slowed._options = normal.model_copy(update={"step_s": 0.016})
        await until_split(servers, 200, lambda counts: counts[1] < 0.5 * counts.total() / 4)
        slowed._options = normal
        await until_split(servers, 200, lambda counts: counts[1] > 0.8 * counts.total() / 4)


async def test_each_state_of_a_replica_is_told(serve: Serve) -> None:
    """Idle, full, refusing, draining and restarting, by the reports out of band and by health."""
    options = {"step_s": 0.01, "max_num_seqs": 2}
    deployment = {"engine": "fake", "options": options, "scheduler": {"max_waiting": 2, "early_tokens": 0}}
    h = await serve(deployments={"fake": deployment})
    reports = _reports(h)
    report = await reports.read()
    assert weight(report) == 0 and report.application_utilization == 0.01
    assert await _health(h) is True

    calls = [h.inference.Generate(generation_pb2.GenerateRequest(text="x")) for _ in range(4)]
    report = await _until(reports, lambda r: r.named_metrics["waiting"] == 2)
    report = await _until(reports, lambda r: r.application_utilization > 1.5)
    full = report.named_metrics["scaled_utilization"]
    assert full == pytest.approx(report.application_utilization * ENVOY_SCALE)

    refused = [h.inference.Generate(generation_pb2.GenerateRequest(text="x")) for _ in range(20)]
    await asyncio.gather(*(collect(call) for call in refused), return_exceptions=True)
    report = await _until(reports, lambda r: r.eps > 1)
    assert report.eps > report.rps_fractional > 0
    for call in calls:
        call.cancel()
    await h.until_idle()

    for _ in range(40):
        await collect(h.inference.Generate(SHORT))
    earned = weight(await _until(reports, lambda r: r.rps_fractional > 1 and r.eps < 1))
    assert earned > 0
    h.server.deployments.drain()
    report = await _until(reports, lambda r: r.named_metrics["fake.serving"] == 0)
    h.server._model_changed("fake")
    assert await _health(h) is False
    reports.cancel()

    again = await serve({"load_s": 1.0}, ready=False)
    assert await _health(again) is False
    reports = _reports(again)
    report = await reports.read()
    assert report.named_metrics["fake.serving"] == 0 and weight(report) == 0
    await again.until_ready()
    report = await _until(reports, lambda r: r.named_metrics["fake.serving"] == 1)
    assert weight(report) == 0
    await collect(again.inference.Generate(SHORT))
    assert weight(await _until(reports, lambda r: r.rps_fractional > 0)) > 0
    reports.cancel()


def _reports(h: Harness) -> Any:
    request = OrcaLoadReportRequest()
    request.report_interval.nanos = 100_000_000
    return h.channel.unary_stream(
        "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics",
        request_serializer=OrcaLoadReportRequest.SerializeToString,
        response_deserializer=OrcaLoadReport.FromString,
    )(request)


async def _until(reports: Any, condition: Any) -> Any:
    async with asyncio.timeout(30):
        while not condition(report := await reports.read()):
            pass
    return report


async def _health(h: Harness) -> bool:
    answer = await health_pb2_grpc.HealthStub(h.channel).Check(health_pb2.HealthCheckRequest())
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
