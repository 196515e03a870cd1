"""The life of the server: bind, load, serve, drain, stop. The exit code tells how it went."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Callable

import uvloop
from google.protobuf.descriptor import ServiceDescriptor
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

from twinjet.config import Config, DeploymentSettings, MirrorSettings
from twinjet.engines.base import Engine
from twinjet.engines.factory import make_engine, prepared
from twinjet.engines.supervisor import State
from twinjet.errors import ConfigError, TwinjetError, Unavailable
from twinjet.grammar.limits import GrammarLimits
from twinjet.grammar.room import GrammarRoom
from twinjet.private_folder import remove_left
from twinjet.routing.mirror import Mirror, RecordFiles
from twinjet.server.admin import AdminServicer
from twinjet.server.deployments import Deployments
from twinjet.server.doors import make_door
from twinjet.server.grammar import Grammars
from twinjet.server.handlers import add_service
from twinjet.server.health import SERVICE_NAME as HEALTH_SERVICE
from twinjet.server.health import Health
from twinjet.server.inference import InferenceServicer
from twinjet.server.lenient import LenientRegistry
from twinjet.server.live import LiveRequests
from twinjet.server.load_reports import LoadReports
from twinjet.server.metrics import Metrics
from twinjet.server.models import ModelServicer
from twinjet.server.reflection import add_reflection
from twinjet.server.web import Web
from twinjet.v1 import service_pb2

logger = logging.getLogger("twinjet.server")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
CLEANUP_S = 10.0
"""How long ended requests may take to let go of the engine."""
LIVENESS = "liveness"
"""A name in the health service that is served as long as the process answers."""
FAREWELL_S = 0.5
"""How long calls that came last may take to be refused; at once, grpc.aio would end them with a bare CANCELLED."""

_YOUNG_OBJECTS = 20_000
"""Objects that come to be, less those that are gone, before the garbage collector looks at them."""

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
        self.mirror = _mirror(config.mirror)
        self._web: Web | None = None
        limits = GrammarLimits(**config.grammar.model_dump(exclude={"verify"}))
        self.grammars = Grammars(GrammarRoom(limits), verify=config.grammar.verify)
        self._on_change = on_change
        self._stop_asked = asyncio.Event()
        self._is_signalled = False
        self._hurry_asked = asyncio.Event()
        self.load_reports = LoadReports(self.deployments)
        self._health = Health()
        self._health_updates: asyncio.Queue[str] = asyncio.Queue()
        self._door = make_door(config.server)
        self._services: list[ServiceDescriptor] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Bind the ports and begin to load. Raises ConfigError if one cannot be bound, or for unusable TLS files."""
        self._register()
        self.address = self._door.bind()
        try:
            for deployment in self.deployments.by_name.values():
                deployment.open()
            if self.config.server.metrics_port:
                self.metrics.watch(self.deployments)
                self._web = self._listen_http()
        except ConfigError:
            for deployment in self.deployments.by_name.values():
                deployment.close()
            raise
        for name in ["", *self.deployments.models, *(s.full_name for s in self._services)]:
            self._health.set(name, False)
        # Of the process alone, for whoever starts it again: it may load, drain or have no model that runs.
        self._health.set(LIVENESS, True)
        await self._door.start()
        if left := await asyncio.to_thread(remove_left):
            logger.info("removed %d folders of servers that were killed", len(left))
        self._tasks.append(asyncio.create_task(self._publish_health(), name="health"))
        self._tasks.append(asyncio.create_task(self.load_reports.run(), name="load reports"))
        for deployment in list(self.deployments.by_name.values()):
            deployment.supervisor.start()

    async def reload(self, read: Callable[[], Config]) -> None:
        """Read the configuration again and bring deployments and routes to it; logs what was done or why not.

        A configuration that cannot be had whole changes nothing. Settings of the server itself need a restart.
        """
        try:
            config = read()
            for section in ("server", "admin", "grammar", "mirror", "protocols"):
                if getattr(config, section) != getattr(self.config, section):
                    raise ConfigError(f"[{section}] changed; that needs a restart")
            done = await self.deployments.reload(config, self.config.server.grace_s)
        except TwinjetError as error:
            logger.error("the configuration was not reloaded, nothing has changed: %s", error)
            return
        self.config = config
        for line in done or ["nothing to change"]:
            logger.info("configuration reloaded: %s", line)

    @property
    def door_name(self) -> str:
        """How gRPC comes in: "grpc" or "native"."""
        return self._door.name

    def ask_to_stop(self) -> None:
        """Make run() drain and return."""
        self._stop_asked.set()

    def take_signal(self) -> None:
        """Ask to stop; the second time, have what still runs ended at once."""
        if self._is_signalled:
            self._hurry_asked.set()
        self._is_signalled = True
        self.ask_to_stop()

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
        self._door.send_away()
        await self.drain(None)
        await self._door.stop(FAREWELL_S)
        await self.live.wait(CLEANUP_S)
        await self.mirror.stop()
        for deployment in list(self.deployments.by_name.values()):
            await deployment.supervisor.stop()
            deployment.close()
        await self.grammars.close()
        if self._web is not None:
            await asyncio.to_thread(self._web.close)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drain(self, grace_s: float | None) -> tuple[int, int]:
        """Refuse new requests, let running ones finish, end the rest; gives (finished, ended)."""
        self.deployments.drain()
        for model in self.deployments.models:
            self._model_changed(model)
        num_live = len(self.live)
        await self._wait_for_live(self.config.server.grace_s if grace_s is None else grace_s)
        num_ended = len(self.live)
        if num_ended:
            error = Unavailable("the server is shutting down", reason="DRAINING", retry_after_s=1)
            for deployment in list(self.deployments.by_name.values()):
                deployment.dispatcher.detach(error)
            await self.live.wait(CLEANUP_S)
        return num_live - num_ended, num_ended

    async def _wait_for_live(self, limit_s: float) -> None:
        waits = [asyncio.create_task(self.live.wait(limit_s)), asyncio.create_task(self._hurry_asked.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _register(self) -> None:
        inference = InferenceServicer(
            self.deployments, self.config.server, self.live, self.metrics, self.mirror, self.grammars
        )
        self._door.take_plain_calls(inference.sharing, self.load_reports)
        models = ModelServicer(self.deployments, self.config.admin.token)
        admin = AdminServicer(
            self.deployments,
            self.config.admin.token,
            self.drain,
            self.config.server.grace_s,
            door=self._door.name,
        )
        hung = [
            *zip(_SERVICES, (inference, models, admin), strict=True),
            *self._other_protocols(inference, models),
        ]
        self._services = [service for service, _ in hung]
        for service, servicer in hung:
            add_service(self._door, service, servicer, self.metrics, self.load_reports)
        self._door.watch_refusals(
            lambda method, num_calls: self.metrics.count_call(method, "RESOURCE_EXHAUSTED", num_calls)
        )
        lenient = LenientRegistry(self._door)
        self._health.add_to(lenient)
        self.load_reports.add_to(lenient)
        channelz_pb2_grpc.add_ChannelzServicer_to_server(self._door.channelz_servicer(), lenient)
        names = [s.full_name for s in self._services]
        names += [
            HEALTH_SERVICE,
            channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name,
        ]
        add_reflection(lenient, names)

    def _other_protocols(
        self, inference: InferenceServicer, models: ModelServicer
    ) -> list[tuple[ServiceDescriptor, object]]:
        if not self.config.protocols.openengine.enabled:
            return []
        from twinjet.protocols import openengine

        return openengine.servicers(self.config, self.deployments, inference, models)

    def _listen_http(self) -> Web:
        settings = self.config.server
        web = Web(self.deployments, self.metrics, settings.console)
        try:
            web.listen(settings.host, settings.metrics_port)
        except OSError as error:
            raise ConfigError(
                f"server.metrics_port: cannot listen on {settings.host} port {settings.metrics_port}: "
                f"{error.strerror or error}"
            ) from error
        return web

    def _model_changed(self, model: str) -> None:
        is_routed = model in self.deployments.table.routes
        for deployment in self.deployments.of_model(model) if is_routed else ():
            if deployment.supervisor.state is State.READY:
                self.grammars.warm(*deployment.ready())
        self._health_updates.put_nowait(model)
        self._on_change(self)
        # Those that no route names are being tried out by an operator, who hears of it.
        routed = {d.name: d for m in self.deployments.models for d in self.deployments.of_model(m)}
        states = [d.supervisor.state for d in routed.values()]
        broken = any(d.supervisor.config_error for d in routed.values())
        if all(s is State.FAILED for s in states) or (broken and not self.config.server.allow_partial):
            self.ask_to_stop()

    async def _publish_health(self) -> None:
        """Write health in one place and in order: each model, each service, and the server as a whole."""
        # Names that were taken away are told as not serving, since somebody may watch them.
        known: set[str] = set()
        while True:
            await self._health_updates.get()
            serving = {m: self.deployments.is_serving(m) for m in {*known, *self.deployments.models}}
            known.update(serving)
            whole = any(serving.values())
            for name in ["", *(s.full_name for s in self._services)]:
                self._health.set(name, whole)
            for model, is_serving in serving.items():
                self._health.set(model, is_serving)


def _mirror(settings: MirrorSettings) -> Mirror:
    files = None
    if settings.folder is not None:
        try:
            files = RecordFiles(settings.folder, settings.max_file_bytes, settings.max_files)
        except OSError as error:
            raise ConfigError(f"mirror.folder: cannot use {settings.folder}: {error.strerror}") from None
    return Mirror(settings.max_streams, files, record_prompts=settings.record_prompts)


class _Collector:
    """Keeps Python's garbage collector from holding up streams.

    What a server consists of is some 70,000 objects, which take a tenth of a second to walk through, and they stay;
    requests free themselves when they end. So what is there once a deployment serves is never looked at again, and
    what comes later is looked at seldom.
    """

    def __init__(self) -> None:
        self._num_ready = 0
        gc.set_threshold(_YOUNG_OBJECTS, 20, 50)

    def changed(self, server: Server) -> None:
        ready = [d for d in server.deployments.by_name.values() if d.is_ready]
        if len(ready) > self._num_ready:
            gc.collect()
            gc.freeze()
        self._num_ready = len(ready)


async def _serve(
    config: Config, on_change: Callable[[Server], None], read: Callable[[], Config] | None
) -> int:
    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task[None]] = set()
    one_at_a_time = asyncio.Lock()
    collector = _Collector()

    def changed(server: Server) -> None:
        collector.changed(server)
        on_change(server)

    async def reload(read: Callable[[], Config]) -> None:
        async with one_at_a_time:
            await server.reload(read)

    def ask_to_reload() -> None:
        assert read is not None
        task = loop.create_task(reload(read), name="reload")
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    try:
        server = Server(config, on_change=changed)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.take_signal)
        if read is not None:
            loop.add_signal_handler(signal.SIGHUP, ask_to_reload)
        await server.start()
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_CONFIG
    logger.info("listening on %s", server.address)
    logger.info("gRPC comes in through the %s door", server.door_name)
    code = await server.run()
    for task in reloads:
        task.cancel()
    return code


def serve(
    config: Config,
    on_change: Callable[[Server], None] = lambda _: None,
    read: Callable[[], Config] | None = None,
) -> int:
    """Run a server until SIGTERM or SIGINT; return the exit code.

    0 after a drain, 1 if every engine failed, 2 if the configuration cannot work.
    on_change: called after every change of a deployment's state or progress. read: reads the configuration anew; called
    on SIGHUP, which without it is left alone.
    """
    engines = {d.engine for d in config.deployments.values()}
    with prepared(engines), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, on_change, read))
