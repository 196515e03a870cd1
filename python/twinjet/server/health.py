"""grpc.health.v1.Health: of each model, each service and, under "", the whole server.

grpcio's own servicer holds a lock while it writes to a watcher, so that one who does not read stops the news for all,
and forgets the others when one leaves. Here every watcher gets the latest state, never a backlog.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health_pb2

from twinjet.errors import NotFound
from twinjet.protobuf_bytes import field
from twinjet.server.status import to_failure

if TYPE_CHECKING:
    from twinjet.server.doors import HandlerRegistry

SERVICE_NAME: Final = "grpc.health.v1.Health"

_Response = health_pb2.HealthCheckResponse


class Health:
    """What is served, by name. All methods are called on one loop."""

    def __init__(self) -> None:
        self._is_serving: dict[str, bool] = {}
        self._changed = asyncio.Event()

    def set(self, name: str, is_serving: bool) -> None:
        """Tell whether a name is served."""
        if self._is_serving.get(name) is not is_serving:
            self._is_serving[name] = is_serving
            self._changed.set()
            self._changed = asyncio.Event()

    def add_to(self, server: HandlerRegistry) -> None:
        """Answer Check, List and Watch."""
        request = health_pb2.HealthCheckRequest.FromString
        response = _Response.SerializeToString
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {
            "Check": unary(self._check, request, response),
            "Watch": stream(self._watch, request, response),
            "List": unary(self._list),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))

    def _status(self, name: str) -> Any:
        is_serving = self._is_serving.get(name)
        if is_serving is None:
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if is_serving else _Response.NOT_SERVING

    async def _check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        if request.service not in self._is_serving:
            failure = to_failure(NotFound("service", request.service))
            await context.abort(failure.code, failure.message, failure.trailing_metadata)
        return _Response(status=self._status(request.service))

    async def _watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                told = status
                await context.write(_Response(status=status))
            else:
                await changed.wait()

    async def _list(self, request: bytes, context: Any) -> bytes:
        # HealthListResponse, which grpcio-health-checking does not have yet: a map from name to response.
        entries = []
        for name in self._is_serving:
            key, value = name.encode(), _Response(status=self._status(name)).SerializeToString()
            entries.append(field(1, field(1, key) + field(2, value)))
        return b"".join(entries)
