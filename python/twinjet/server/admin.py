"""AdminService: the control plane, with its own authorisation."""

from __future__ import annotations

import asyncio
import hmac
import importlib
import ipaddress
from typing import TYPE_CHECKING, cast

import grpc

from twinjet.engines.base import PrefixCacheEngine
from twinjet.errors import InvalidRequest, NotFound, PermissionRefused, Unsupported
from twinjet.server.kv_events import watch_kv_events
from twinjet.server.routes import RouteServicer
from twinjet.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from twinjet.server.comparison import Comparisons
    from twinjet.server.deployments import Deployment, Deployments
    from twinjet.v1 import compare_pb2

    Context = grpc.aio.ServicerContext[object, object]


class AdminServicer(RouteServicer):
    """See proto AdminService. drain: stop admission, wait up to so many seconds; gives (finished, ended).

    grace_s: of RemoveDeployment where the caller names none. door: as GetLoad tells it.
    """

    def __init__(
        self,
        deployments: Deployments,
        token: str,
        drain: Callable[[float | None], Awaitable[tuple[int, int]]],
        grace_s: float,
        *,
        door: str,
    ) -> None:
        self._deployments = deployments
        self._token = token
        self._drain = drain
        self._grace_s = grace_s
        self._door = door
        self._comparisons: Comparisons | None = None

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        self._authorise(context)
        names = [self._deployments.resolve(request.model)] if request.model else self._deployments.models
        response = pb.GetLoadResponse(door=self._door)
        # Listed before engines are asked, meanwhile routes may change.
        asked = [(name, deployment) for name in names for deployment in self._deployments.of_model(name)]
        for name, deployment in asked:
            response.models.append(await _load(name, deployment))
        return response

    async def Compare(self, request: compare_pb2.CompareRequest, context: Context) -> None:
        self._authorise(context)
        if self._comparisons is None:
            # What judges a comparison, numpy among it, is no part of the server's start.
            module = await asyncio.to_thread(importlib.import_module, "twinjet.server.comparison")
            self._comparisons = self._comparisons or module.Comparisons(self._deployments)
        await self._comparisons.compare(request, context)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        self._authorise(context)
        if not request.request_id:
            raise InvalidRequest.of("request_id", "is empty")
        for deployment in self._deployments.by_name.values():
            if request.request_id in deployment.dispatcher.load().request_ids:
                await deployment.dispatcher.abort(request.request_id)
                return pb.AbortResponse()
        raise NotFound("request", request.request_id)

    async def ResetPrefixCache(
        self, request: pb.ResetPrefixCacheRequest, context: Context
    ) -> pb.ResetPrefixCacheResponse:
        self._authorise(context)
        done = True
        for deployment in self._deployments.of_model(self._deployments.resolve(request.model)):
            engine, info = deployment.ready()
            if "prefix_cache" not in info.capabilities:
                raise Unsupported("prefix_cache")
            if await cast("PrefixCacheEngine", engine).reset_prefix_cache():
                deployment.dispatcher.reset_prefix_cache()
            else:
                done = False
        return pb.ResetPrefixCacheResponse(done=done)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        self._authorise(context)
        grace_s = request.grace.ToNanoseconds() / 1e9 if request.HasField("grace") else None
        if grace_s is not None and grace_s < 0:
            raise InvalidRequest.of("grace", f"{grace_s:g} s is negative")
        finished, ended = await self._drain(grace_s)
        return pb.DrainResponse(finished=finished, ended=ended)

    async def WatchKvEvents(self, request: pb.WatchKvEventsRequest, context: Context) -> None:
        self._authorise(context)
        await watch_kv_events(self._deployments, request, context)

    def _authorise(self, context: Context) -> None:
        authorise(self._token, context)


def authorise(token: str, context: Context) -> None:
    """Let through who may use AdminService and change adapters. token: "" is loopback callers. Raises PermissionRefused."""
    if token:
        sent = dict(context.invocation_metadata() or ()).get("authorization", "")
        expected = f"Bearer {token}"
        if isinstance(sent, str) and hmac.compare_digest(sent.encode(), expected.encode()):
            return
        raise PermissionRefused("the admin token is missing or wrong; send it as a bearer token")
    if not _is_loopback(context.peer()):
        raise PermissionRefused("AdminService answers loopback callers only; set admin.token to open it")


def _is_loopback(peer: str) -> bool:
    """Whether a gRPC peer string ("ipv4:127.0.0.1:1234", "ipv6:[::1]:1234", "unix:") is this machine."""
    kind, _, rest = peer.partition(":")
    if kind == "unix":
        return True
    host = rest.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _load(model: str, deployment: Deployment) -> pb.ModelLoad:
    ours = deployment.dispatcher.load()
    theirs = await deployment.supervisor.engine_load()
    load = pb.ModelLoad(
        model=model,
        deployment=deployment.name,
        waiting=ours.waiting,
        running=ours.running,
        waiting_tokens=ours.waiting_tokens,
        engine_waiting=theirs.waiting,
        engine_running=theirs.running,
        kv_blocks_total=theirs.kv_blocks_total,
        kv_blocks_used=theirs.kv_blocks_used,
        preemptions=theirs.preemptions,
        output_tokens_per_second=ours.output_tokens_per_s,
        prompt_tokens_per_second=ours.prompt_tokens_per_s,
        restarts=deployment.supervisor.num_restarts,
        request_ids=ours.request_ids,
    )
    for tenant, reading in sorted(ours.tenants.items()):
        load.tenants.add(
            tenant=tenant,
            waiting=reading.waiting,
            running=reading.running,
            served_tokens=reading.served_tokens,
        )
    return load
