"""The server as a process: signals, exit codes, what a person sees."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.server.processes import Service, server
from twinjet.private_folder import PrivateFolder
from twinjet.v1 import generation_pb2, model_pb2, sampling_pb2, service_pb2_grpc

FAKE = '[deployments.fake]\nengine = "fake"\noptions = { step_s = 0.01 }\n'


def test_sigterm_lets_a_stream_finish_and_exits_0(tmp_path: Path) -> None:
    with server(tmp_path, FAKE) as (process, address), grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        sampling = sampling_pb2.SamplingParams(max_tokens=50)
        events = stub.Generate(generation_pb2.GenerateRequest(text="x", sampling=sampling))
        assert next(events).HasField("started")
        process.send_signal(signal.SIGTERM)
        assert list(events)[-1].HasField("summary")
        assert process.wait(10) == 0


def test_sigterm_ends_what_outlasts_the_grace(tmp_path: Path) -> None:
    with server(tmp_path, FAKE) as (process, address), grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        events = stub.Generate(generation_pb2.GenerateRequest(text="x"))
        assert next(events).HasField("started")
        process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            list(events)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        assert process.wait(10) == 0


def test_a_second_signal_ends_what_still_runs(tmp_path: Path) -> None:
    with server(tmp_path, FAKE, grace_s=600) as (process, address):
        service = Service(process, address)
        events = service.inference.Generate(generation_pb2.GenerateRequest(text="x"))
        assert next(events).HasField("started")
        process.send_signal(signal.SIGINT)
        service.until(lambda: service.status("fake") != health_pb2.HealthCheckResponse.SERVING, 30)
        assert next(events)
        process.send_signal(signal.SIGINT)
        with pytest.raises(grpc.RpcError) as caught:
            list(events)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        assert process.wait(60) == 0
        service.channel.close()


def test_a_start_removes_what_killed_servers_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = PrivateFolder("test")
    left = tmp_path / "twinjet-test-0.held"
    left.mkdir()
    with server(tmp_path, FAKE, environment={"TMPDIR": str(tmp_path)}):
        assert held.path.is_dir()
        assert not left.exists()
    held.remove()
    assert "removed 1 folder" in (tmp_path / "server.log").read_text()


def test_exit_1_when_every_engine_was_given_up(tmp_path: Path) -> None:
    text = '[deployments.bad]\nengine = "fake"\nmax_restarts = 0\noptions = { die_at_start = 9 }\n'
    with server(tmp_path, text) as (process, _):
        assert process.wait(10) == 1


BROKEN = '[deployments.broken]\nengine = "fake"\noptions = { fail_start = "no such model" }\n'


def test_exit_2_when_a_configuration_cannot_work(tmp_path: Path) -> None:
    with server(tmp_path, FAKE + BROKEN) as (process, _):
        assert process.wait(10) == 2


def test_allow_partial_serves_the_rest(tmp_path: Path) -> None:
    with (
        server(tmp_path, "allow_partial = true\n" + FAKE + BROKEN) as (process, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = service_pb2_grpc.ModelServiceStub(channel)
        states = {m.name: m for m in stub.ListModels(model_pb2.ListModelsRequest(), timeout=10).models}
        assert states["broken"].failure == "no such model"
        assert process.poll() is None


def test_exit_2_when_the_port_is_taken(tmp_path: Path) -> None:
    with server(tmp_path, FAKE) as (_, address):
        port = address.split(":")[1]
        second_folder = tmp_path / "second"
        second_folder.mkdir()
        with server(second_folder, FAKE, port=int(port)) as (second, _):
            assert second.wait(10) == 2
        assert "cannot listen on" in (second_folder / "server.log").read_text()
