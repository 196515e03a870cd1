"""The two ways gRPC comes in: grpc.aio, and the native door where it is built. Handlers are the same for both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc_channelz.v1 import channelz

from twinjet.errors import ConfigError
from twinjet.server.binding import server_credentials, why_not

if TYPE_CHECKING:
    from twinjet.config import ServerSettings
    from twinjet.server.inference import Sharing
    from twinjet.server.load_reports import LoadReports

logger = logging.getLogger("twinjet.server")


class HandlerRegistry(Protocol):
    """Where services hang their handlers, as on a grpc.aio.Server."""

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None: ...

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None: ...


class Door(HandlerRegistry, Protocol):
    """A gRPC server: add handlers, bind, start, stop."""

    @property
    def name(self) -> str:
        """As GetLoad tells it: "grpc" or "native"."""

    def channelz_servicer(self) -> Any:
        """Answers for channelz.v1.Channelz."""

    def take_plain_calls(self, sharing: Sharing, load_reports: LoadReports) -> None:
        """Serve calls of Generate that are plain without the handler, if this door can; see server.plain."""

    def watch_refusals(self, tell: Callable[[str, int], None]) -> None:
        """Call tell with the method and number of calls that are refused before any handler hears of them."""

    def bind(self) -> str:
        """Listen on the settings' address and give it. Raises ConfigError."""

    async def start(self) -> None:
        """Begin to answer."""

    def send_away(self) -> None:
        """Ask clients to make new calls on other connections; those are still accepted."""

    async def stop(self, grace_s: float) -> None:
        """Let running calls go on for grace_s, end the rest and close everything."""


class GrpcDoor:
    """grpc.aio, whose core moves the bytes."""

    name = "grpc"

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._server = grpc.aio.server(options=_channel_options(settings))

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        self._server.add_generic_rpc_handlers(tuple(generic_rpc_handlers))

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        self._server.add_registered_method_handlers(service_name, method_handlers)

    def watch_refusals(self, tell: Callable[[str, int], None]) -> None:
        """All calls come to handlers."""

    def channelz_servicer(self) -> Any:
        return channelz.aio.ChannelzServicer()

    def take_plain_calls(self, sharing: Sharing, load_reports: LoadReports) -> None:
        """grpc.aio gives calls one by one."""

    def bind(self) -> str:
        settings = self._settings
        where = f"{settings.literal_host}:{settings.port}"
        credentials = server_credentials(settings)
        try:
            if credentials is None:
                port = self._server.add_insecure_port(where)
            else:
                port = self._server.add_secure_port(where, credentials)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"cannot listen on {where}: {why_not(settings) or error}") from None
        return f"{settings.literal_host}:{port}"

    async def start(self) -> None:
        await self._server.start()

    def send_away(self) -> None:
        """grpc.aio sends GOAWAY only when it stops."""

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


def make_door(settings: ServerSettings) -> Door:
    """Make the door that the settings ask for. Raises ConfigError if this build does not have it."""
    # The native door is not loaded where it is not asked for.
    if settings.door == "grpc":
        return GrpcDoor(settings)
    from twinjet.server import native_door

    if native_door.is_available():
        return native_door.NativeDoor(settings)
    if settings.door == "native":
        raise ConfigError("server.door: this build has no native door; it is built where nghttp2 is found")
    logger.info(
        "this build has no native door (nghttp2 was not found, see docs/door.md); gRPC's library serves"
    )
    return GrpcDoor(settings)


def _channel_options(settings: ServerSettings) -> list[tuple[str, int]]:
    # gRPC ignores a misspelt option in silence; tests/server/test_keepalive.py shows that these act.
    return [
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        # Else the core drops calls by itself, without details, when many come at once: those that were not taken
        # up within 30 s, and some of those beyond 1,000. The gate and the scheduler refuse what is too much.
        ("grpc.server_max_unrequested_time_in_server", 2**31 - 1),
        ("grpc.server.max_pending_requests", 2**31 - 1),
        ("grpc.server.max_pending_requests_hard_limit", 2**31 - 1),
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        # The core counts an unanswered ping against its own limit, which keepalive_timeout does not change.
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(settings.client_ping_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
    ]
