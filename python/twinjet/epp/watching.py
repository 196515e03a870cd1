"""What replicas tell of themselves: models and adapters, load, and what their caches hold.

For each replica one connection and one task that begins anew, with pauses, whatever happens to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration

from twinjet.epp import orca
from twinjet.epp.picking import EndpointPicker, ModelFacts, Replica
from twinjet.errors import ConfigError
from twinjet.protobuf_bytes import field
from twinjet.v1 import model_pb2, service_pb2_grpc

if TYPE_CHECKING:
    from twinjet.epp.mirroring import KvMirror
    from twinjet.epp.settings import ReplicaSettings

logger = logging.getLogger("twinjet.epp")

_CALL_S = 5.0
_SILENT_REPORTS = 4
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 3.0
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 3000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A replica that restarts at its old address is another connection, whatever the channel knew of it.
    ("grpc.use_local_subchannel_pool", 1),
]


class Watcher:
    """Follows the replicas of a picker. mirror: takes in KV events; None: they are not asked for."""

    def __init__(self, picker: EndpointPicker, settings: ReplicaSettings, mirror: KvMirror | None) -> None:
        self._picker = picker
        self._settings = settings
        self._mirror = mirror
        self._tasks: dict[Replica, asyncio.Task[None]] = {}
        self._credentials = _credentials(settings)
        self._changed = asyncio.Event()

    async def run(self, source: AsyncIterator[list[str]]) -> None:
        """Follow the replicas that the source names, until cancelled."""
        try:
            async for addresses in source:
                added, removed = self._picker.set_replicas(addresses)
                for replica in removed:
                    logger.info("replica %s is gone", replica.address)
                    self._tasks.pop(replica).cancel()
                for replica in added:
                    logger.info("replica %s", replica.address)
                    task = asyncio.create_task(self._follow(replica), name=replica.address)
                    task.add_done_callback(log_failure)
                    self._tasks[replica] = task
                self._tell()
            await asyncio.Event().wait()
        finally:
            await end_tasks(self._tasks.values())

    async def wait_for_change(self) -> None:
        """Wait until a replica comes, goes, or begins or stops to answer."""
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _follow(self, replica: Replica) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began = asyncio.get_running_loop().time()
            is_silent = False
            try:
                await self._follow_once(replica)
            except TimeoutError:
                is_silent = True
                logger.warning("replica %s has been silent for too long", replica.address)
            except (grpc.aio.AioRpcError, ValueError) as error:
                is_silent = replica.is_silent and _is_late(error)
                reason = error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)
                level = logging.WARNING if replica.is_up else logging.DEBUG
                logger.log(level, "replica %s does not answer: %s", replica.address, reason)
            self._picker.set_up(replica, is_up=False, is_silent=is_silent)
            self._tell()
            if asyncio.get_running_loop().time() - began > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _follow_once(self, replica: Replica) -> None:
        async with self._channel(replica) as channel:
            await self._read_facts(replica, channel)
            helpers = [asyncio.create_task(self._refresh_facts(replica, channel))]
            if self._mirror is not None:
                helpers.append(asyncio.create_task(self._mirror.follow(replica, channel)))
            try:
                await self._follow_load(replica, channel)
            finally:
                await end_tasks(helpers)

    def _channel(self, replica: Replica) -> grpc.aio.Channel:
        options: list[tuple[str, Any]] = list(_CHANNEL_OPTIONS)
        if self._credentials is None:
            return grpc.aio.insecure_channel(replica.address, options)
        if self._settings.tls_name:
            options.append(("grpc.ssl_target_name_override", self._settings.tls_name))
        return grpc.aio.secure_channel(replica.address, self._credentials, options)

    async def _refresh_facts(self, replica: Replica, channel: grpc.aio.Channel) -> None:
        serving = replica.serving
        waited_s = 0.0
        while True:
            await asyncio.sleep(self._settings.report_s)
            waited_s += self._settings.report_s
            # A deployment that has come up is not ready in the facts yet.
            if waited_s >= self._settings.facts_s or replica.serving != serving:
                serving, waited_s = replica.serving, 0.0
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await self._read_facts(replica, channel)

    async def _read_facts(self, replica: Replica, channel: grpc.aio.Channel) -> None:
        stub: Any = service_pb2_grpc.ModelServiceStub(channel)
        listed = await stub.ListModels(model_pb2.ListModelsRequest(), timeout=_CALL_S)
        facts = {}
        for model in listed.models:
            adapters: frozenset[str] = frozenset()
            if model_pb2.CAPABILITY_ADAPTERS in model.capabilities:
                request = model_pb2.ListAdaptersRequest(model=model.name)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await stub.ListAdapters(request, timeout=_CALL_S)
                    adapters = frozenset(adapter.name for adapter in answer.adapters)
            facts[model.name] = ModelFacts(
                is_ready=model.state == model_pb2.MODEL_STATE_READY,
                deployment=model.deployment,
                adapters=adapters,
                kv_tokens=model.kv_cache.num_blocks * model.kv_cache.block_size,
            )
        if not replica.is_gone:
            self._picker.set_facts(replica, facts)

    async def _follow_load(self, replica: Replica, channel: grpc.aio.Channel) -> None:
        interval_s = self._settings.report_s
        interval = Duration(nanos=int(interval_s % 1 * 1e9), seconds=int(interval_s))
        method: Any = channel.unary_stream("/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics")
        call = method(field(1, interval.SerializeToString()))
        try:
            while True:
                # A machine that hangs keeps its connection.
                async with asyncio.timeout(interval_s * _SILENT_REPORTS + _CALL_S):
                    data = await call.read()
                if data is grpc.aio.EOF:
                    raise ValueError("it has ended its load reports")
                self._picker.report(replica, orca.read(data))
                if not replica.is_up:
                    self._picker.set_up(replica, is_up=True)
                    self._tell()
        finally:
            call.cancel()


def _is_late(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until they have ended; what they failed with is logged."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        log_failure(task)


def log_failure(task: asyncio.Task[None]) -> None:
    """Log what a task has failed with that should not fail."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the watch of a replica failed", exc_info=error)


def _credentials(settings: ReplicaSettings) -> grpc.ChannelCredentials | None:
    if settings.tls_ca is None:
        return None
    try:
        return grpc.ssl_channel_credentials(settings.tls_ca.read_bytes())
    except OSError as error:
        raise ConfigError(f"replicas.tls_ca: cannot read {settings.tls_ca}: {error.strerror}") from error
