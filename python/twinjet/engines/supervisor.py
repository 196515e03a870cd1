"""Keeps one engine alive: starts it, proves it with a real token, watches it, starts it again after a death.

Owns the engine's state and loading progress. Requests go through the dispatcher, which is given the engine
while it is ready and told when it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

from twinjet.engines.base import (
    Engine,
    EngineEvent,
    EngineInfo,
    EngineLoad,
    LoadProgress,
    PushEngine,
    Run,
    Tokenizer,
)
from twinjet.errors import ConfigError, EngineDied, TwinjetError, Unavailable
from twinjet.request import EngineRequest, SamplingOverrides, check_defaults, resolve_sampling
from twinjet.scheduler import Dispatcher

logger = logging.getLogger("twinjet.engine")

PROBE_TIMEOUT_S = 60.0
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 300.0
"""An engine that lived this long starts its count of restarts anew."""


class State(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SupervisorSettings:
    """max_restarts: in a row, before giving up. stall_s: no event for so long while requests run is a death."""

    max_restarts: int = 5
    stall_s: float = 120.0


class _Observed:
    """An engine whose requests are counted and whose last event is timed."""

    def __init__(self, engine: Engine, last_step_at: Callable[[], float]) -> None:
        self._engine = engine
        self._last_step_at = last_step_at
        self.num_running = 0
        self.last_progress = time.monotonic()
        self.abort = engine.abort
        self.load = engine.load
        self.describe = engine.describe
        self.start = engine.start
        self.stop = engine.stop
        self.wait_dead = engine.wait_dead

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        if self.num_running == 0:
            self.last_progress = time.monotonic()
        self.num_running += 1
        try:
            async with contextlib.aclosing(self._engine.generate(request)) as events:
                async for event in events:
                    self.last_progress = time.monotonic()
                    yield event
        finally:
            self.num_running -= 1

    async def wait_stalled(self, stall_s: float) -> str:
        """Return once requests run and none has made progress for stall_s."""
        while True:
            last = max(self.last_progress, self._last_step_at())
            idle_s = time.monotonic() - last if self.num_running else 0.0
            if idle_s >= stall_s:
                return f"no token for {idle_s:.0f} s while {self.num_running} requests run"
            await asyncio.sleep(stall_s - idle_s)


class _ObservedPush(_Observed):
    """The same of an engine that pushes its steps, which are timed where they arrive."""

    def __init__(self, engine: PushEngine, last_step_at: Callable[[], float]) -> None:
        super().__init__(engine, last_step_at)
        self._push = engine
        self._submitted: set[str] = set()

    def submit(self, request: EngineRequest, run: Run) -> None:
        self._push.submit(request, run)
        if self.num_running == 0:
            self.last_progress = time.monotonic()
        self._submitted.add(request.request_id)
        self.num_running += 1

    def flush(self) -> None:
        self._push.flush()

    def cancel(self, request_id: str, output_index: int | None = None) -> None:
        self._push.cancel(request_id, output_index)
        if output_index is None and request_id in self._submitted:
            self._submitted.remove(request_id)
            self.num_running -= 1


def _observed(engine: Engine, last_step_at: Callable[[], float]) -> _Observed:
    if hasattr(engine, "submit"):
        return _ObservedPush(cast("PushEngine", engine), last_step_at)
    return _Observed(engine, last_step_at)


class Supervisor:
    """Runs one deployment's engine. on_change is called after every change of state or progress."""

    def __init__(
        self,
        name: str,
        make_engine: Callable[[], Engine],
        dispatcher: Dispatcher,
        settings: SupervisorSettings,
        on_change: Callable[[Supervisor], None],
    ) -> None:
        self.name = name
        self.state = State.LOADING
        self.progress = LoadProgress("waiting to start", 0.0)
        self.failure = ""
        self.last_error = ""
        self.config_error: ConfigError | None = None
        self.num_restarts = 0
        self._make_engine = make_engine
        self._dispatcher = dispatcher
        self._settings = settings
        self._on_change = on_change
        self._engine: Engine | None = None
        self._started_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the present start began."""
        return time.monotonic() - self._started_at

    @property
    def engine(self) -> Engine:
        """The ready engine. Raises Unavailable, saying why, while there is none."""
        if self.state is State.READY and self._engine is not None:
            return self._engine
        if self.state is State.FAILED:
            raise Unavailable(
                f"model {self.name!r} failed: {self.failure}", reason="ENGINE_FAILED", retry_after_s=60
            )
        if self.state is State.RESTARTING:
            raise EngineDied(f"the engine of {self.name!r} died and is starting again")
        raise Unavailable(
            f"model {self.name!r} is loading: {self.progress.phase}", reason="LOADING", retry_after_s=2
        )

    @property
    def info(self) -> EngineInfo | None:
        """What the ready engine says of itself, else None."""
        return self._engine.describe() if self.state is State.READY and self._engine is not None else None

    async def engine_load(self) -> EngineLoad:
        """The engine's load; all unknown while it is not ready."""
        return await self._engine.load() if self.state is State.READY and self._engine else EngineLoad()

    def start(self) -> None:
        """Begin to start the engine, in the background."""
        self._task = asyncio.create_task(self._keep_alive(), name=f"supervise {self.name}")

    async def stop(self) -> None:
        """End the engine and its processes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _keep_alive(self) -> None:
        failures = 0
        while True:
            lived_s = 0.0
            try:
                lived_s = await self._live_once()
            except ConfigError as error:
                self.config_error = error
                self._fail(str(error))
                return
            except TwinjetError as error:
                self.last_error = str(error)
                logger.warning("engine of %s did not start: %s", self.name, error)
            except Exception:
                self.last_error = "its start failed; the server's log has more"
                logger.exception("engine of %s did not start", self.name)
            failures = 1 if lived_s > HEALTHY_AFTER_S else failures + 1
            if failures > self._settings.max_restarts:
                self._fail(f"gave up after {self._settings.max_restarts} restarts")
                return
            self.num_restarts += 1
            backoff_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (failures - 1))
            self._change(State.RESTARTING, LoadProgress(f"waiting {backoff_s:.1f} s before a restart", 0.0))
            await asyncio.sleep(backoff_s)

    async def _live_once(self) -> float:
        """Start an engine, serve until it dies, clean up; return the seconds that it lived."""
        engine = self._make_engine()
        self._started_at = time.monotonic()
        try:
            await engine.start(self._report)
            self._report(LoadProgress("waiting for the first token", 0.95))
            info = engine.describe()
            check_defaults(info)
            # Not wait_for, which before Python 3.12 can lose a cancellation.
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._probe(engine, info)
            observed = _observed(engine, lambda: self._dispatcher.last_step_at)
            self._engine = engine
            self._dispatcher.attach(observed, info)
            logger.info("%s ready after %.1f s", self.name, self.elapsed_s)
            self._change(State.READY, LoadProgress("ready", 1.0))
            ready_at = time.monotonic()
            reason = await self._first_of(engine.wait_dead(), observed.wait_stalled(self._settings.stall_s))
            logger.error("engine of %s died: %s", self.name, reason)
            return time.monotonic() - ready_at
        except TimeoutError:
            raise EngineDied(f"no first token within {PROBE_TIMEOUT_S:.0f} s") from None
        finally:
            if self._engine is not None:
                self._engine = None
                self._change(State.RESTARTING, LoadProgress("cleaning up after a death", 0.0))
                self._dispatcher.detach(EngineDied())
            await engine.stop()

    @staticmethod
    async def _first_of(*waits: Coroutine[Any, Any, str]) -> str:
        tasks = [asyncio.create_task(wait) for wait in waits]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _probe(engine: Engine, info: EngineInfo) -> None:
        """Get one real token, so that ready means that the model answers."""
        if "generate" not in info.capabilities:
            return
        prompt = tuple(engine.tokenizer.encode("Hello", add_special_tokens=True))
        wish = SamplingOverrides(temperature=0.0, max_tokens=1, min_tokens=0)
        sampling = resolve_sampling(wish, info, num_prompt_tokens=len(prompt), seed=0)
        request = EngineRequest(request_id="twinjet-probe", prompt_token_ids=prompt, sampling=sampling)
        async for _ in engine.generate(request):
            pass

    def _report(self, progress: LoadProgress) -> None:
        done = max(progress.done, self.progress.done if self.progress.done < 1 else 0.0)
        state = State.LOADING if self.num_restarts == 0 else State.RESTARTING
        self._change(state, LoadProgress(progress.phase, min(done, 0.99)))

    def _fail(self, reason: str) -> None:
        self.failure = reason
        logger.error("%s failed: %s", self.name, reason)
        self._change(State.FAILED, LoadProgress("failed", 0.0))

    def _change(self, state: State, progress: LoadProgress) -> None:
        self.state = state
        self.progress = progress
        self._on_change(self)
