"""Clients that name no tenant, on real connections from two addresses: none of them waits behind all that another sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from tests.server.harness import Serve, collect, details, kinds
from twinjet.engines.fake import FakeEngine
from twinjet.request import EngineRequest
from twinjet.v1 import generation_pb2, sampling_pb2, service_pb2_grpc

SAMPLING = sampling_pb2.SamplingParams(max_tokens=10, min_tokens=10, seed=1)
PLAIN = generation_pb2.GenerateRequest(text="x", sampling=SAMPLING)
"""What the native door hands over in batches."""
WITH_A_TASK = generation_pb2.GenerateRequest(
    text="x", sampling=SAMPLING, options=generation_pb2.RequestOptions(priority=0)
)
CHAT = generation_pb2.ChatRequest(
    messages=[generation_pb2.ChatMessage(role="user", content="x")], sampling=SAMPLING
)


@asynccontextmanager
async def _from_another_address(target: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel whose connections come to the server from 127.0.0.2: gRPC's client cannot choose, a relay can."""
    host, _, port = target.rpartition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port), local_addr=("127.0.0.2", 0))
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    relayed = await asyncio.start_server(relay, "127.0.0.1", 0)
    near = relayed.sockets[0].getsockname()
    channel = grpc.aio.insecure_channel(f"{near[0]}:{near[1]}")
    try:
        yield channel
    finally:
        await channel.close()
        relayed.close()
        await relayed.wait_closed()


def _hold(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Keep an engine from making a step until the event is set."""
    may_go = asyncio.Event()

    async def pause(step_s: float) -> None:
        await may_go.wait()

    monkeypatch.setattr(engine, "_pause", pause)
    return may_go


@pytest.mark.parametrize("request_", [PLAIN, WITH_A_TASK, CHAT], ids=["plain", "with a task", "chat"])
async def test_a_neighbour_goes_before_what_is_left_of_anothers_flood(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, request_: Any
) -> None:
    h = await serve({"max_num_seqs": 1})
    dispatcher = h.server.deployments.by_name["fake"].dispatcher
    may_go = _hold(h.engine, monkeypatch)
    seeds: list[int] = []
    submit = h.engine.submit

    def see(request: EngineRequest, run: Any) -> None:
        seeds.append(request.sampling.seed)
        submit(request, run)

    monkeypatch.setattr(h.engine, "submit", see)

    def ask(channel: grpc.aio.Channel, seed: int) -> Any:
        request = type(request_).FromString(request_.SerializeToString())
        request.sampling.seed = seed
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        return asyncio.create_task(
            collect(stub.Chat(request) if request_ is CHAT else stub.Generate(request))
        )

    async with _from_another_address(h.server.address) as other:
        calls = [ask(h.channel, 1) for _ in range(60)]
        await h.until(lambda: dispatcher.totals().waiting == 59)
        calls += [ask(other, 2) for _ in range(2)]
        await h.until(lambda: dispatcher.totals().waiting == 61)
        assert {name: t.waiting for name, t in dispatcher.load().tenants.items()} == {"": 61}
        may_go.set()
        answers = await asyncio.gather(*calls)
    assert {kinds(messages)[-1] for messages in answers} == {"summary"}
    # One of the flood ran when the neighbour came; then they take turns, by tokens.
    places = [i for i, seed in enumerate(seeds) if seed == 2]
    assert len(places) == 2 and places[-1] <= 4
    await h.until_idle()


async def test_a_flood_leaves_room_in_the_queue_for_a_neighbour(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = {"max_waiting": 18}
    h = await serve(
        deployments={"fake": {"engine": "fake", "options": {"max_num_seqs": 1}, "scheduler": scheduler}}
    )
    dispatcher = h.server.deployments.by_name["fake"].dispatcher
    may_go = _hold(h.engine, monkeypatch)
    async with _from_another_address(h.server.address) as other:
        flood = [asyncio.create_task(collect(h.inference.Generate(PLAIN))) for _ in range(60)]
        await h.until(lambda: dispatcher.totals().refused == 60 - 1 - 16)
        call = asyncio.create_task(collect(service_pb2_grpc.InferenceServiceStub(other).Generate(PLAIN)))
        await h.until(lambda: dispatcher.totals().waiting == 17)
        may_go.set()
        assert kinds(await call)[-1] == "summary"
    ended = await asyncio.gather(*flood, return_exceptions=True)
    refused = [e for e in ended if isinstance(e, grpc.aio.AioRpcError)]
    assert len(refused) == 60 - 1 - 16
    assert {e.code() for e in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all("RetryInfo" in details(e) and "from this address" in (e.details() or "") for e in refused)
    await h.until_idle()
