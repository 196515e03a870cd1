"""Routes: which deployments answer for a model, as dataclasses. See proto/twinjet/v1/routing.proto."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from google.protobuf.struct_pb2 import Struct

from twinjet.client._requests import filled
from twinjet.v1 import routing_pb2 as pb

_STICKY: dict[str, pb.Stickiness.ValueType] = {
    "": pb.STICKINESS_UNSPECIFIED,
    "tenant": pb.STICKINESS_TENANT,
    "session": pb.STICKINESS_SESSION,
}


@dataclass(frozen=True, slots=True)
class Mirror:
    """Copies of a share of the requests, 0 to 1, for a deployment whose answers are recorded alone."""

    deployment: str
    share: float


@dataclass(frozen=True, slots=True)
class Route:
    """Which deployments answer for one public model name.

    weights: shares of requests by deployment. fallback: tried in order while none of these is ready. sticky: what
    keeps requests together, "" is nothing.
    """

    model: str
    weights: Mapping[str, float] = field(default_factory=dict)
    fallback: Sequence[str] = ()
    sticky: Literal["", "tenant", "session"] = ""
    mirror: Mirror | None = None


@dataclass(frozen=True, slots=True)
class Routes:
    """The whole routing table. revision: to be sent with a change that was decided on it."""

    revision: int
    routes: tuple[Route, ...]
    deployments: tuple[str, ...]


def route_message(route: Route) -> pb.Route:
    """Give the message. Raises ValueError for an unknown word, BadRequest for what it cannot carry."""
    if route.sticky not in _STICKY:
        raise ValueError(f"{route.sticky!r} keeps nothing together; allowed: 'tenant', 'session' or ''")
    values: dict[str, Any] = {
        "model": route.model,
        "weights": dict(route.weights),
        "fallback": route.fallback,
        "sticky": _STICKY[route.sticky],
    }
    if route.mirror is not None:
        mirror = {"deployment": route.mirror.deployment, "share": route.mirror.share}
        values["mirror"] = filled(pb.Mirror(), mirror, "route.mirror.")
    return filled(pb.Route(), values, "route.")


def add_request(name: str, settings: Mapping[str, Any], *, public: bool) -> pb.AddDeploymentRequest:
    """Give an AddDeploymentRequest; settings are those of a section of the configuration file."""
    struct = Struct()
    struct.update(dict(settings))
    return filled(pb.AddDeploymentRequest(), {"name": name, "settings": struct, "public": public})


def routes_of(answer: pb.GetRoutesResponse) -> Routes:
    """Translate the routing table."""
    return Routes(answer.revision, tuple(_route(r) for r in answer.routes), tuple(answer.deployments))


def _route(route: pb.Route) -> Route:
    sticky: Any = next((word for word, value in _STICKY.items() if value == route.sticky), "")
    mirror = Mirror(route.mirror.deployment, route.mirror.share) if route.HasField("mirror") else None
    return Route(route.model, dict(route.weights), tuple(route.fallback), sticky, mirror)
