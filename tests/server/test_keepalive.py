"""Long silent streams live, and clients that vanished are noticed."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from tests.server.harness import Serve, collect
from twinjet.v1 import generation_pb2, service_pb2_grpc

SILENT = generation_pb2.GenerateRequest(text="!stall")
EAGER_CLIENT = [
    ("grpc.keepalive_time_ms", 300),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
]


async def test_a_client_that_pings_as_often_as_allowed_keeps_its_silent_stream(serve: Serve) -> None:
    h = await serve(server={"client_ping_s": 0.1}, channel_options=EAGER_CLIENT)
    call = h.inference.Generate(SILENT, timeout=4)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_pings_more_often_is_turned_away(serve: Serve) -> None:
    """The control of the test above: it shows that the option acts."""
    h = await serve(server={"client_ping_s": 300.0}, channel_options=EAGER_CLIENT)
    call = h.inference.Generate(SILENT, timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "ping" in (caught.value.details() or "").lower()
    await h.until_idle()


async def test_a_client_that_vanished_is_noticed_and_its_work_stopped(serve: Serve) -> None:
    h = await serve(server={"keepalive_s": 0.3, "keepalive_timeout_s": 0.5})
    is_open = asyncio.Event()
    is_open.set()
    host, port = h.server.address.split(":")

    async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                await is_open.wait()
                sink.write(data)
                await sink.drain()
        sink.close()

    relays: list[asyncio.Future[object]] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        relays.append(asyncio.gather(forward(reader, back), forward(there, writer)))

    proxy = await asyncio.start_server(relay, "127.0.0.1", 0)
    proxy_port = proxy.sockets[0].getsockname()[1]
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{proxy_port}")
    call = service_pb2_grpc.InferenceServiceStub(channel).Generate(SILENT)
    await call.initial_metadata()
    assert len(h.server.live) == 1
    is_open.clear()
    await h.until_idle()
    is_open.set()
    call.cancel()
    await channel.close()
    proxy.close()
    await proxy.wait_closed()
    await asyncio.gather(*relays)
