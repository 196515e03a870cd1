"""The scheduler at work: hands requests to an engine in the order the core decides, one asyncio loop.

A request is opened as a ticket, whose tokens go from the engine through the pump to ready messages and are seen
here in sums only; or it is run, which gives every event of the engine to those who want events.

A request's slot and KV blocks are given back by `Scheduler.release`, which every way a stream can end must
reach. The trap: a stream is an async generator, which may be closed by GeneratorExit, by the cancellation of
the task that reads it, or by the event loop when it is forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, cast

from twinjet._core import Pump, Stream
from twinjet.engines.base import (
    Engine,
    EngineEvent,
    EngineInfo,
    LogprobRow,
    OutputEvent,
    StepRow,
)
from twinjet.errors import (
    DeadlinePassed,
    EngineDied,
    NotFound,
    RequestAborted,
    RequestFailed,
    SlowReader,
    TwinjetError,
)
from twinjet.request import EngineRequest
from twinjet.scheduler.core import Scheduler
from twinjet.scheduler.entry import Entry, State
from twinjet.scheduler.events import DispatchedEvent, QueuedEvent, SchedulerLoad
from twinjet.scheduler.settings import SchedulerSettings
from twinjet.scheduler.ticket import CarriedTicket, Ticket

if TYPE_CHECKING:
    from twinjet.engines.base import PushEngine

logger = logging.getLogger("twinjet.scheduler")

_WAKES_A_TURN = 16
"""Readers that write in one turn of the loop, about a millisecond; in each turn gRPC takes up one new call."""


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

    def grant(self) -> None:
        """Let the reader go to the engine."""
        # A reader that was cancelled this very moment gives the slot back when it gets to run.
        if not self.granted.done():
            self.granted.set_result(None)

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
        self.pump = Pump()
        self.last_step_at = 0.0
        self._to_wake: deque[Ticket] = deque()
        self._is_waking = False
        self._is_dispatching = False
        self._may_dispatch_more = False
        self._streams: dict[str, _Stream | Ticket] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._stopping: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def attach(self, engine: Engine, info: EngineInfo) -> None:
        """An engine is ready: size the KV ledger to it and let requests in. open() needs one that pushes."""
        self._core.attach(info)
        self._engine = engine

    def detach(self, error: Exception) -> None:
        """The engine died or is about to stop: end every running and waiting request with `error`."""
        self._engine = None
        for stream in list(self._streams.values()):
            if stream.entry.state is State.ENDED:
                continue
            if isinstance(stream, _Stream):
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

    @property
    def max_running(self) -> int:
        """Sequences that may run at once; of the last engine, 0 before there was one."""
        return self._core.max_running

    @property
    def max_priority(self) -> int:
        """The highest priority that clients may ask for."""
        return self._settings.max_priority

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

    def check(self, request_id: str, tenant: str, client_address: str) -> None:
        """Refuse at once what open() would refuse whatever the prompt, so that nobody tokenizes in vain.

        Raises Unavailable, AlreadyExists, Overloaded.
        """
        self._core.check_before(request_id, tenant, client_address, self._clock())

    # Tickets: a request whose outputs go through the pump. Below, what its ticket calls.

    def open(
        self,
        request: EngineRequest,
        stream: Stream,
        *,
        report_queue: bool = False,
        on_overflow: Callable[[SlowReader], None] = lambda _: None,
    ) -> Ticket:
        """Queue a request whose outputs become the messages of `stream`; close the ticket in any case.

        on_overflow: called when more waits for the reader than the stream may hold. Raises Unavailable, AlreadyExists, DeadlinePassed, Overloaded, InvalidRequest.
        """
        entry = self._core.offer(request, self._clock())
        ticket = Ticket(self, entry, stream, reports_queue=report_queue, on_overflow=on_overflow)
        self._enter(ticket)
        return ticket

    def open_carried(
        self, request: EngineRequest, stream: Stream, on_end: Callable[[], None]
    ) -> CarriedTicket:
        """The same for a stream that has its carrier already; on_end: see CarriedTicket, may be called here.

        Raises what open() does.
        """
        ticket = CarriedTicket(self, self._core.offer(request, self._clock()), stream, on_end)
        self._enter(ticket)
        return ticket

    def _enter(self, ticket: Ticket) -> None:
        self._streams[ticket.entry.request_id] = ticket
        self._idle.clear()
        self._dispatch()

    @property
    def report_interval_s(self) -> float:
        return self._settings.report_interval_s

    def place(self, entry: Entry) -> tuple[int, float | None]:
        """Place in the queue, and the wait in seconds to a tenth if one can be told."""
        wait = self._core.expected_wait_s(entry, self._clock())
        return self._core.position(entry), None if wait is None else round(wait, 1)

    def hand_over(self, ticket: Ticket) -> None:
        """Give a request to the engine."""
        assert self._engine is not None, "requests are taken only while there is an engine"
        entry, engine = ticket.entry, cast("PushEngine", self._engine)
        ticket.is_granted = True
        ticket.stream.set_dispatched(entry.position_at_arrival, entry.dispatched_at)
        ticket.key = self.pump.add(
            ticket.stream,
            ticket,
            tenant=entry.account.index,
            holding=entry.holding,
            leaves_at=entry.leaves_at,
        )
        ticket.engine = engine
        try:
            engine.submit(entry.request, ticket)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's outcome
            # The engine never had it, which matters if it is dead.
            ticket.is_granted = False
            ticket.fail(error)

    def step(self, rows: list[StepRow]) -> None:
        """Take a step of an engine; see engines.base.Outlet."""
        self.pump.step(rows, self._clock())
        self.collect()

    def collect(self) -> None:
        """Account for what steps have brought since the last call, and wake who waits for it."""
        now = self.last_step_at = self._clock()
        num_tokens, accounts, requests, ended_early = self.pump.collect(self._core.ledger)
        if num_tokens:
            self._core.add_step(num_tokens, accounts, now)
        may_go = False
        for ticket, happened in requests:
            if happened & ~Pump.AWAITED:
                may_go |= self._act(ticket, happened, now)
            if ticket.is_carried:
                continue
            if happened & Pump.FIRST_TOKEN:
                self._to_wake.appendleft(ticket)
            else:
                self._to_wake.append(ticket)
        for ticket, output_index in ended_early:
            if ticket.engine is not None:
                ticket.engine.cancel(ticket.entry.request_id, output_index)
        if may_go:
            self._dispatch()
        if not self._is_waking:
            self._wake_some()

    def hand_off(
        self,
        ticket: Ticket,
        num_cached_tokens: int | None,
        prompt_logprobs: Sequence[LogprobRow] | None,
        state: bytes,
    ) -> None:
        """Put what ends a prefill into its stream."""
        now = self._clock()
        self.pump.put_prompt(ticket.key, num_cached_tokens, prompt_logprobs, now)
        self.collect()
        ticket.stream.put_handoff(state, now)

    def _wake_some(self) -> None:
        """Let some readers write and the loop turn before the next: new calls come in between."""
        for _ in range(min(_WAKES_A_TURN, len(self._to_wake))):
            self._to_wake.popleft().wake()
        self._is_waking = bool(self._to_wake)
        if self._is_waking:
            asyncio.get_running_loop().call_soon(self._wake_some)

    def _act(self, ticket: Ticket, happened: int, now: float) -> bool:
        """Do what has happened to one request; True if another may go now."""
        entry = ticket.entry
        if entry.state is not State.RUNNING:
            return False
        if happened & Pump.FIRST_TOKEN:
            self._core.first_token(entry, now)
        if happened & Pump.PROMPT_DONE:
            self._core.prompt_done(entry)
        if happened & Pump.LEAVING:
            self._core.leaving(entry)
        if happened & Pump.OVERFLOWED:
            ticket.fail(
                SlowReader(
                    f"the client reads too slowly: more than {ticket.stream.max_pending_bytes} bytes wait for it"
                )
            )
        elif happened & Pump.FAILED:
            ticket.fail(RequestFailed("the engine could not finish the request", reason="ENGINE_ERROR"))
        elif happened & Pump.OVER:
            ticket.finish()
        return True

    def leave(self, ticket: Ticket, *, finished: bool = False) -> None:
        """Give back what a request holds: its place in the queue, or its slot, its blocks and its engine's work."""
        entry = ticket.entry
        if entry.state is State.ENDED:
            return
        if ticket.key:
            num_left = self.pump.remove(ticket.key)
            if num_left:
                self._core.add_step(num_left, [(entry.account.index, num_left)], self._clock())
            entry.num_output_tokens = ticket.stream.num_output_tokens
            entry.first_token_at = ticket.stream.first_token_at
            entry.last_token_at = ticket.stream.last_token_at
        self._release(entry, finished=finished)
        if ticket.engine is not None:
            ticket.engine.cancel(entry.request_id)

    def forget(self, ticket: Ticket) -> None:
        """The reader is gone."""
        self.leave(ticket)
        request_id = ticket.entry.request_id
        if self._streams.get(request_id) is ticket:
            del self._streams[request_id]
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
            if self._core.num_waiting:
                self._dispatch()
            else:
                self._set_timer()

    def _end(self, stream: _Stream | Ticket, error: Exception) -> None:
        """End one request; if it runs and nobody reads it at the moment, stop the engine's work on it now."""
        if isinstance(stream, Ticket):
            stream.end(error)
            return
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
        # What is handed over may fail at once and so make room: the loop below sees it, not a call inside it.
        if self._is_dispatching:
            self._may_dispatch_more = True
            return
        self._is_dispatching = True
        try:
            self._may_dispatch_more = True
            while self._may_dispatch_more:
                self._may_dispatch_more = False
                self._dispatch_once()
        finally:
            self._is_dispatching = False
        self._set_timer()

    def _dispatch_once(self) -> None:
        if self._engine is not None:
            now = self._clock()
            # Those that wait first: a slot that an expired request leaves is not for another one.
            expired = self._core.expired(now)
            for entry in (
                sorted(expired, key=lambda entry: entry.state is not State.WAITING) if expired else ()
            ):
                where = "in the queue" if entry.state is State.WAITING else "while it ran"
                stream = self._streams[entry.request.request_id]
                self._end(stream, DeadlinePassed(f"the deadline passed {where}"))
            while (taken := self._core.take(now)) is not None:
                self._streams[taken.request.request_id].grant()

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
