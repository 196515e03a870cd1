"""The deployments of this server and the public model names that lead to them; both change while it runs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from twinjet.config import Config, DeploymentSettings
from twinjet.engines.base import Engine, EngineInfo
from twinjet.engines.supervisor import State, Supervisor, SupervisorSettings
from twinjet.errors import (
    AlreadyExists,
    ConfigError,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from twinjet.routing.table import Route, RoutingTable, check_route, choose
from twinjet.scheduler import Dispatcher
from twinjet.server.kv_zmq import KvPublisher

EngineFactory = Callable[[str, DeploymentSettings], Engine]


@dataclass(frozen=True, slots=True)
class Deployment:
    """One engine with its supervisor, its dispatcher and, where asked for, who publishes its KV events."""

    name: str
    settings: DeploymentSettings
    supervisor: Supervisor
    dispatcher: Dispatcher
    kv_publisher: KvPublisher | None = None

    def open(self) -> None:
        """Open what is listened at. Raises ConfigError."""
        if self.kv_publisher is not None:
            self.kv_publisher.open()

    def close(self) -> None:
        """Close what was opened. Idempotent."""
        if self.kv_publisher is not None:
            self.kv_publisher.close()

    def ready(self) -> tuple[Engine, EngineInfo]:
        """The engine and what it says of itself. Raises Unavailable, saying why, while it is not ready."""
        engine = self.supervisor.engine
        return engine, engine.describe()

    @property
    def is_ready(self) -> bool:
        return self.supervisor.state is State.READY


class Deployments:
    """All deployments by name, and the routes from public model names.

    on_change: called with a public name whose deployments or route changed.
    """

    def __init__(self, config: Config, make_engine: EngineFactory, on_change: Callable[[str], None]) -> None:
        self._make_engine = make_engine
        self._on_change = on_change
        self._random = random.Random()
        self._is_draining = False
        self._state_changed = asyncio.Event()
        self._starting: set[str] = set()
        self.table = RoutingTable({name: route.route() for name, route in config.public_routes().items()})
        self.by_name: dict[str, Deployment] = {
            name: self._make(name, settings) for name, settings in config.deployments.items()
        }

    def _make(self, name: str, settings: DeploymentSettings) -> Deployment:
        dispatcher = Dispatcher(settings.scheduler)
        publisher = None
        if settings.kv_zmq.endpoint:
            cache_kind = "full_attention" if settings.engine == "vllm" else None
            publisher = KvPublisher(name, settings.kv_zmq, cache_kind)

        def changed(supervisor: Supervisor) -> None:
            if publisher is not None:
                publisher.changed(supervisor)
            self._changed(supervisor)

        supervisor = Supervisor(
            name,
            lambda: self._make_engine(name, settings),
            dispatcher,
            SupervisorSettings(settings.max_restarts, settings.stall_s),
            changed,
        )
        return Deployment(name, settings, supervisor, dispatcher, publisher)

    def _changed(self, supervisor: Supervisor) -> None:
        self._state_changed.set()
        for model in self.models_of(supervisor.name):
            self._on_change(model)

    @property
    def models(self) -> list[str]:
        """Public model names, sorted."""
        return sorted(self.table.routes)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def models_of(self, deployment: str) -> list[str]:
        """Public names that a deployment answers for."""
        return [m for m, r in self.table.routes.items() if deployment in r.targets()]

    def resolve(self, model: str) -> str:
        """Give the public name for a request's model field. Raises NotFound, InvalidRequest for none of many."""
        routes = self.table.routes
        if not model:
            if len(routes) == 1:
                return next(iter(routes))
            raise InvalidRequest.of("model", f"is empty; this server has {', '.join(self.models)}")
        if model not in routes:
            raise NotFound("model", model, f"this server has {', '.join(self.models)}")
        return model

    def of_model(self, model: str) -> list[Deployment]:
        """Deployments behind a public name: weighted ones first, then fallbacks."""
        return [self.by_name[name] for name in self.table.routes[model].targets()]

    def pick(self, model: str, tenant: str = "", session: str = "") -> Deployment:
        """Choose a deployment for one request, as its route says (routing.table.choose).

        Raises Unavailable, saying why, if none is ready.
        """
        if self._is_draining:
            raise Unavailable("the server is draining", reason="DRAINING", retry_after_s=1)
        deployment = self._choose(self.table.routes[model], self._is_ready, tenant, session)
        if not deployment.is_ready:
            deployment.ready()
        return deployment

    def pick_other(
        self, model: str, tried: Collection[str], tenant: str = "", session: str = ""
    ) -> Deployment | None:
        """Choose as pick() does, none of `tried`; None if no other is ready, or the server drains."""
        route = self.table.routes.get(model)
        if self._is_draining or route is None:
            return None

        def may(name: str) -> bool:
            return name not in tried and self._is_ready(name)

        deployment = self._choose(route, may, tenant, session)
        return deployment if may(deployment.name) else None

    def _choose(self, route: Route, is_ready: Callable[[str], bool], tenant: str, session: str) -> Deployment:
        key = {"none": "", "tenant": tenant, "session": session}[route.sticky]
        return self.by_name[choose(route, is_ready, self._random, key)]

    def mirror_of(self, model: str) -> Deployment | None:
        """Draw whether a request is mirrored; the deployment that gets the copy, if it is ready."""
        route = self.table.routes.get(model)
        if route is None or not route.mirror or self._random.random() >= route.mirror_share:
            return None
        deployment = self.by_name[route.mirror]
        return deployment if deployment.is_ready else None

    def is_serving(self, model: str) -> bool:
        """Whether a request for the model would be taken now."""
        if self._is_draining or model not in self.table.routes:
            return False
        return any(d.is_ready for d in self.of_model(model))

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._is_draining = True
        for deployment in self.by_name.values():
            deployment.dispatcher.drain()

    def set_route(self, model: str, route: Route, revision: int | None = None) -> int:
        """Put a route in place for requests from now on; gives the new revision.

        Raises RevisionChanged, InvalidRequest; nothing is changed then.
        """
        self.table.expect(revision)
        # One that is only being added may be gone in a moment.
        check_route(route, self.by_name.keys() - self._starting)
        self.table.replace({**self.table.routes, model: route})
        self._on_change(model)
        return self.table.revision

    def remove_route(self, model: str, revision: int | None = None) -> int:
        """Take a public name away; gives the new revision. Raises RevisionChanged, NotFound, PreconditionFailed."""
        self.table.expect(revision)
        if model not in self.table.routes:
            raise NotFound("route", model, f"routes: {', '.join(self.models)}")
        if len(self.table.routes) == 1:
            raise PreconditionFailed(
                f"route {model!r} is the last; a server has at least one", reason="LAST_ROUTE"
            )
        self.table.replace({m: r for m, r in self.table.routes.items() if m != model})
        self._on_change(model)
        return self.table.revision

    async def add(self, name: str, settings: DeploymentSettings, *, public: bool) -> int:
        """Start a deployment and wait until it is ready; gives the revision of the routes.

        public: it gets a route of its own name then. If it does not become ready, or this is cancelled, nothing of
        it stays. Raises AlreadyExists, PreconditionFailed with the reason.
        """
        if self._is_draining:
            raise Unavailable("the server is draining", reason="DRAINING", retry_after_s=1)
        if name in self.by_name:
            raise AlreadyExists("deployment", name)
        if public and name in self.table.routes:
            raise AlreadyExists("route", name)
        deployment = self.by_name[name] = self._make(name, settings)
        self._starting.add(name)
        try:
            try:
                deployment.open()
            except ConfigError as error:
                raise _failed(name, str(error)) from None
            deployment.supervisor.start()
            await self._until_settled(deployment)
            self._starting.discard(name)
            if public:
                self.set_route(name, Route({name: 1.0}))
        except BaseException:
            del self.by_name[name]
            await asyncio.shield(deployment.supervisor.stop())
            deployment.close()
            raise
        finally:
            self._starting.discard(name)
        return self.table.revision

    async def _until_settled(self, deployment: Deployment) -> None:
        supervisor = deployment.supervisor
        while not deployment.is_ready:
            # A start that failed for now is tried again by the supervisor; here the operator waits, and hears of it.
            if supervisor.state is State.FAILED or supervisor.num_restarts:
                reason = supervisor.failure or supervisor.last_error or "its engine did not start"
                raise _failed(deployment.name, reason)
            self._state_changed.clear()
            await self._state_changed.wait()

    async def remove(self, name: str, grace_s: float) -> tuple[int, int]:
        """Drain a deployment and end its engine; gives how many requests finished and how many were ended.

        Raises NotFound, PreconditionFailed while a route names it or it is still being added.
        """
        deployment = self.by_name.get(name)
        if deployment is None:
            raise NotFound("deployment", name, f"deployments: {', '.join(sorted(self.by_name))}")
        if users := self.table.using(name):
            raise PreconditionFailed(
                f"deployment {name!r} is named by the routes {', '.join(users)}; change them first",
                reason="DEPLOYMENT_IN_USE",
            )
        if name in self._starting:
            raise PreconditionFailed(
                f"deployment {name!r} is being added; end that call to be rid of it",
                reason="DEPLOYMENT_STARTING",
            )
        del self.by_name[name]
        dispatcher = deployment.dispatcher
        dispatcher.drain()
        num_live = len(dispatcher.load().request_ids)
        try:
            async with asyncio.timeout(grace_s):
                await dispatcher.wait_idle()
        except TimeoutError:
            pass
        num_ended = len(dispatcher.load().request_ids)
        if num_ended:
            dispatcher.detach(
                Unavailable(f"deployment {name!r} was removed", reason="DRAINING", retry_after_s=1)
            )
        await deployment.supervisor.stop()
        deployment.close()
        return num_live - num_ended, num_ended

    async def reload(self, config: Config, grace_s: float) -> list[str]:
        """Bring deployments and routes to those of a configuration; gives what was done, a line each.

        New deployments are started first and must become ready; then the routes change at once; then deployments that
        are gone drain. Raises ConfigError or PreconditionFailed, and then everything is as it was.
        """
        changed = [
            name
            for name, settings in config.deployments.items()
            if name in self.by_name and self.by_name[name].settings != settings
        ]
        if changed:
            raise ConfigError(
                f"the settings of {', '.join(sorted(changed))} changed; a running deployment keeps its settings: give the new "
                "ones another name and route to it"
            )
        if starting := sorted(self._starting & config.deployments.keys()):
            raise PreconditionFailed(
                f"{', '.join(starting)} is being added by another call; try again when it has ended",
                reason="DEPLOYMENT_STARTING",
            )
        routes = {model: route.route() for model, route in config.public_routes().items()}
        added: list[str] = []
        try:
            for name, settings in config.deployments.items():
                if name not in self.by_name:
                    await self.add(name, settings, public=False)
                    added.append(name)
        except BaseException:
            for name in added:
                await asyncio.shield(self.remove(name, 0.0))
            raise
        done = [f"deployment {name} added" for name in added]
        done += self._replace_routes(routes)
        for name in [n for n in self.by_name if n not in config.deployments and n not in self._starting]:
            finished, ended = await self.remove(name, grace_s)
            done.append(f"deployment {name} removed: {finished} requests finished, {ended} ended")
        return done

    def _replace_routes(self, routes: Mapping[str, Route]) -> list[str]:
        before = dict(self.table.routes)
        if before == dict(routes):
            return []
        self.table.replace(routes)
        touched = sorted(m for m in {*before, *routes} if before.get(m) != routes.get(m))
        for model in touched:
            self._on_change(model)
        return [f"route {model} {'removed' if model not in routes else 'set'}" for model in touched]

    def _is_ready(self, name: str) -> bool:
        return self.by_name[name].is_ready


def _failed(name: str, reason: str) -> PreconditionFailed:
    return PreconditionFailed(f"deployment {name!r} failed: {reason}", reason="DEPLOYMENT_FAILED")
