"""The part of AdminService that changes routes and deployments."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from twinjet.config import DeploymentSettings, deployment_settings
from twinjet.errors import ConfigError, InvalidRequest, Violation
from twinjet.routing.table import Route, Sticky
from twinjet.server import convert
from twinjet.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    import grpc

    from twinjet.server.deployments import Deployments

    Context = grpc.aio.ServicerContext[object, object]

_STICKY: dict[int, Sticky] = {
    pb.STICKINESS_UNSPECIFIED: "none",
    pb.STICKINESS_TENANT: "tenant",
    pb.STICKINESS_SESSION: "session",
}
_STICKINESS = {name: number for number, name in _STICKY.items()}


class RouteServicer:
    """GetRoutes, SetRoute, AddDeployment, RemoveDeployment; see proto AdminService."""

    _deployments: Deployments
    _grace_s: float

    @abstractmethod
    def _authorise(self, context: Context) -> None: ...

    async def GetRoutes(self, request: pb.GetRoutesRequest, context: Context) -> pb.GetRoutesResponse:
        self._authorise(context)
        table = self._deployments.table
        return pb.GetRoutesResponse(
            revision=table.revision,
            routes=[_message(model, table.routes[model]) for model in sorted(table.routes)],
            deployments=sorted(self._deployments.by_name),
        )

    async def SetRoute(self, request: pb.SetRouteRequest, context: Context) -> pb.SetRouteResponse:
        self._authorise(context)
        model = request.route.model
        if violations := convert.request_id_violation("route.model", model):
            raise InvalidRequest(violations)
        if not model:
            raise InvalidRequest.of("route.model", "is empty")
        revision = request.revision if request.HasField("revision") else None
        if request.remove:
            if request.route != pb.Route(model=model):
                raise InvalidRequest.of("route", "with remove, only its model may be set")
            return pb.SetRouteResponse(revision=self._deployments.remove_route(model, revision))
        route = _route(request.route)
        return pb.SetRouteResponse(revision=self._deployments.set_route(model, route, revision))

    async def AddDeployment(
        self, request: pb.AddDeploymentRequest, context: Context
    ) -> pb.AddDeploymentResponse:
        self._authorise(context)
        violations = convert.request_id_violation("name", request.name)
        if not request.name:
            violations = [Violation("name", "is empty")]
        if violations:
            raise InvalidRequest(violations)
        settings = _settings(request)
        revision = await self._deployments.add(request.name, settings, public=request.public)
        return pb.AddDeploymentResponse(revision=revision)

    async def RemoveDeployment(
        self, request: pb.RemoveDeploymentRequest, context: Context
    ) -> pb.RemoveDeploymentResponse:
        self._authorise(context)
        grace_s = request.grace.ToNanoseconds() / 1e9 if request.HasField("grace") else self._grace_s
        if grace_s < 0:
            raise InvalidRequest.of("grace", f"{grace_s:g} s is negative")
        finished, ended = await self._deployments.remove(request.name, grace_s)
        return pb.RemoveDeploymentResponse(finished=finished, ended=ended)


def _message(model: str, route: Route) -> pb.Route:
    message = pb.Route(
        model=model,
        weights=dict(route.weights),
        fallback=route.fallback,
        sticky=_STICKINESS[route.sticky],  # type: ignore[arg-type]
    )
    if route.mirror:
        message.mirror.CopyFrom(pb.Mirror(deployment=route.mirror, share=route.mirror_share))
    return message


def _route(message: pb.Route) -> Route:
    if message.sticky not in _STICKY:
        raise InvalidRequest.of(
            "route.sticky", f"{message.sticky} is not a Stickiness that this server knows"
        )
    return Route(
        dict(message.weights),
        tuple(message.fallback),
        _STICKY[message.sticky],
        message.mirror.deployment,
        message.mirror.share,
    )


def _settings(request: pb.AddDeploymentRequest) -> DeploymentSettings:
    try:
        tree: dict[str, Any] = _whole_numbers(MessageToDict(request.settings))
    except ValueError:
        raise InvalidRequest.of("settings", "has a number that is not finite") from None
    try:
        return deployment_settings(tree)
    except ConfigError as error:
        raise InvalidRequest.of("settings", str(error)) from None


def _whole_numbers(value: Any) -> Any:
    """Make whole numbers ints again; a Struct knows floats only."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value
