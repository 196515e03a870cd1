"""The deployments of this server and the public model names that lead to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from twinjet.config import Config, DeploymentSettings, RouteSettings
from twinjet.engines.base import Engine, EngineInfo
from twinjet.engines.supervisor import State, Supervisor, SupervisorSettings
from twinjet.errors import InvalidRequest, NotFound, Unavailable
from twinjet.scheduler import Dispatcher

EngineFactory = Callable[[str, DeploymentSettings], Engine]


@dataclass(frozen=True, slots=True)
class Deployment:
    """One engine with its supervisor and its dispatcher."""

    name: str
    settings: DeploymentSettings
    supervisor: Supervisor
    dispatcher: Dispatcher

    def ready(self) -> tuple[Engine, EngineInfo]:
        """The engine and what it says of itself. Raises Unavailable, saying why, while it is not ready."""
        engine = self.supervisor.engine
        return engine, engine.describe()


class Deployments:
    """All deployments by name, and the routes from public model names. on_change: see Supervisor."""

    def __init__(self, config: Config, make_engine: EngineFactory, on_change: Callable[[str], None]) -> None:
        self._routes: Mapping[str, RouteSettings] = config.public_routes()
        self._random = random.Random()
        self._is_draining = False

        def changed(supervisor: Supervisor) -> None:
            for model in self.models_of(supervisor.name):
                on_change(model)

        self.by_name: dict[str, Deployment] = {}
        for name, settings in config.deployments.items():
            dispatcher = Dispatcher(settings.scheduler)
            supervisor = Supervisor(
                name,
                lambda name=name, settings=settings: make_engine(name, settings),  # type: ignore[misc]
                dispatcher,
                SupervisorSettings(settings.max_restarts, settings.stall_s),
                changed,
            )
            self.by_name[name] = Deployment(name, settings, supervisor, dispatcher)

    @property
    def models(self) -> list[str]:
        """Public model names, sorted."""
        return sorted(self._routes)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def models_of(self, deployment: str) -> list[str]:
        """Public names that lead to a deployment."""
        return [m for m, r in self._routes.items() if deployment in r.weights or deployment in r.fallback]

    def resolve(self, model: str) -> str:
        """Give the public name for a request's model field. Raises NotFound, InvalidRequest for none of many."""
        if not model:
            if len(self._routes) == 1:
                return next(iter(self._routes))
            raise InvalidRequest.of("model", f"is empty; this server has {', '.join(self.models)}")
        if model not in self._routes:
            raise NotFound("model", model, f"this server has {', '.join(self.models)}")
        return model

    def of_model(self, model: str) -> list[Deployment]:
        """Deployments behind a public name: weighted ones first, then fallbacks."""
        route = self._routes[model]
        return [self.by_name[name] for name in [*route.weights, *route.fallback]]

    def pick(self, model: str) -> Deployment:
        """Choose a deployment for one request: by weight among the ready ones, else a ready fallback.

        Raises Unavailable, saying why, if none is ready.
        """
        if self._is_draining:
            raise Unavailable("the server is draining", reason="DRAINING", retry_after_s=1)
        route = self._routes[model]
        ready = {n: w for n, w in route.weights.items() if self._is_ready(n)}
        if ready:
            name = self._random.choices(list(ready), list(ready.values()))[0]
        else:
            first = next(iter(route.weights))
            name = next((n for n in route.fallback if self._is_ready(n)), first)
        deployment = self.by_name[name]
        deployment.ready()
        return deployment

    def is_serving(self, model: str) -> bool:
        """Whether a request for the model would be taken now."""
        return not self._is_draining and any(d.supervisor.state is State.READY for d in self.of_model(model))

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._is_draining = True
        for deployment in self.by_name.values():
            deployment.dispatcher.drain()

    def _is_ready(self, name: str) -> bool:
        return self.by_name[name].supervisor.state is State.READY
