"""gRPC's interoperability cases, with grpcio's asyncio client and its synchronous one against the native door."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from tests.interop import server
from tests.interop.server import INITIAL_KEY, TRAILING_KEY, message
from twinjet.server import native_door

pytestmark = pytest.mark.skipif(not native_door.is_available(), reason="this build has no native door")

SIZES = [(31415, 27182), (9, 8), (2653, 1828), (58979, 45904)]
"""Response and request sizes of gRPC's streaming cases."""
SPECIAL = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"


class Client:
    """A channel, and TestService's methods on it."""

    def __init__(self, channel: Any, address: str) -> None:
        self.channel = channel
        self.address = address

    def method(self, name: str, request: str, response: str, kind: str, service: str = "TestService") -> Any:
        return getattr(self.channel, kind)(
            f"/grpc.testing.{service}/{name}",
            request_serializer=message(request).SerializeToString,
            response_deserializer=message(response).FromString,
        )

    @property
    def empty(self) -> Any:
        return self.method("EmptyCall", "Empty", "Empty", "unary_unary")

    @property
    def unary(self) -> Any:
        return self.method("UnaryCall", "SimpleRequest", "SimpleResponse", "unary_unary")

    @property
    def output(self) -> Any:
        return self.method(
            "StreamingOutputCall", "StreamingOutputCallRequest", "StreamingOutputCallResponse", "unary_stream"
        )

    @property
    def input(self) -> Any:
        return self.method(
            "StreamingInputCall", "StreamingInputCallRequest", "StreamingInputCallResponse", "stream_unary"
        )

    @property
    def duplex(self) -> Any:
        return self.method(
            "FullDuplexCall", "StreamingOutputCallRequest", "StreamingOutputCallResponse", "stream_stream"
        )


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    door, address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Client(channel, address)
    await door.stop(0)


def _ask(response: int, request: int, interval_us: int = 0) -> Any:
    return message("StreamingOutputCallRequest")(
        response_parameters=[{"size": response, "interval_us": interval_us}], payload={"body": bytes(request)}
    )


async def test_empty_unary(client: Client) -> None:
    assert await client.empty(message("Empty")()) == message("Empty")()


async def test_large_unary(client: Client) -> None:
    request = message("SimpleRequest")(response_size=314159, payload={"body": bytes(271828)})
    assert len((await client.unary(request)).payload.body) == 314159


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_unary(client: Client, compression: grpc.Compression) -> None:
    request = message("SimpleRequest")(response_size=314159, payload={"body": bytes(271828)})
    assert len((await client.unary(request, compression=compression)).payload.body) == 314159


async def test_client_streaming(client: Client) -> None:
    async def requests() -> AsyncIterator[Any]:
        for _, size in SIZES:
            yield message("StreamingInputCallRequest")(payload={"body": bytes(size)})

    assert (await client.input(requests())).aggregated_payload_size == sum(size for _, size in SIZES)


async def test_server_streaming(client: Client) -> None:
    request = message("StreamingOutputCallRequest")(response_parameters=[{"size": size} for size, _ in SIZES])
    assert [len(r.payload.body) async for r in client.output(request)] == [size for size, _ in SIZES]


async def test_ping_pong(client: Client) -> None:
    call = client.duplex()
    for response, request in SIZES:
        await call.write(_ask(response, request))
        assert len((await call.read()).payload.body) == response
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_empty_stream(client: Client) -> None:
    call = client.duplex()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_cancel_after_begin(client: Client) -> None:
    call = client.input()
    await call.wait_for_connection()
    call.cancel()
    assert await call.code() is grpc.StatusCode.CANCELLED


async def test_cancel_after_first_response(client: Client) -> None:
    call = client.duplex()
    await call.write(_ask(31415, 27182))
    await call.read()
    call.cancel()
    assert await call.code() is grpc.StatusCode.CANCELLED


async def test_timeout_on_sleeping_server(client: Client) -> None:
    call = client.duplex(timeout=0.05)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(_ask(31415, 27182, interval_us=20_000_000))
        await call.read()
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("text", ["test status message", SPECIAL, ""])
async def test_status_code_and_message(client: Client, text: str) -> None:
    status = {"code": 2, "message": text}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.unary(message("SimpleRequest")(response_status=status))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNKNOWN, text)
    # With the synchronous client: grpc.aio's gives INTERNAL when a write fails before it looks at the status
    # that came, whatever the server (grpc/grpc#36066).
    request = message("StreamingOutputCallRequest")(response_status=status)
    sync = await asyncio.to_thread(_refusal, client.address, [request] * 20)
    assert (sync.code(), sync.details()) == (grpc.StatusCode.UNKNOWN, text)


def _refusal(address: str, requests: list[Any]) -> Any:
    with (
        grpc.insecure_channel(address) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        list(Client(channel, address).duplex(iter(requests)))
    return caught.value


async def test_custom_metadata(client: Client) -> None:
    metadata = ((INITIAL_KEY, "test_initial_metadata_value"), (TRAILING_KEY, b"\xab\xab\xab"))
    call = client.unary(message("SimpleRequest")(response_size=10), metadata=metadata)
    assert dict(await call.initial_metadata())[INITIAL_KEY] == "test_initial_metadata_value"
    assert dict(await call.trailing_metadata())[TRAILING_KEY] == b"\xab\xab\xab"
    stream = client.duplex(metadata=metadata)
    await stream.write(_ask(10, 10))
    await stream.done_writing()
    assert [len(r.payload.body) async for r in stream] == [10]
    assert dict(await stream.initial_metadata())[INITIAL_KEY] == "test_initial_metadata_value"
    assert dict(await stream.trailing_metadata())[TRAILING_KEY] == b"\xab\xab\xab"


@pytest.mark.parametrize("service", ["TestService", "UnimplementedService"])
async def test_unimplemented_method_and_service(client: Client, service: str) -> None:
    call = client.method("UnimplementedCall", "Empty", "Empty", "unary_unary", service)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(message("Empty")())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_that_does_not_parse_is_the_clients_mistake(client: Client) -> None:
    call = client.channel.unary_unary("/grpc.testing.TestService/UnaryCall")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_synchronous_client_is_served_too(client: Client) -> None:
    def run() -> list[int]:
        with grpc.insecure_channel(address) as channel:
            sync = Client(channel, address)
            assert len(sync.unary(message("SimpleRequest")(response_size=100)).payload.body) == 100

            def requests() -> Iterator[Any]:
                for response, size in SIZES:
                    yield _ask(response, size)

            return [len(r.payload.body) for r in sync.duplex(requests())]

    door, address = await server.start()
    assert await asyncio.to_thread(run) == [size for size, _ in SIZES]
    await door.stop(0)
