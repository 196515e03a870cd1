"""The life of the endpoint picker: bind, find the replicas, pick, end. The exit code tells how it went."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING

import uvloop
from prometheus_client import make_wsgi_app

from twinjet import http_serving
from twinjet.epp import wire
from twinjet.epp.metrics import EppMetrics
from twinjet.epp.mirroring import KvMirror
from twinjet.epp.picking import EndpointPicker
from twinjet.epp.servicer import ExtProc
from twinjet.epp.sources import make_source
from twinjet.epp.tokenising import Tokenisers
from twinjet.epp.watching import Watcher
from twinjet.errors import ConfigError
from twinjet.server.doors import make_door
from twinjet.server.health import Health

if TYPE_CHECKING:
    from twinjet.epp.settings import EppConfig

logger = logging.getLogger("twinjet.epp")

EXIT_OK = 0
EXIT_CONFIG = 2


class Epp:
    """One endpoint picker."""

    def __init__(self, config: EppConfig) -> None:
        self.config = config
        self.address = ""
        self.picker = EndpointPicker(config.picking, config.index, config.shedding)
        self.metrics = EppMetrics(self.picker)
        tokenisers = Tokenisers(config.tokenizers) if config.tokenizers else None
        self._ext_proc = ExtProc(
            self.picker, config.picking, self.metrics, tokenisers.tokenise if tokenisers else None
        )
        mirror = None
        if config.index.mode == "events":
            mirror = KvMirror(
                self.picker, config.replicas.admin_token, config.index.max_blocks, self.metrics.count_gap
            )
        self._watcher = Watcher(self.picker, config.replicas, mirror)
        self._health = Health()
        self._door = make_door(config.server.door_settings())
        self._tasks: list[asyncio.Task[None]] = []
        self._exits = contextlib.ExitStack()

    async def start(self) -> None:
        """Bind and begin to look for replicas. Raises ConfigError for what cannot work."""
        source = make_source(self.config.replicas)
        self._ext_proc.add_to(self._door)
        self._health.add_to(self._door)
        self._set_health(is_alive=True)
        self.address = self._door.bind()
        if self.config.server.metrics_port:
            self._listen_http()
        await self._door.start()
        self._tasks = [
            asyncio.create_task(self._watcher.run(source), name="replicas"),
            asyncio.create_task(self._publish_health(), name="health"),
        ]

    async def stop(self) -> None:
        """Tell that no more should come, let open streams end within the grace, and end."""
        self._set_health(is_alive=False)
        self._door.send_away()
        await self._door.stop(self.config.server.grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._exits.close()

    async def _publish_health(self) -> None:
        while True:
            self._set_health(is_alive=True)
            await self._watcher.wait_for_change()

    def _set_health(self, *, is_alive: bool) -> None:
        is_ready = is_alive and any(replica.is_up for replica in self.picker.replicas.values())
        self._health.set("liveness", is_alive)
        for name in ("", "readiness", wire.SERVICE_NAME):
            self._health.set(name, is_ready)

    def _listen_http(self) -> None:
        settings = self.config.server
        try:
            server = http_serving.listen(
                make_wsgi_app(self.metrics.registry), settings.host, settings.metrics_port
            )
        except OSError as error:
            raise ConfigError(
                f"server.metrics_port: cannot listen on {settings.host} port {settings.metrics_port}: "
                f"{error.strerror or error}"
            ) from error
        self._exits.callback(server.server_close)
        self._exits.callback(server.shutdown)


async def _run(config: EppConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        epp = Epp(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await epp.start()
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_CONFIG
    logger.info("picking endpoints on %s", epp.address)
    await stop.wait()
    await epp.stop()
    return EXIT_OK


def serve(config: EppConfig, log_level: str = "info") -> int:
    """Pick until SIGTERM or SIGINT; return the exit code: 0, or 2 if the configuration cannot work."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("twinjet").setLevel(log_level.upper())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(config))
