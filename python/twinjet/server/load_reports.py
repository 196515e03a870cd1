"""Tells balancers how loaded this server is: with every call's trailers, and by xds.service.orca.v3.OpenRcaService.

The service's messages have two fields and one, and are read and written as bytes: the packages that carry them bring
23 MB of others and overwrite googleapis-common-protos.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from twinjet.errors import DeadlineUnreachable, Overloaded, RequestFailed, TwinjetError, Unavailable
from twinjet.scheduler.orca import TRAILER, DeploymentLoad, ServedLoad

if TYPE_CHECKING:
    from twinjet.server.deployments import Deployments
    from twinjet.server.doors import HandlerRegistry

SERVICE_NAME: Final = "xds.service.orca.v3.OpenRcaService"
SAMPLE_S: Final = 0.1
MIN_INTERVAL_S: Final = 0.1
DEFAULT_INTERVAL_S: Final = 1.0
MAX_INTERVAL_S: Final = 3600.0
MAX_REPORTS_PER_S: Final = 1000
"""Of all streams together; the more there are the seldomer each gets one, since anybody may open thousands."""


class LoadReports:
    """The load reports of one server."""

    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments
        self._served = ServedLoad()
        self._trailer: tuple[tuple[str, bytes], ...] = ()
        self._made_at = 0.0
        self._num_streams = 0

    async def run(self) -> None:
        """Take readings until cancelled."""
        while True:
            self._served.sample(time.monotonic(), self._readings())
            await asyncio.sleep(SAMPLE_S)

    def count(self, error: BaseException | None) -> None:
        """A request for an answer came to its end. error: what it failed with, None if it did not."""
        if error is None:
            self._served.count(failed=False)
        elif _is_ours(error):
            self._served.count(failed=True)

    def trailer(self) -> tuple[tuple[str, bytes], ...]:
        """Give the trailing metadata for a call that ends now."""
        now = time.monotonic()
        if not self._trailer or now - self._made_at >= SAMPLE_S:
            self._trailer = ((TRAILER, self._report(details=False)),)
            self._made_at = now
        return self._trailer

    def add_to(self, server: HandlerRegistry) -> None:
        """Answer OpenRcaService."""
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(self._stream)
        methods = {"StreamCoreMetrics": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))

    async def _stream(self, request: bytes, context: Any) -> None:
        try:
            interval_s = report_interval_s(request)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not an OrcaLoadReportRequest")
        self._num_streams += 1
        try:
            while True:
                await context.write(self._report(details=True))
                await asyncio.sleep(max(interval_s, self._num_streams / MAX_REPORTS_PER_S))
        finally:
            self._num_streams -= 1

    def _report(self, *, details: bool) -> bytes:
        return self._served.report(self._readings(), details=details).encode()

    def _readings(self) -> list[DeploymentLoad]:
        readings = []
        for deployment in self._deployments.by_name.values():
            max_running = 0
            if deployment.is_ready and not self._deployments.is_draining:
                max_running = deployment.dispatcher.max_running
            readings.append(DeploymentLoad(deployment.name, deployment.dispatcher.totals(), max_running))
        return readings


def report_interval_s(request: bytes) -> float:
    """Read the interval of an xds.service.orca.v3.OrcaLoadReportRequest, within our bounds.

    Raises DecodeError.
    """
    interval_s = 0.0
    place = 0
    while place < len(request):
        tag, place = _read_varint(request, place)
        if tag & 7 != 2:
            raise DecodeError("a field of another type")
        size, place = _read_varint(request, place)
        if place + size > len(request):
            raise DecodeError("cut short")
        if tag >> 3 == 1:
            interval_s = Duration.FromString(request[place : place + size]).ToNanoseconds() / 1e9
        place += size
    if interval_s <= 0:
        return DEFAULT_INTERVAL_S
    return min(max(interval_s, MIN_INTERVAL_S), MAX_INTERVAL_S)


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(data):
            raise DecodeError("cut short")
        value |= (data[place] & 0x7F) << shift
        place += 1
        if data[place - 1] < 0x80:
            return value, place
    raise DecodeError("a number too long")


def _is_ours(error: BaseException) -> bool:
    """Whether a failure speaks against this server; a client's mistakes and spent quotas do not."""
    if isinstance(error, Overloaded):
        return not error.quotas
    return isinstance(error, Unavailable | RequestFailed | DeadlineUnreachable) or not isinstance(
        error, TwinjetError
    )
