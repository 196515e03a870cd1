"""The scheduler at work: hands requests to an engine in the order the core decides, one asyncio loop.

A request's slot and KV blocks are given back by `Scheduler.release`, which every way a stream can end must
reach. The trap: a stream is an async generator, which may be closed by GeneratorExit, by the cancellation of
the task that reads it, or by the event loop when it is forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from twinjet.engines.base import Engine, EngineEvent, EngineInfo, OutputEvent
from twinjet.errors import (
    DeadlinePassed,
    EngineDied,
    NotFound,
    RequestAborted,
    TwinjetError,
)
from twinjet.request import EngineRequest
from twinjet.scheduler.core import Scheduler
from twinjet.scheduler.entry import Entry, State
from twinjet.scheduler.events import DispatchedEvent, QueuedEvent, SchedulerLoad
from twinjet.scheduler.settings import SchedulerSettings

logger = logging.getLogger("twinjet.scheduler")


class _Stream:
    """What the dispatcher knows of one request: its place, who reads it, and why it was ended."""

    __slots__ = ("_error", "entry", "granted", "reader")

    def __init__(self, entry: Entry, granted: asyncio.Future[None]) -> None:
        self.entry = entry
        self.granted = granted
        self.reader: asyncio.Task[object] | None = None
        self._error: Exception | None = None

    def error(self) -> Exception | None:
        return self._error

    def end(self, error: Exception) -> None:
        """Make the stream raise `error` at its next step; wakes its reader. The first error stays."""
        if self._error is not None:
            return
        self._error = error
        if not self.granted.done():
            self.granted.set_result(None)
        elif self.reader is not None:
            self.reader.cancel()

    async def read(self, events: AsyncIterator[EngineEvent]) -> EngineEvent | None:
        """Next event of the engine; None at its end. Raises the error that end() gave."""
        if (ended := self.error()) is not None:
            raise ended
        reader = asyncio.current_task()
        assert reader is not None, "streams are read by tasks"
        self.reader = reader
        cancelling = reader.cancelling()
        try:
            return await anext(events, None)
        except asyncio.CancelledError:
            # Ours if end() made it and nobody else cancelled the same task as well.
            ended = self.error()
            if ended is None or reader.uncancel() > cancelling:
                raise
            raise ended from None
        except TwinjetError as error:
            ended = self.error()
            if ended is None:
                raise
            raise ended from error
        finally:
            self.reader = None


class Dispatcher:
    """One deployment's queue and its way into the engine; lives across engine restarts.

    clock: monotonic seconds; deadlines of requests are read on it.
    """

    def __init__(self, settings: SchedulerSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._core = Scheduler(settings)
        self._engine: Engine | None = None
        self._streams: dict[str, _Stream] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._stopping: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def attach(self, engine: Engine, info: EngineInfo) -> None:
        """An engine is ready: size the KV ledger to it and let requests in."""
        self._core.attach(info)
        self._engine = engine

    def detach(self, error: Exception) -> None:
        """The engine died or is about to stop: end every running and waiting request with `error`."""
        self._engine = None
        for stream in list(self._streams.values()):
            if stream.entry.state is not State.ENDED:
                self._core.release(stream.entry, self._clock())
                stream.end(error)
        self._core.detach()
        self._set_timer()

    def drain(self) -> None:
        """Refuse new requests from now on; those that wait or run go on."""
        self._core.drain()

    def reset_prefix_cache(self) -> bool:
        """Call once the engine has forgotten its cached prefixes; False, and nothing done, while any runs."""
        return self._core.reset_prefix_cache()

    def totals(self) -> SchedulerLoad:
        """The load without tenants and request ids, in constant time: for reports with every call."""
        return self._core.totals(self._clock())

    def load(self) -> SchedulerLoad:
        return self._core.load(self._clock())

    async def wait_idle(self) -> None:
        """Return when no request waits or runs."""
        await self._idle.wait()

    async def abort(self, request_id: str) -> None:
        """End a request; its stream raises RequestAborted. Raises NotFound."""
        stream = self._streams.get(request_id)
        if stream is None or stream.entry.state is State.ENDED or stream.error() is not None:
            raise NotFound("request", request_id)
        self._end(stream, RequestAborted(f"request {request_id!r} was aborted by an operator"))
        self._dispatch()

    async def run(
        self, request: EngineRequest, *, report_queue: bool = False
    ) -> AsyncGenerator[QueuedEvent | DispatchedEvent | EngineEvent, None]:
        """Queue a request and stream it: queued events if asked for, a DispatchedEvent, the engine's events.

        The first step raises Unavailable, AlreadyExists, DeadlinePassed, Overloaded or InvalidRequest; later
        ones DeadlinePassed, RequestAborted, the error given to detach() and whatever the engine raises.
        Closing the iterator leaves the queue, or aborts in the engine.
        """
        entry = self._core.offer(request, self._clock())
        stream = _Stream(entry, asyncio.get_running_loop().create_future())
        self._streams[request.request_id] = stream
        self._idle.clear()
        try:
            self._dispatch()
            last = None
            while report_queue and not stream.granted.done():
                wait = self._core.expected_wait_s(entry, self._clock())
                place = (self._core.position(entry), None if wait is None else round(wait, 1))
                if place != last:
                    last = place
                    yield QueuedEvent(*place)
                await asyncio.wait([stream.granted], timeout=self._settings.report_interval_s)
            await stream.granted
            engine, error = self._engine, stream.error()
            if error is not None:
                raise error
            assert engine is not None, "a request is granted by an engine, or ended with an error"
            yield DispatchedEvent(entry.position_at_arrival, entry.dispatched_at - entry.arrival)
            events = engine.generate(request)
            try:
                while (event := await stream.read(events)) is not None:
                    self._account(entry, event)
                    yield event
            except EngineDied as died:
                raise EngineDied(str(died), retry_after_s=died.retry_after_s, was_running=True) from died
            finally:
                await _close(events)
            self._release(entry, finished=True)
        finally:
            self._release(entry)
            if self._streams.get(request.request_id) is stream:
                del self._streams[request.request_id]
            if not self._streams:
                self._idle.set()

    def _account(self, entry: Entry, event: EngineEvent) -> None:
        if entry.state is not State.RUNNING:
            return
        if isinstance(event, OutputEvent):
            may_go = self._core.add_tokens(entry, event.output_index, event.token_ids, self._clock())
            if event.finish is not None:
                entry.num_finished += 1
            if entry.num_finished == entry.num_sequences:
                # Not when the reader comes back for the end: it may be slow, and the engine is done.
                self._release(entry, finished=True)
            elif may_go:
                self._dispatch()
        else:
            self._core.prompt_done(entry)
            self._dispatch()

    def _release(self, entry: Entry, *, finished: bool = False) -> None:
        if entry.state is not State.ENDED:
            self._core.release(entry, self._clock(), finished=finished)
            self._dispatch()

    def _end(self, stream: _Stream, error: Exception) -> None:
        """End one request; if it runs and nobody reads it at the moment, stop the engine's work on it now."""
        entry = stream.entry
        if entry.state is State.WAITING:
            self._core.release(entry, self._clock())
        elif stream.reader is None and self._engine is not None:
            task = asyncio.get_running_loop().create_task(self._stop_work(self._engine, entry))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)
        stream.end(error)

    async def _stop_work(self, engine: Engine, entry: Entry) -> None:
        try:
            await engine.abort(entry.request.request_id)
        except TwinjetError:
            logger.warning("the engine failed to abort a request", exc_info=True)
        self._release(entry)

    def _dispatch(self) -> None:
        """Hand over what may go, and set the timer for the next deadline."""
        if self._engine is not None:
            now = self._clock()
            for entry in self._core.expired(now):
                where = "in the queue" if entry.state is State.WAITING else "while it ran"
                stream = self._streams[entry.request.request_id]
                self._end(stream, DeadlinePassed(f"the deadline passed {where}"))
            while (taken := self._core.take(now)) is not None:
                granted = self._streams[taken.request.request_id].granted
                # A reader that was cancelled this very moment gives the slot back when it gets to run.
                if not granted.done():
                    granted.set_result(None)
        self._set_timer()

    def _set_timer(self) -> None:
        at = self._core.next_deadline()
        if at == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = at
        if at is not None:
            delay = max(0.0, at - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._timer_at = None
        self._dispatch()


async def _close(events: AsyncIterator[EngineEvent]) -> None:
    close = getattr(events, "aclose", None)
    if close is None:
        return
    try:
        await close()
    except TwinjetError:
        # The stream has its outcome already; an engine that fails while it is told to stop adds nothing.
        logger.debug("the engine failed while a stream was closed", exc_info=True)
