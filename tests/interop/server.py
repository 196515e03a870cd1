"""The server side of gRPC's interoperability tests on the native door; `python -m tests.interop.server` runs it.

It prints its port, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

from twinjet.config import ServerSettings
from twinjet.server.native_door import NativeDoor

INITIAL_KEY = "x-grpc-test-echo-initial"
TRAILING_KEY = "x-grpc-test-echo-trailing-bin"
PROTO = Path(__file__).with_name("testing.proto")


def _load() -> descriptor_pool.DescriptorPool:
    """A pool of its own: other packages have a grpc.testing, too."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.pb"
        arguments = ["protoc", f"-I{PROTO.parent}", f"--descriptor_set_out={out}", PROTO.name]
        assert protoc.main(arguments) == 0
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


POOL = _load()


def message(name: str) -> Any:
    """The class of a message of testing.proto."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"grpc.testing.{name}"))


def _payload(size: int) -> Any:
    return message("Payload")(body=bytes(size))


class TestService:
    """What each method does is laid down by gRPC's description of its interoperability tests."""

    __test__ = False

    async def EmptyCall(self, request: Any, context: Any) -> Any:
        await _echo_metadata(context)
        return message("Empty")()

    async def UnaryCall(self, request: Any, context: Any) -> Any:
        await _echo_metadata(context)
        await _echo_status(request, context)
        return message("SimpleResponse")(payload=_payload(request.response_size))

    async def StreamingOutputCall(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for response in _responses(request):
            yield response

    async def StreamingInputCall(self, requests: AsyncIterator[Any], context: Any) -> Any:
        total = 0
        async for request in requests:
            total += len(request.payload.body)
        return message("StreamingInputCallResponse")(aggregated_payload_size=total)

    async def FullDuplexCall(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await _echo_metadata(context)
        async for request in requests:
            await _echo_status(request, context)
            async for response in _responses(request):
                yield response


async def _responses(request: Any) -> AsyncIterator[Any]:
    for parameters in request.response_parameters:
        await asyncio.sleep(parameters.interval_us / 1e6)
        yield message("StreamingOutputCallResponse")(payload=_payload(parameters.size))


async def _echo_metadata(context: Any) -> None:
    sent = dict(context.invocation_metadata())
    if INITIAL_KEY in sent:
        await context.send_initial_metadata(((INITIAL_KEY, sent[INITIAL_KEY]),))
    if TRAILING_KEY in sent:
        context.set_trailing_metadata(((TRAILING_KEY, sent[TRAILING_KEY]),))


async def _echo_status(request: Any, context: Any) -> None:
    if request.HasField("response_status") and request.response_status.code:
        codes = {code.value[0]: code for code in grpc.StatusCode}
        await context.abort(codes[request.response_status.code], request.response_status.message)


def handlers() -> grpc.GenericRpcHandler:
    """TestService's handlers."""
    service = POOL.FindServiceByName("grpc.testing.TestService")
    servicer = TestService()
    made = {}
    for method in service.methods:
        behaviour = getattr(servicer, method.name, None)
        if behaviour is None:
            continue
        kinds = (
            "stream" if method.client_streaming else "unary",
            "stream" if method.server_streaming else "unary",
        )
        make = getattr(grpc, f"{kinds[0]}_{kinds[1]}_rpc_method_handler")
        made[method.name] = make(
            behaviour,
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, made)


async def start(**settings: Any) -> tuple[NativeDoor, str]:
    """A running door and its address."""
    door = NativeDoor(ServerSettings(port=0, **settings))
    door.add_generic_rpc_handlers((handlers(),))
    address = door.bind()
    await door.start()
    return door, address


async def _main() -> None:
    door, address = await start()
    print(address.rpartition(":")[2], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await door.stop(0)


if __name__ == "__main__":
    asyncio.run(_main())
