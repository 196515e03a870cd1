"""A running server with fake engines on a real socket, and readers for what it sends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from twinjet.engines.base import Engine
from twinjet.engines.fake import FakeEngine
from twinjet.engines.supervisor import State
from twinjet.server.main import Server
from twinjet.v1 import generation_pb2, service_pb2_grpc


@dataclass
class Harness:
    """A running server, a channel to it, and the engines it made, newest last."""

    server: Server
    channel: grpc.aio.Channel
    engines: list[Engine]

    def __post_init__(self) -> None:
        self.inference = service_pb2_grpc.InferenceServiceStub(self.channel)
        self.models = service_pb2_grpc.ModelServiceStub(self.channel)
        self.admin = service_pb2_grpc.AdminServiceStub(self.channel)

    @property
    def fakes(self) -> list[FakeEngine]:
        return [engine for engine in self.engines if isinstance(engine, FakeEngine)]

    @property
    def engine(self) -> FakeEngine:
        return self.fakes[-1]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait until the server's state satisfies a condition."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    async def until_ready(self) -> None:
        supervisors = [d.supervisor for d in self.server.deployments.by_name.values()]
        # Long: on a busy machine an engine's process takes many seconds to import what it needs.
        await self.until(lambda: all(s.state is State.READY for s in supervisors), timeout_s=120.0)

    async def until_idle(self) -> None:
        await self.until(lambda: len(self.server.live) == 0)
        for engine in self.fakes:
            load = await engine.load()
            assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)


Serve = Callable[..., Awaitable[Harness]]


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc details of a status, by short type name."""
    kinds = {
        c.DESCRIPTOR.full_name: c
        for c in (
            error_details_pb2.BadRequest,
            error_details_pb2.ErrorInfo,
            error_details_pb2.RetryInfo,
            error_details_pb2.QuotaFailure,
            error_details_pb2.ResourceInfo,
        )
    }
    data = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    assert data is not None, f"{error.code()}: {error.details()} carries no google.rpc details"
    found = {}
    for packed in status_pb2.Status.FromString(data).details:  # type: ignore[arg-type]
        kind = kinds[packed.TypeName()]
        message = kind()
        packed.Unpack(message)
        found[kind.__name__] = message
    return found


async def collect(
    call: Any, messages: list[generation_pb2.GenerateResponse] | None = None
) -> list[generation_pb2.GenerateResponse]:
    """All messages of a stream. Of one that fails, what came before is left in messages."""
    messages = [] if messages is None else messages
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


def kinds(messages: list[generation_pb2.GenerateResponse]) -> list[str]:
    """The names of the events, in order."""
    return [message.WhichOneof("event") or "" for message in messages]


def text_of(messages: list[generation_pb2.GenerateResponse], output_index: int = 0) -> str:
    """The text of one output."""
    return "".join(m.delta.text for m in messages if m.delta.output_index == output_index)
