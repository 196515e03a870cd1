"""The routing table: immutable routes, replaced as a whole, with a revision that guards against lost updates. Pure."""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from twinjet.errors import InvalidRequest, TwinjetError, Violation

Sticky = Literal["none", "tenant", "session"]
MAX_SHARE = 1.0


class RevisionChanged(TwinjetError):
    """Somebody else changed the routes since they were read. current: their revision now."""

    def __init__(self, expected: int, current: int) -> None:
        self.current = current
        super().__init__(
            f"the routes are at revision {current}, not {expected}; read them again and decide anew"
        )


@dataclass(frozen=True, slots=True)
class Route:
    """How requests for one public model name find a deployment.

    weights: share by deployment, relative; 0 gets none but serves when no other weighted one is ready. fallback: tried in
    order when none of the weighted ones is ready. sticky: requests of one tenant or session go to one deployment while
    it is ready. mirror: a deployment that gets a copy of the share mirror_share of requests; "" is none.
    """

    weights: Mapping[str, float]
    fallback: tuple[str, ...] = ()
    sticky: Sticky = "none"
    mirror: str = ""
    mirror_share: float = 0.0

    def targets(self) -> list[str]:
        """Every deployment that can answer: weighted ones first, then fallbacks."""
        return list(dict.fromkeys([*self.weights, *self.fallback]))

    def names(self) -> set[str]:
        """Every deployment that is named, the mirror included."""
        return {*self.targets(), *([self.mirror] if self.mirror else [])}


def check_route(route: Route, deployments: Collection[str], prefix: str = "route.") -> None:
    """Check one route against the deployments that exist. Raises InvalidRequest naming every fault."""
    violations: list[Violation] = []

    def fail(name: str, message: str) -> None:
        violations.append(Violation(prefix + name, message))

    for name, weight in route.weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            fail(f"weights[{name}]", f"{weight:g} is out of range; allowed: 0 and above, finite")
    if not any(weight > 0 for weight in route.weights.values()):
        fail("weights", "at least one deployment needs a weight above 0")
    if not violations and math.isinf(sum(route.weights.values())):
        fail("weights", f"together are above {sys.float_info.max:g}; make them smaller in proportion")
    known = ", ".join(sorted(deployments))
    for where, names in (("weights", list(route.weights)), ("fallback", list(route.fallback))):
        for name in names:
            if name not in deployments:
                fail(where, f"names deployment {name!r}, which does not exist; known: {known}")
    for name in [name for name, count in Counter(route.fallback).items() if count > 1]:
        fail("fallback", f"names deployment {name!r} twice; a fallback must not lead back")
    if not 0 <= route.mirror_share <= MAX_SHARE:
        fail("mirror.share", f"{route.mirror_share:g} is out of range; allowed: 0 to 1")
    if route.mirror:
        if route.mirror not in deployments:
            fail(
                "mirror.deployment",
                f"names deployment {route.mirror!r}, which does not exist; known: {known}",
            )
        if route.mirror in route.targets():
            fail("mirror.deployment", f"deployment {route.mirror!r} answers this route itself")
    elif route.mirror_share:
        fail("mirror.deployment", "is empty although a share is set")
    if violations:
        raise InvalidRequest(violations)


@dataclass(slots=True)
class RoutingTable:
    """Routes by public model name. revision: grows by 1 with every change."""

    routes: Mapping[str, Route] = field(default_factory=lambda: MappingProxyType({}))
    revision: int = 1

    def expect(self, revision: int | None) -> None:
        """Check that nobody changed the routes since this revision; None does not care. Raises RevisionChanged."""
        if revision is not None and revision != self.revision:
            raise RevisionChanged(revision, self.revision)

    def replace(self, routes: Mapping[str, Route]) -> None:
        """Put these routes in place of all."""
        self.routes = MappingProxyType(dict(routes))
        self.revision += 1

    def using(self, deployment: str) -> list[str]:
        """Public names whose routes name a deployment, sorted."""
        return sorted(model for model, route in self.routes.items() if deployment in route.names())


def choose(route: Route, is_ready: Callable[[str], bool], rng: random.Random, sticky_key: str = "") -> str:
    """Choose a deployment for one request.

    By weight among the ready weighted ones, else the first ready fallback, else the first weighted one, which then
    says why it cannot. sticky_key: requests with the same key get the same deployment, moved only when it is not
    ready or weights change, and then only those that must move (weighted rendezvous hashing). "" is no key.
    """
    if len(route.weights) == 1:
        only = next(iter(route.weights))
        if is_ready(only):
            return only
    ready = {name: weight for name, weight in route.weights.items() if is_ready(name)}
    positive = {name: weight for name, weight in ready.items() if weight > 0}
    if positive:
        if sticky_key and route.sticky != "none":
            return max(positive, key=lambda name: _score(sticky_key, name, positive[name]))
        return rng.choices(list(positive), list(positive.values()))[0]
    if ready:
        return next(iter(ready))
    first = next(iter(route.weights))
    return next((name for name in route.fallback if is_ready(name)), first)


def _score(key: str, name: str, weight: float) -> float:
    digest = hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest()
    # In (0, 1): the half keeps 0 out, whose logarithm does not exist.
    uniform = (int.from_bytes(digest, "big") + 0.5) / 2.0**64
    return weight / -math.log(uniform)
