"""Twinjet behind Ray Serve's gRPC proxy: `TWINJET_UPSTREAM=dns:///twinjet:50051 serve run deploy/ray/serve.yaml`.

Each replica of the Ray deployment passes calls on to Twinjet servers and back, statuses and google.rpc details with them.
Ray's proxy adds a hop and a serialisation for each message; docs/ray.md has what that costs.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
from ray import serve

from twinjet.v1 import service_pb2_grpc

PASSED_ON = frozenset({"x-request-id", "traceparent", "tracestate", "twinjet-prefix-key"})


@serve.deployment(max_ongoing_requests=1000)
class Twinjet:
    """The streaming methods of InferenceService, as Ray looks them up: by their names."""

    def __init__(self) -> None:
        self._channel = grpc.aio.insecure_channel(os.environ.get("TWINJET_UPSTREAM", "127.0.0.1:50051"))
        self._stub = service_pb2_grpc.InferenceServiceStub(self._channel)

    async def Generate(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        async for message in self._pass_on(self._stub.Generate, request, grpc_context):
            yield message

    async def Chat(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        async for message in self._pass_on(self._stub.Chat, request, grpc_context):
            yield message

    async def _pass_on(self, method: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        metadata = [(key, value) for key, value in context.invocation_metadata() if key in PASSED_ON]
        call = method(request, metadata=metadata)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            context.set_code(error.code())
            context.set_details(error.details())
            context.set_trailing_metadata(
                [(k, v) for k, v in error.trailing_metadata() if k == "grpc-status-details-bin"]
            )
            raise
        finally:
            # Reached when Ray closes the generator, too: the engine's work ends with it.
            call.cancel()


app = Twinjet.bind()
