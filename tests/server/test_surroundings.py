"""What stands around the service: reflection, channelz, TLS, the control plane's authorisation, metrics."""

from __future__ import annotations

import asyncio
import importlib
import socket
import subprocess
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client.parser import text_string_to_metric_families

from tests.server.harness import Serve, collect, details
from twinjet.v1 import admin_pb2, generation_pb2, model_pb2, sampling_pb2, service_pb2_grpc

SHORT = generation_pb2.GenerateRequest(text="x", sampling=sampling_pb2.SamplingParams(max_tokens=3))


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_services_and_gives_their_files(serve: Serve, version: str) -> None:
    h = await serve()
    ask = h.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    (names,) = [r async for r in ask(iter(requests))]
    listed = {s.name for s in names.list_services_response.service}
    assert {
        "twinjet.v1.InferenceService", "grpc.health.v1.Health", "grpc.channelz.v1.Channelz",
        "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection",
    } <= listed  # fmt: skip
    requests = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in listed]
    answers = [r async for r in ask(iter(requests))]
    assert len(answers) == len(listed)
    assert all(a.file_descriptor_response.file_descriptor_proto for a in answers)


def test_every_file_of_the_contract_names_its_package_in_each_language() -> None:
    proto = Path(__file__).parents[2] / "proto"
    names = [str(path.relative_to(proto)) for path in proto.glob("twinjet/v1/*.proto")]
    assert len(names) > 5
    for name in names:
        options = importlib.import_module(
            name.removesuffix(".proto").replace("/", ".") + "_pb2"
        ).DESCRIPTOR.GetOptions()
        found = (
            options.go_package,
            options.java_package,
            options.java_multiple_files,
            options.csharp_namespace,
        )
        assert found == ("twinjet/v1;twinjetv1", "com.twinjet.v1", True, "Twinjet.V1"), name


async def test_channelz_answers(serve: Serve, door: str) -> None:
    h = await serve()
    stub = channelz_pb2_grpc.ChannelzStub(h.channel)
    servers = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
    assert servers
    sockets = []
    for server in servers:
        request = channelz_pb2.GetServerSocketsRequest(server_id=server.ref.server_id)
        sockets += (await stub.GetServerSockets(request)).socket_ref
    assert sockets
    if door == "grpc":
        # gRPC's core tells more of a socket than the stubs of its own channelz package know.
        return
    for most in (-1, 2**62):
        request = channelz_pb2.GetServerSocketsRequest(server_id=servers[0].ref.server_id, max_results=most)
        answer = await stub.GetServerSockets(request)
        assert len(answer.socket_ref) == len(sockets) and answer.end
    found = await stub.GetSocket(channelz_pb2.GetSocketRequest(socket_id=sockets[-1].socket_id))
    assert found.socket.data.streams_started > 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetSocket(channelz_pb2.GetSocketRequest(socket_id=1 << 40))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.channelz.v1.Channelz/GetServers",
    ],
)
async def test_bytes_that_are_no_message_are_the_clients_fault(
    serve: Serve, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    h = await serve()
    ask = h.channel.stream_stream(path)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(iter([b"\xff"])).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)["BadRequest"].field_violations[0].field == "request"
    assert not any(record.exc_info for record in caplog.records)


async def test_health_of_a_very_long_name_is_not_found(serve: Serve) -> None:
    h = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_pb2_grpc.HealthStub(h.channel).Check(
            health_pb2.HealthCheckRequest(service="x" * (1 << 20))
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(caught.value)["ErrorInfo"].reason == "SERVICE_NOT_FOUND"


async def test_an_admin_token_is_asked_for_once_set(serve: Serve) -> None:
    h = await serve(admin={"token": "secret"})
    for metadata in [(), (("authorization", "Bearer wrong"),)]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await h.admin.GetLoad(admin_pb2.GetLoadRequest(), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert details(caught.value)["ErrorInfo"].reason == "PERMISSION_REFUSED"
    right = (("authorization", "Bearer secret"),)
    assert (await h.admin.GetLoad(admin_pb2.GetLoadRequest(), metadata=right)).models[0].model == "fake"
    assert (await collect(h.inference.Generate(SHORT)))[-1].HasField("summary")


async def test_who_may_not_administer_may_not_change_adapters_either(serve: Serve) -> None:
    h = await serve(admin={"token": "secret"})
    calls = [
        (h.models.LoadAdapter, model_pb2.LoadAdapterRequest(name="a", path="/etc")),
        (h.models.UnloadAdapter, model_pb2.UnloadAdapterRequest(name="a")),
    ]
    for call, message in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(message)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(message, metadata=(("authorization", "Bearer secret"),))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, "the fake engine takes none"


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A key and a certificate of its own making for 127.0.0.1."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {cert} -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(command.split(), check=True, capture_output=True)
    return key, cert


async def test_tls_and_client_certificates_are_honoured(serve: Serve, certificate: tuple[Path, Path]) -> None:
    key, cert = certificate
    h = await serve(server={"tls_cert": str(cert), "tls_key": str(key), "tls_client_ca": str(cert)})
    known = grpc.ssl_channel_credentials(cert.read_bytes(), key.read_bytes(), cert.read_bytes())
    async with grpc.aio.secure_channel(h.server.address, known) as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        assert (await collect(stub.Generate(SHORT)))[-1].HasField("summary")
    unknown = grpc.ssl_channel_credentials(cert.read_bytes())
    async with grpc.aio.secure_channel(h.server.address, unknown) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await service_pb2_grpc.ModelServiceStub(channel).ListModels(
                model_pb2.ListModelsRequest(), timeout=5
            )


async def test_metrics_count_calls_and_tokens(serve: Serve) -> None:
    h = await serve()
    await collect(h.inference.Generate(SHORT))
    with pytest.raises(grpc.aio.AioRpcError):
        await collect(h.inference.Generate(generation_pb2.GenerateRequest()))
    sample = h.server.metrics.registry.get_sample_value
    assert sample("twinjet_calls_total", {"method": "Generate", "code": "OK"}) == 1
    assert sample("twinjet_calls_total", {"method": "Generate", "code": "INVALID_ARGUMENT"}) == 1
    assert sample("twinjet_tokens_total", {"model": "fake", "kind": "output"}) == 3
    assert sample("twinjet_first_token_seconds_count", {"model": "fake", "deployment": "fake"}) == 1


_USED = ("engine_kv_blocks_used raw", "admission_kv_blocks_used kept")


async def test_queues_refusals_and_the_engine_are_seen_over_http(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    small = {"max_num_seqs": 4, "num_blocks": 8, "block_size": 4}
    h = await serve(
        server={"metrics_port": port},
        deployments={
            "kept": {"engine": "fake", "options": {}, "scheduler": {"max_waiting_tokens": 8}},
            "raw": {"engine": "fake", "options": small, "scheduler": {"policy": "fcfs"}},
        },
    )

    async def read() -> dict[str, float]:
        with await asyncio.to_thread(urlopen, f"http://127.0.0.1:{port}/metrics") as answer:
            families = list(text_string_to_metric_families((await asyncio.to_thread(answer.read)).decode()))
        return {
            " ".join((s.name, *sorted(s.labels.values()))): s.value
            for family in families
            for s in family.samples
        }

    before = await read()
    assert before["twinjet_engine_preemptions_total raw"] == 0
    assert before["twinjet_engine_kv_blocks raw"] == 8
    assert "twinjet_admission_kv_blocks_used raw" not in before  # fcfs admits without a ledger

    def request(model: str, tokens: int, **sampling: int) -> generation_pb2.GenerateRequest:
        params = sampling_pb2.SamplingParams(**sampling)
        return generation_pb2.GenerateRequest(model=model, token_ids=range(tokens), sampling=params)

    async with asyncio.timeout(60):
        # Four that each fit the cache and together do not; anew if they were not in it together.
        while not (await h.admin.GetLoad(admin_pb2.GetLoadRequest(model="raw"))).models[0].preemptions:
            calls = [h.inference.Generate(request("raw", 4, max_tokens=20, min_tokens=20)) for _ in range(4)]
            await asyncio.gather(*(collect(call) for call in calls))
        with pytest.raises(grpc.aio.AioRpcError):
            await collect(h.inference.Generate(request("kept", 9)))
        # A stream's last message may come before its end is booked.
        after = await read()
        while any(after[f"twinjet_{name}"] for name in _USED):
            after = await read()
    raw = await h.admin.GetLoad(admin_pb2.GetLoadRequest(model="raw"))
    assert after["twinjet_engine_preemptions_total raw"] == raw.models[0].preemptions > 0
    assert after["twinjet_admission_overflow_tokens_total kept"] == 0
    assert after["twinjet_requests_refused_total kept queue_full"] == 1
    assert after["twinjet_requests_refused_total deadline kept"] == 0
    assert after["twinjet_requests_expired_total kept"] == 0


async def test_get_load_tells_the_door(serve: Serve, door: str) -> None:
    h = await serve()
    assert (await h.admin.GetLoad(admin_pb2.GetLoadRequest())).door == door


async def test_get_load_shows_what_waits_and_runs(serve: Serve) -> None:
    h = await serve({"step_s": 0.01, "max_num_seqs": 2})
    calls = [
        h.inference.Generate(generation_pb2.GenerateRequest(text="x", options={"tenant": f"t{i % 2}"}))
        for i in range(4)
    ]
    for call in calls:
        await call.initial_metadata()
    load = admin_pb2.ModelLoad()
    async with asyncio.timeout(10):
        while load.engine_running < 2:
            load = (await h.admin.GetLoad(admin_pb2.GetLoadRequest(model="fake"))).models[0]
    assert load.waiting + load.running == 4
    assert load.engine_running == 2
    assert load.kv_blocks_used > 0
    assert {t.tenant for t in load.tenants} == {"t0", "t1"}
    assert len(load.request_ids) == 4
    for call in calls:
        call.cancel()
    await h.until_idle()


async def test_the_prefix_cache_can_be_reset(serve: Serve) -> None:
    h = await serve({"block_size": 2})
    request = generation_pb2.GenerateRequest(token_ids=range(9), sampling=SHORT.sampling)
    await collect(h.inference.Generate(request))
    assert (await h.admin.ResetPrefixCache(admin_pb2.ResetPrefixCacheRequest())).done
    assert (await collect(h.inference.Generate(request)))[0].started.cached_prompt_tokens == 0
