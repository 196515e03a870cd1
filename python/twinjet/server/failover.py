"""Where a request goes on when its deployment is lost before the request has said anything.

A request that waited for its engine cannot have harmed it and goes on as often as the route has another deployment. One that the
engine had may be what ended it: it goes on once, and if that ends the next engine, too, no such request does for a while.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from twinjet.errors import (
    AlreadyExists,
    EngineDied,
    InvalidRequest,
    NotFound,
    Overloaded,
    TwinjetError,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from twinjet.server.convert import Options
    from twinjet.server.deployments import Deployment, Deployments
    from twinjet.server.metrics import Metrics

logger = logging.getLogger("twinjet.server")

SUSPENSION_S = 300.0
"""How long requests that an engine had stay where they are, once one of them has seen a second engine die."""
_REFUSALS = (AlreadyExists, InvalidRequest, NotFound, Overloaded, Unsupported)


class Failover:
    """Begins journeys. clock: monotonic seconds."""

    def __init__(
        self, deployments: Deployments, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._deployments = deployments
        self._metrics = metrics
        self._clock = clock
        self._suspended_until = 0.0

    @property
    def is_suspended(self) -> bool:
        """Whether requests that an engine had stay where they are."""
        return self._clock() < self._suspended_until

    def suspend(self) -> None:
        if not self.is_suspended:
            logger.error(
                "an engine died of, or beside, a request that had seen another one die: for %g s such requests do not go on "
                "elsewhere",
                SUSPENSION_S,
            )
        self._suspended_until = self._clock() + SUSPENSION_S

    def begin(self, model: str, options: Options, first: Deployment | None = None) -> Journey:
        """Begin at `first`, or choose the first deployment. Raises Unavailable, saying why, if none is ready."""
        return Journey(self, self._deployments, self._metrics, model, options, first)


class Journey:
    """One request's way. deployment: where it is."""

    def __init__(
        self,
        failover: Failover,
        deployments: Deployments,
        metrics: Metrics,
        model: str,
        options: Options,
        first: Deployment | None,
    ) -> None:
        self._failover = failover
        self._deployments = deployments
        self._metrics = metrics
        self._model = model
        self._options = options
        self._tried: set[str] = set()
        self._loss: Unavailable | None = None
        self._saw_a_death = False
        self.deployment: Deployment = first or deployments.pick(model, options.tenant, options.session)

    def go_on(self, error: TwinjetError, *, has_begun: bool) -> None:
        """Move to another deployment after an error of the present one.

        has_begun: something of the answer may have left. Raises what the client is to hear if the request cannot go on.
        """
        was_running = isinstance(error, EngineDied) and error.was_running
        # A handoff is of use once, and an engine that had the request has used it.
        if has_begun or (was_running and self._options.handoff):
            raise error
        if isinstance(error, Unavailable):
            if self._loss is None or was_running:
                self._loss = error
        elif self._loss is None or not isinstance(error, _REFUSALS):
            raise error
        if was_running:
            self._allow_one_death(error)
        self._tried.add(self.deployment.name)
        options = self._options
        other = self._deployments.pick_other(self._model, self._tried, options.tenant, options.session)
        if other is None:
            raise self._loss from error
        logger.warning(
            "request %s goes on at %s, not %s: %s",
            options.request_id, other.name, self.deployment.name, error,
        )  # fmt: skip
        self._metrics.count_moved(self._model, self.deployment.name, other.name, was_running=was_running)
        self.deployment = other

    def _allow_one_death(self, error: TwinjetError) -> None:
        if self._saw_a_death:
            self._failover.suspend()
        if self._saw_a_death or self._failover.is_suspended:
            raise error
        self._saw_a_death = True
