"""channelz for the native door: its server and its sockets, which gRPC's core knows nothing of.

Channels, of which this process may have some as a client, are still answered by the core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2

_SERVER_ID = 1
_MAX_RESULTS = 100


class NativeChannelz(channelz.aio.ChannelzServicer):  # type: ignore[misc]
    """totals, connections: as NativeDoor gives them. Sockets have their connections' ids."""

    def __init__(
        self,
        address: Callable[[], str],
        totals: Callable[[], Mapping[str, int]],
        connections: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self._address = address
        self._totals = totals
        self._connections = connections

    async def GetServers(self, request: Any, context: Any) -> Any:
        servers = [self._server()] if request.start_server_id <= _SERVER_ID else []
        return channelz_pb2.GetServersResponse(server=servers, end=True)

    async def GetServer(self, request: Any, context: Any) -> Any:
        if request.server_id != _SERVER_ID:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no server {request.server_id}")
        return channelz_pb2.GetServerResponse(server=self._server())

    async def GetServerSockets(self, request: Any, context: Any) -> Any:
        if request.server_id != _SERVER_ID:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no server {request.server_id}")
        limit = min(max(request.max_results, 0) or _MAX_RESULTS, _MAX_RESULTS)
        found = sorted((c for c in self._connections() if c["id"] >= request.start_socket_id), key=_id)
        refs = [channelz_pb2.SocketRef(socket_id=c["id"], name=c["peer"]) for c in found[:limit]]
        return channelz_pb2.GetServerSocketsResponse(socket_ref=refs, end=len(found) <= limit)

    async def GetSocket(self, request: Any, context: Any) -> Any:
        found = next((c for c in self._connections() if c["id"] == request.socket_id), None)
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no socket {request.socket_id}")
        assert found is not None, "abort raises"
        return channelz_pb2.GetSocketResponse(socket=_socket(found))

    def _server(self) -> Any:
        totals = self._totals()
        return channelz_pb2.Server(
            ref=channelz_pb2.ServerRef(server_id=_SERVER_ID, name=self._address()),
            data=channelz_pb2.ServerData(
                calls_started=totals["calls_started"],
                calls_succeeded=totals["calls_succeeded"],
                calls_failed=totals["calls_failed"],
            ),
        )


def _id(connection: Mapping[str, Any]) -> int:
    return int(connection["id"])


def _socket(connection: Mapping[str, Any]) -> Any:
    return channelz_pb2.Socket(
        ref=channelz_pb2.SocketRef(socket_id=connection["id"], name=connection["peer"]),
        data=channelz_pb2.SocketData(
            streams_started=connection["calls_started"],
            streams_succeeded=connection["calls_succeeded"],
            streams_failed=connection["calls_failed"],
            messages_sent=connection["messages_sent"],
            messages_received=connection["messages_received"],
            keep_alives_sent=connection["keepalives_sent"],
        ),
    )
