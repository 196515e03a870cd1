"""The picker behind a real Envoy: who gets what, and what a client sees when the picker refuses, hangs or is gone."""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from tests.epp.envoy import envoy, find_envoy
from tests.epp.replicas import EppProcess, epp_beside, replicas, until
from tests.server.harness import details
from twinjet.epp.main import Epp
from twinjet.epp.picking import Ask, Pick
from twinjet.errors import Overloaded
from twinjet.server.main import Server
from twinjet.v1 import generation_pb2 as pb
from twinjet.v1 import service_pb2_grpc

PROGRAM = find_envoy()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Envoy is not installed")


@pytest.fixture(params=["buffered", "duplex"])
def duplex(request: pytest.FixtureRequest) -> bool:
    """How Envoy sends bodies: as the shipped configuration says, or as inference gateways do."""
    return bool(request.param == "duplex")


@asynccontextmanager
async def through_envoy(
    picker: str, servers: list[Server], *, duplex: bool = False
) -> AsyncIterator[service_pb2_grpc.InferenceServiceStub]:
    """A stub on an Envoy; its admin port is the stub's attribute."""
    assert PROGRAM is not None
    running = envoy(picker, [s.address for s in servers], PROGRAM, duplex=duplex)
    address, admin_port = await asyncio.to_thread(running.__enter__)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = service_pb2_grpc.InferenceServiceStub(channel)
            stub.admin_port = admin_port
            yield stub
    finally:
        running.__exit__(None, None, None)


async def started(
    stub: service_pb2_grpc.InferenceServiceStub, request: pb.GenerateRequest, timeout_s: float = 60
) -> pb.Started:
    """Run a request to its end; gives how it started."""
    messages = [message async for message in stub.Generate(request, timeout=timeout_s)]
    assert messages[-1].WhichOneof("event") == "summary"
    return messages[0].started


def served(servers: list[Server]) -> list[int]:
    """Requests that each server has taken."""
    return [
        int(
            s.metrics.registry.get_sample_value("twinjet_calls_total", {"method": "Generate", "code": "OK"})
            or 0
        )
        for s in servers
    ]


async def test_a_prompt_goes_where_its_beginning_is(duplex: bool) -> None:
    async with (
        replicas(3) as servers,
        epp_beside(servers) as epp,
        through_envoy(epp.address, servers, duplex=duplex) as stub,
    ):
        for family in range(6):
            prefix = [1 + (family * 31 + i * 7) % 250 for i in range(2_000)]
            first = await started(stub, pb.GenerateRequest(token_ids=[*prefix, 5]))
            assert first.cached_prompt_tokens == 0
            for tail in range(4):
                again = await started(stub, pb.GenerateRequest(token_ids=[*prefix, 9, tail]))
                assert again.cached_prompt_tokens == 2_000
        assert sum(served(servers)) == 30
        await until(lambda: all(epp.picker.num_in_flight(r) == 0 for r in epp.picker.replicas.values()))


async def test_a_conversation_stays_and_long_prompts_come_whole(duplex: bool) -> None:
    async with (
        replicas(2) as servers,
        epp_beside(servers) as epp,
        through_envoy(epp.address, servers, duplex=duplex) as stub,
    ):
        turns = [pb.ChatMessage(role="system", content="word " * 14_000)]
        cached = []
        for turn in range(4):
            turns.append(pb.ChatMessage(role="user", content=f"question {turn}"))
            call = stub.Chat(pb.ChatRequest(messages=turns), timeout=60)
            messages = [message async for message in call]
            assert messages[0].started.prompt_tokens > 70_000
            cached.append(messages[0].started.cached_prompt_tokens)
            text = "".join(m.delta.text for m in messages)
            turns.append(pb.ChatMessage(role="assistant", content=text))
        assert cached[0] == 0 and min(cached[1:]) > 70_000


async def test_who_calls_is_told_by_envoy_and_not_by_the_client(
    duplex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        replicas(1) as servers,
        epp_beside(servers) as epp,
        through_envoy(epp.address, servers, duplex=duplex) as stub,
    ):
        seen: list[str] = []
        pick = epp.picker.pick

        def see(ask: Ask) -> Pick:
            seen.append(ask.client_address)
            return pick(ask)

        monkeypatch.setattr(epp.picker, "pick", see)
        forged = (("x-forwarded-for", "192.0.2.1"), ("x-envoy-external-address", "192.0.2.1"))
        for metadata in ((), forged):
            call = stub.Generate(pb.GenerateRequest(text="x"), metadata=metadata, timeout=60)
            assert [message async for message in call]
        assert seen == ["ipv4:127.0.0.1"] * 2


async def test_other_methods_and_compressed_requests_pass(duplex: bool) -> None:
    async with (
        replicas(2) as servers,
        epp_beside(servers) as epp,
        through_envoy(epp.address, servers, duplex=duplex) as stub,
    ):
        tokens = await stub.Tokenize(pb_tokenize("abc"), timeout=30)
        assert list(tokens.token_ids) == [257, 97, 98, 99]
        prefix = "some words " * 300
        for tail in ("a", "b"):
            call = stub.Generate(
                pb.GenerateRequest(text=prefix + tail), compression=grpc.Compression.Gzip, timeout=30
            )
            messages = [message async for message in call]
        assert messages[0].started.cached_prompt_tokens > 3_000
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await started(stub, pb.GenerateRequest(model="nobody", text="x"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert details(refused.value)["ResourceInfo"].resource_name == "nobody"


def pb_tokenize(text: str) -> object:
    from twinjet.v1 import tokenization_pb2

    return tokenization_pb2.TokenizeRequest(text=text)


def _refuses(epp: Epp) -> bool:
    try:
        epp.picker.finish(epp.picker.pick(Ask()))
    except Overloaded:
        return True
    return False


async def test_a_refusal_is_a_grpc_status_with_its_details(duplex: bool) -> None:
    options = {"max_num_seqs": 1, "step_s": 0.02, "output_tokens": None}
    shedding = {"max_waiting": 1, "hard_waiting": 1, "retry_s": 7}
    async with (
        replicas(1, options) as servers,
        epp_beside(servers, shedding=shedding) as epp,
        through_envoy(epp.address, servers, duplex=duplex) as stub,
    ):
        calls = [stub.Generate(pb.GenerateRequest(text="x", sampling={"max_tokens": 2000})) for _ in range(4)]
        await until(lambda: _refuses(epp))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await started(stub, pb.GenerateRequest(text="y"))
        refused = caught.value
        for call in calls:
            call.cancel()
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "waiting" in (refused.details() or "")
        told = details(refused)
        assert told["ErrorInfo"].domain == "twinjet" and told["ErrorInfo"].reason == "OVERLOADED"
        assert told["RetryInfo"].retry_delay.ToSeconds() >= 1


async def test_without_replicas_a_client_hears_so_with_details() -> None:
    async with (
        replicas(1) as servers,
        epp_beside(servers) as epp,
        through_envoy(epp.address, servers) as stub,
    ):
        epp.picker.set_replicas([])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await started(stub, pb.GenerateRequest(text="x"))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(refused.value)["ErrorInfo"].reason == "NO_REPLICA"


async def test_a_replica_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    async with (
        replicas(2) as servers,
        epp_beside(servers) as epp,
        through_envoy(epp.address, servers) as stub,
    ):
        prefix = "the same words " * 200
        await started(stub, pb.GenerateRequest(text=prefix))
        holder = served(servers).index(1)
        await servers[holder].drain(0.0)
        await servers[holder].stop()
        # At once, when the picker may not know yet, and later.
        for _ in range(20):
            await started(stub, pb.GenerateRequest(text=prefix))
        await until(lambda: sum(r.is_up for r in epp.picker.replicas.values()) == 1)
        assert served(servers)[1 - holder] == 20


@pytest.mark.parametrize("how", ["killed", "hanging"])
async def test_without_a_picker_requests_go_on(how: str, tmp_path: Path) -> None:
    async with replicas(2) as servers:
        picker = EppProcess(tmp_path, [s.address for s in servers])
        try:
            address = await picker.until_listening()
            async with through_envoy(address, servers) as stub:
                await started(stub, pb.GenerateRequest(text="before"))
                if how == "killed":
                    picker.kill()
                else:
                    picker.process.send_signal(signal.SIGSTOP)
                loop = asyncio.get_running_loop()
                took = Counter[str]()
                for i in range(8):
                    began = loop.time()
                    await started(stub, pb.GenerateRequest(text=f"after {i}"))
                    took["slow" if loop.time() - began > 5 else "quick"] += 1
                print(took)
                assert took["slow"] == 0
                assert sum(served(servers)) == 9
        finally:
            if how == "hanging":
                picker.process.send_signal(signal.SIGCONT)
                picker.kill()


def _stats(admin_port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/stats?format=json", timeout=5) as answer:
        return {s["name"]: s["value"] for s in json.load(answer)["stats"] if "value" in s}
