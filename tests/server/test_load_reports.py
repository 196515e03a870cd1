"""What balancers get: reports with every call and out of band, health by model, and calls spread accordingly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.models.orca import OrcaLoadReport, OrcaLoadReportRequest, weight
from tests.server.harness import Harness, Serve, collect
from twinjet.client import AsyncClient, Sampling
from twinjet.client._channel import SERVICE_CONFIG
from twinjet.scheduler.orca import OrcaReport
from twinjet.server import load_reports
from twinjet.server.load_reports import LoadReports, report_interval_s
from twinjet.v1 import admin_pb2, generation_pb2, sampling_pb2, service_pb2_grpc

SHORT = generation_pb2.GenerateRequest(text="x", sampling=sampling_pb2.SamplingParams(max_tokens=1))
PROBE = (("x-probe", "1"),)


def reports(h: Harness, interval_s: float = 0.1) -> Any:
    ask = h.channel.unary_stream(
        "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics",
        request_serializer=OrcaLoadReportRequest.SerializeToString,
        response_deserializer=OrcaLoadReport.FromString,
    )
    return ask(interval_request(interval_s))


def interval_request(seconds: float) -> Any:
    request = OrcaLoadReportRequest(request_cost_names=["a", "b"])
    request.report_interval.seconds = int(seconds)
    request.report_interval.nanos = int(seconds % 1 * 1e9) if seconds > 0 else 0
    return request


async def test_every_call_ends_with_a_report(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe goes where the report does, since gRPC's C core keeps the report from the application."""
    trailer = LoadReports.trailer
    monkeypatch.setattr(LoadReports, "trailer", lambda self: (*trailer(self), *PROBE))
    h = await serve(deployments={"fake": {"engine": "fake", "scheduler": {"max_waiting_tokens": 8}}})
    calls = [
        h.inference.Generate(SHORT),
        h.inference.Generate(generation_pb2.GenerateRequest()),
        h.inference.Generate(generation_pb2.GenerateRequest(text="x", model="none")),
        h.inference.Generate(generation_pb2.GenerateRequest(token_ids=range(9))),
        h.inference.Generate(generation_pb2.GenerateRequest(text="!fail")),
    ]
    codes = []
    for call in calls:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await collect(call)
        codes.append((await call.code()).name)
        assert PROBE[0] in tuple(await call.trailing_metadata())
    assert codes == ["OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "INTERNAL"]
    unary = h.admin.GetLoad(admin_pb2.GetLoadRequest())
    await unary
    assert PROBE[0] in tuple(await unary.trailing_metadata())


async def test_reports_out_of_band_tell_what_a_server_does(serve: Serve) -> None:
    h = await serve(
        {"step_s": 0.01, "max_num_seqs": 2},
        deployments={
            "fake": {
                "engine": "fake",
                "options": {"step_s": 0.01, "max_num_seqs": 2},
                "scheduler": {"max_waiting": 2, "early_tokens": 0},
            }
        },
    )
    stream = reports(h)
    idle = await stream.read()
    assert (weight(idle), idle.application_utilization, idle.eps) == (0, 0.01, 0)
    calls = [h.inference.Generate(generation_pb2.GenerateRequest(text="x")) for _ in range(6)]
    full = await _until(stream, lambda r: r.application_utilization > 1.5 and r.eps > 0)
    assert full.named_metrics["waiting"] == 2
    assert full.named_metrics["fake.running"] == 2
    assert 0 < full.named_metrics["kv_cache_utilization"] <= 1
    for call in calls:
        call.cancel()
    await h.until_idle()
    await collect(h.inference.Generate(SHORT))
    served = await _until(stream, lambda r: r.rps_fractional > 0 and r.named_metrics["running"] == 0)
    assert served.application_utilization > 0
    h.server.deployments.drain()
    assert (await _until(stream, lambda r: r.named_metrics["fake.serving"] == 0)).eps >= 0
    stream.cancel()


async def test_an_interval_is_kept_within_bounds_and_rubbish_refused(serve: Serve) -> None:
    assert report_interval_s(b"") == 1.0
    for seconds, wanted in ((-1.0, 1.0), (0.0, 1.0), (0.001, 0.1), (2.5, 2.5), (1e9, 3600.0)):
        assert report_interval_s(interval_request(seconds).SerializeToString()) == pytest.approx(wanted)
    h = await serve()
    ask = h.channel.unary_stream("/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics")
    for rubbish in (b"\x0a\x05a", b"\xff" * 11, b"\x08\x01", b"\x0a\x02\xff\xff"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(rubbish).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_many_streams_get_their_reports_seldomer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    h = await serve()
    monkeypatch.setattr(load_reports, "MAX_REPORTS_PER_S", 1 / 3600)
    first, second = reports(h), reports(h)
    assert (await first.read()) is not grpc.aio.EOF and (await second.read()) is not grpc.aio.EOF
    assert h.server.load_reports._num_streams == 2
    late = asyncio.create_task(first.read())
    # Two streams get a report in two hours, where one in a tenth of a second was asked for.
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await asyncio.shield(late)
    for stream in (first, second):
        stream.cancel()
    await asyncio.gather(late, return_exceptions=True)
    await h.until(lambda: h.server.load_reports._num_streams == 0)


@pytest.fixture(params=["out of band", "trailers"])
def balancing(request: pytest.FixtureRequest) -> str:
    """A service config as docs/scale-out.md gives it, with weights that count from the start."""
    policy = SERVICE_CONFIG["loadBalancingConfig"][0]["weighted_round_robin"]  # type: ignore[index]
    changed = {
        "enableOobLoadReport": request.param == "out of band",
        "blackoutPeriod": "0s",
        "weightUpdatePeriod": "0.1s",
        "oobReportingPeriod": "0.1s",
    }
    return json.dumps(SERVICE_CONFIG | {"loadBalancingConfig": [{"weighted_round_robin": policy | changed}]})


async def test_a_stock_client_spreads_calls_by_the_reported_weights(
    serve: Serve, balancing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [await serve() for _ in range(2)]
    said = {id(h.server.load_reports): u for h, u in zip(servers, (0.9, 0.1), strict=True)}

    def report(self: LoadReports, *, details: bool) -> bytes:
        return OrcaReport(said[id(self)], 10.0, 0.0, {}, {}).encode()

    monkeypatch.setattr(LoadReports, "_report", report)
    async for stub in _balanced(servers, balancing):
        # Weights count from the first update after the first reports.
        await _spread(servers, stub, lambda counts: counts[1] > 4 * counts[0] and sum(counts.values()) >= 200)
        counts = await _spread(servers, stub, lambda counts: sum(counts.values()) >= 400)
    # Within three standard errors of one call in ten.
    share = counts[0] / sum(counts.values())
    assert abs(share - 0.1) < 3 * (0.1 * 0.9 / sum(counts.values())) ** 0.5


async def test_the_slower_of_two_servers_gets_less(serve: Serve, balancing: str) -> None:
    """Nothing set by hand: the servers' own reports, with eight calls under way all the time."""
    servers = [await serve({"step_s": s, "max_num_seqs": 8}) for s in (0.02, 0.005)]
    request = generation_pb2.GenerateRequest(text="x", sampling={"max_tokens": 8, "ignore_eos": True})
    async for stub in _balanced(servers, balancing):
        await _spread(servers, stub, lambda counts: sum(counts.values()) >= 300, request)
        counts = await _spread(servers, stub, lambda counts: sum(counts.values()) >= 300, request)
    assert counts[1] > 2 * counts[0] > 0


async def test_our_client_balances_and_leaves_out_what_does_not_serve(serve: Serve) -> None:
    servers = [await serve() for _ in range(2)]
    address = "ipv4:" + ",".join(h.server.address for h in servers)
    async with AsyncClient(address) as client:
        async with asyncio.timeout(20):
            while len(_served(servers)) < 2:
                await client.generate("x", Sampling(max_tokens=1)).text()
        servers[0].server.deployments.drain()
        servers[0].server._model_changed("fake")
        before = _served(servers)
        async with asyncio.timeout(20):
            # Health is pushed: a call may still meet the drained server until it has come, and is tried again.
            for _ in range(50):
                await client.generate("x", Sampling(max_tokens=1)).text()
        after = _served(servers)
    assert after[0] == before[0]
    assert after[1] == before[1] + 50
    refused = servers[0].server.metrics.registry.get_sample_value(
        "twinjet_calls_total", {"method": "Generate", "code": "UNAVAILABLE"}
    )
    assert (refused or 0) < 5


async def test_health_lists_all_and_outlives_a_watcher_that_leaves_or_does_not_read(serve: Serve) -> None:
    h = await serve()
    stub = health_pb2_grpc.HealthStub(h.channel)
    answer = await h.channel.unary_unary("/grpc.health.v1.Health/List")(b"")
    for name in (b"fake", b"twinjet.v1.InferenceService"):
        assert name + b"\x12\x02\x08\x01" in answer
    leaving, staying = (stub.Watch(health_pb2.HealthCheckRequest(service="fake")) for _ in range(2))
    stub.Watch(health_pb2.HealthCheckRequest(service="fake"))  # never read
    assert (await leaving.read()).status == (await staying.read()).status == 1
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving.read()
    await h.server.drain(0)
    assert (await staying.read()).status == 2
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="other"))
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def _until(stream: Any, condition: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(20):
        while not condition(report := await stream.read()):
            pass
    return report


async def _balanced(servers: list[Harness], config: str) -> AsyncIterator[Any]:
    target = "ipv4:" + ",".join(h.server.address for h in servers)
    options = [("grpc.service_config", config), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        yield service_pb2_grpc.InferenceServiceStub(channel)


def _served(servers: list[Harness]) -> Counter[int]:
    """How many calls each server has answered."""
    sample = [h.server.metrics.registry.get_sample_value for h in servers]
    labels = {"method": "Generate", "code": "OK"}
    return Counter({i: int(n) for i, s in enumerate(sample) if (n := s("twinjet_calls_total", labels))})


async def _spread(
    servers: list[Harness],
    stub: Any,
    enough: Callable[[Counter[int]], bool],
    request: generation_pb2.GenerateRequest = SHORT,
) -> Counter[int]:
    """Keep eight calls under way until there were enough; gives how many each server answered."""
    before = _served(servers)

    async def caller() -> None:
        while not enough(_served(servers) - before):
            await collect(stub.Generate(request))

    async with asyncio.timeout(60):
        await asyncio.gather(*(caller() for _ in range(8)))
    return _served(servers) - before
