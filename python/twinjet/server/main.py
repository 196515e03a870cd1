"""The life of the server: bind, load, serve, drain, stop. The exit code tells how it went."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

import grpc
import uvloop
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from twinjet.config import Config, DeploymentSettings, ServerSettings
from twinjet.engines.base import Engine
from twinjet.engines.factory import make_engine, prepared
from twinjet.engines.supervisor import State
from twinjet.errors import ConfigError, Unavailable
from twinjet.grammar.limits import GrammarLimits
from twinjet.grammar.room import GrammarRoom
from twinjet.server.admin import AdminServicer
from twinjet.server.deployments import Deployments
from twinjet.server.grammar import Grammars
from twinjet.server.handlers import add_service
from twinjet.server.inference import InferenceServicer
from twinjet.server.live import LiveRequests
from twinjet.server.metrics import Metrics
from twinjet.server.models import ModelServicer
from twinjet.v1 import service_pb2

logger = logging.getLogger("twinjet.server")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
CLEANUP_S = 10.0
"""How long ended requests may take to let go of the engine."""

_SERVICES = [
    service_pb2.DESCRIPTOR.services_by_name[name]
    for name in ("InferenceService", "ModelService", "AdminService")
]


class Server:
    """One gRPC server over the deployments of a configuration."""

    def __init__(
        self,
        config: Config,
        make: Callable[[str, DeploymentSettings], Engine] = make_engine,
        on_change: Callable[[Server], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.address = ""
        self.deployments = Deployments(config, make, self._model_changed)
        self.live = LiveRequests()
        self.metrics = Metrics()
        limits = GrammarLimits(**config.grammar.model_dump(exclude={"verify"}))
        self.grammars = Grammars(GrammarRoom(limits), verify=config.grammar.verify)
        self._on_change = on_change
        self._stop_asked = asyncio.Event()
        self._health = health_aio.HealthServicer()
        self._health_updates: asyncio.Queue[str] = asyncio.Queue()
        self._server = grpc.aio.server(options=_channel_options(config.server))
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Bind the port and begin to load. Raises ConfigError if the port cannot be bound."""
        self._register()
        self.address = self._bind()
        if self.config.server.metrics_port:
            self.metrics.watch(self.deployments)
            self.metrics.listen(self.config.server.host, self.config.server.metrics_port)
        for name in ["", *self.deployments.models, *(s.full_name for s in _SERVICES)]:
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        self._tasks.append(asyncio.create_task(self._publish_health(), name="health"))
        for deployment in self.deployments.by_name.values():
            deployment.supervisor.start()

    def ask_to_stop(self) -> None:
        """Make run() drain and return."""
        self._stop_asked.set()

    async def run(self) -> int:
        """Serve until asked to stop or until nothing is left to serve; return the exit code."""
        await self._stop_asked.wait()
        failed = all(d.supervisor.state is State.FAILED for d in self.deployments.by_name.values())
        errors = [d.supervisor.config_error for d in self.deployments.by_name.values()]
        await self.stop()
        if any(errors) and not self.config.server.allow_partial:
            return EXIT_CONFIG
        return EXIT_FAILED if failed else EXIT_OK

    async def stop(self) -> None:
        """Drain within the grace period, end what is left, then stop the engines."""
        await self.drain(None)
        await self._server.stop(0)
        await self.live.wait(CLEANUP_S)
        for deployment in self.deployments.by_name.values():
            await deployment.supervisor.stop()
        await self.grammars.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drain(self, grace_s: float | None) -> tuple[int, int]:
        """Refuse new requests, let running ones finish, end the rest; gives (finished, ended)."""
        self.deployments.drain()
        for model in self.deployments.models:
            self._model_changed(model)
        num_live = len(self.live)
        await self.live.wait(self.config.server.grace_s if grace_s is None else grace_s)
        num_ended = len(self.live)
        if num_ended:
            error = Unavailable("the server is shutting down", reason="DRAINING", retry_after_s=1)
            for deployment in self.deployments.by_name.values():
                deployment.dispatcher.detach(error)
            await self.live.wait(CLEANUP_S)
        return num_live - num_ended, num_ended

    def _register(self) -> None:
        servicers = [
            InferenceServicer(self.deployments, self.config.server, self.live, self.metrics, self.grammars),
            ModelServicer(self.deployments),
            AdminServicer(self.deployments, self.config.admin.token, self.drain),
        ]
        for service, servicer in zip(_SERVICES, servicers, strict=True):
            add_service(self._server, service, servicer, self.metrics)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz.add_channelz_servicer(self._server)
        names = [s.full_name for s in _SERVICES]
        names += [
            health.SERVICE_NAME,
            channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name,
            reflection.SERVICE_NAME,
        ]
        reflection.enable_server_reflection(names, self._server)

    def _bind(self) -> str:
        settings = self.config.server
        where = f"{settings.host}:{settings.port}"
        try:
            credentials = _credentials(settings)
            if credentials is None:
                port = self._server.add_insecure_port(where)
            else:
                port = self._server.add_secure_port(where, credentials)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"cannot listen on {where}: {error}") from None
        return f"{settings.host}:{port}"

    def _model_changed(self, model: str) -> None:
        for deployment in self.deployments.of_model(model):
            if deployment.supervisor.state is State.READY:
                self.grammars.warm(*deployment.ready())
        self._health_updates.put_nowait(model)
        self._on_change(self)
        states = [d.supervisor.state for d in self.deployments.by_name.values()]
        broken = any(d.supervisor.config_error for d in self.deployments.by_name.values())
        if all(s is State.FAILED for s in states) or (broken and not self.config.server.allow_partial):
            self.ask_to_stop()

    async def _publish_health(self) -> None:
        """Write health in one place and in order: each model, each service, and the server as a whole."""
        status = health_pb2.HealthCheckResponse
        while True:
            await self._health_updates.get()
            serving = {m: self.deployments.is_serving(m) for m in self.deployments.models}
            whole = any(serving.values())
            for name in ["", *(s.full_name for s in _SERVICES)]:
                await self._health.set(name, status.SERVING if whole else status.NOT_SERVING)
            for model, is_serving in serving.items():
                await self._health.set(model, status.SERVING if is_serving else status.NOT_SERVING)


def _channel_options(settings: ServerSettings) -> list[tuple[str, int]]:
    # gRPC ignores a misspelt option in silence; tests/server/test_keepalive.py shows that these act.
    return [
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        # The core counts an unanswered ping against its own limit, which keepalive_timeout does not change.
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(settings.client_ping_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
    client_ca = settings.tls_client_ca.read_bytes() if settings.tls_client_ca else None
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


async def _serve(config: Config, on_change: Callable[[Server], None]) -> int:
    server = Server(config, on_change=on_change)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.ask_to_stop)
    try:
        await server.start()
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_CONFIG
    logger.info("listening on %s", server.address)
    return await server.run()


def serve(config: Config, on_change: Callable[[Server], None] = lambda _: None) -> int:
    """Run a server until SIGTERM or SIGINT; return the exit code.

    0 after a drain, 1 if every engine failed, 2 if the configuration cannot work.
    on_change: called after every change of a deployment's state or progress.
    """
    engines = {d.engine for d in config.deployments.values()}
    with prepared(engines), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, on_change))
