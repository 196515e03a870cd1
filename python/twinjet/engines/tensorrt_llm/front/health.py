"""Whether the engine lives. A crashed 1.2 engine still looks healthy, so it has to show a token.

Four signs of death: the package's own health check says so (where it has one), a worker's error waits to be met,
a timed one-token probe gets no answer, or a fatal error came out of a request. The probe runs when requests are in
flight but nothing has moved for the no-progress limit, after an error of unknown kind, after several failures
without a step between them, and now and then when idle.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import Awaitable, Callable
from typing import Any

from twinjet.engines.tensorrt_llm.front.processes import end_tasks

log = logging.getLogger(__name__)


def background_error(llm: Any, request_errors: tuple[type[BaseException], ...]) -> str | None:
    """Look, without taking it out, for a worker's error that nobody has met yet.

    request_errors: types that concern one request, which are no reason.
    """
    errors = getattr(getattr(llm, "_executor", None), "_error_queue", None)
    if not isinstance(errors, queue.Queue):
        return None
    with errors.mutex:
        waiting = list(errors.queue)
    for error in waiting:
        if not isinstance(error, (str, *request_errors)):
            return f"a worker of the engine failed: {error}"
    return None


def own_verdict(llm: Any, request_errors: tuple[type[BaseException], ...] = ()) -> str | None:
    """Ask the package's own signs, as far as this version has them; a text is a reason to call it dead."""
    executor = getattr(llm, "_executor", None)
    if (reason := background_error(llm, request_errors)) is not None:
        return reason
    fatal = getattr(executor, "_fatal_error", None)
    if fatal is not None:
        return f"fatal error in the engine: {fatal}"
    is_shutdown = getattr(executor, "is_shutdown", None)
    if callable(is_shutdown) and is_shutdown():
        return "the engine's executor has shut down"
    check = getattr(llm, "_check_health", None)
    if callable(check) and not check():
        return "the engine's own health check failed"
    return None


class Watchdog:
    """Watches progress and probes when there is none.

    probe: one token through the engine; raises if it fails; must be cancellable. verdict: `own_verdict`.
    on_death: called once, with the reason. no_progress_s: silence borne while requests run. idle_probe_s:
    time between probes of an idle engine; 0 is never. probe_timeout_s: time a probe may take.
    """

    def __init__(
        self,
        *,
        probe: Callable[[], Awaitable[None]],
        verdict: Callable[[], str | None],
        in_flight: Callable[[], int],
        on_death: Callable[[str], None],
        no_progress_s: float,
        idle_probe_s: float,
        probe_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = probe
        self._verdict = verdict
        self._in_flight = in_flight
        self._on_death = on_death
        self._no_progress_s = no_progress_s
        self._idle_probe_s = idle_probe_s
        self._probe_timeout_s = probe_timeout_s
        self._clock = clock
        self._last_progress = clock()
        self._num_progress = 0
        self._probing: asyncio.Task[str | None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_dead = False
        self.num_probes = 0

    def start(self) -> None:
        self.progressed()
        self._task = asyncio.create_task(self._run(), name="tensorrt_llm watchdog")

    def progressed(self) -> None:
        """Say that the engine has just given something."""
        self._last_progress = self._clock()
        self._num_progress += 1

    async def stop(self) -> None:
        """End all tasks; idempotent."""
        await end_tasks([self._task, self._probing])
        self._task = self._probing = None

    def died(self, reason: str) -> None:
        """Declare death, once."""
        if not self._is_dead:
            self._is_dead = True
            log.error("the TensorRT-LLM engine died: %s", reason)
            self._on_death(reason)

    async def check(self) -> str | None:
        """Find out now whether the engine lives; one probe at a time, shared by all who ask.

        Returns None if it does, else why not (and then has declared death).
        """
        reason = self._verdict()
        if reason is None:
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self._probe_once(), name="tensorrt_llm probe")
            reason = await asyncio.shield(self._probing)
        if reason is not None:
            self.died(reason)
        return reason

    async def look(self) -> None:
        """Do what is due now; the loop's body."""
        if (reason := self._verdict()) is not None:
            self.died(reason)
            return
        silence = self._clock() - self._last_progress
        limit = self._no_progress_s if self._in_flight() else self._idle_probe_s
        if limit > 0 and silence >= limit:
            await self.check()

    async def _run(self) -> None:
        limits = [limit for limit in (self._no_progress_s, self._idle_probe_s) if limit > 0]
        period = min([*(limit / 4 for limit in limits), 1.0])
        while not self._is_dead:
            await asyncio.sleep(period)
            await self.look()

    async def _probe_once(self) -> str | None:
        self.num_probes += 1
        before = self._num_progress
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                await self._probe()
        except TimeoutError:
            # A probe may queue behind real work for long: any progress meanwhile is proof enough.
            if self._num_progress == before:
                return f"no token within {self._probe_timeout_s:g} s"
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - an engine that cannot give one token is dead, however
            return f"a probe failed: {error}"
        self.progressed()
        return None
