"""Generate calls that ask for nothing special, taken many at a time: no task, no future and no message for each.

The native door picks and reads them (csrc/requests says which are plain) and carries their streams. Here they are
admitted in batches, and ended in batches. Whatever is not as usual is left, before anything was done about it, to
InferenceServicer.Generate; what both do, both do alike: tests/server/test_plain.py compares them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from google.protobuf.message import DecodeError

from twinjet import _core
from twinjet.engines.text import output_rules
from twinjet.errors import InvalidRequest, SlowReader, TwinjetError, Unavailable, Unsupported
from twinjet.request import EngineRequest, Sampling
from twinjet.routing.prefix import prefix_key
from twinjet.server.encoding import INLINE_CHARS
from twinjet.server.handlers import guarded
from twinjet.server.inference import Lost, Sharing
from twinjet.server.status import Failure, internal_failure, to_failure
from twinjet.server.stream import StreamWriter

if TYPE_CHECKING:
    from twinjet.engines.base import EngineInfo, PushEngine
    from twinjet.scheduler.ticket import CarriedTicket
    from twinjet.server.deployments import Deployment, Deployments
    from twinjet.server.load_reports import LoadReports
    from twinjet.server.samplings import Wish

    PlainItem = tuple[
        int,
        _core.PlainCall,
        str,
        float | None,
        str,
        str,
        tuple[int, ...],
        int,
        bytes,
        str,
        str,
        str,
        str,
        int,
    ]

logger = logging.getLogger("twinjet.server")

METHOD = "Generate"
PATH = "/twinjet.v1.InferenceService/Generate"

_INTERNAL = internal_failure()
_NO_TRACE: Mapping[str, str] = {}
_MAX_MAKERS = 1024
_ENDS_A_TURN = 4
"""A new call waits for these, a fifth of a millisecond where they come now and then."""


class _Place(NamedTuple):
    """A deployment that requests for a model may go to. alike: what its streams have in common."""

    model: str
    deployment: Deployment
    engine: PushEngine
    info: EngineInfo
    alike: tuple[Any, ...]


class _Run:
    """A request that was taken. is_late: a task sees to its end."""

    __slots__ = ("address", "call", "call_id", "is_late", "lost", "peer", "session", "stream", "ticket")

    def __init__(
        self, call_id: int, call: _core.PlainCall, peer: str, address: str, session: str, lost: Lost
    ) -> None:
        self.call_id = call_id
        self.call = call
        self.peer = peer
        self.address = address
        self.session = session
        self.stream = lost.stream
        self.lost = lost
        self.is_late = False
        self.ticket: CarriedTicket | None = None

    @property
    def blocked_since(self) -> float | None:
        """As StreamWriter's."""
        return self.stream.blocked_since

    def stall(self, error: SlowReader) -> None:
        """As StreamWriter's."""
        if self.ticket is not None:
            self.ticket.fail(error)


class PlainCalls:
    """The plain calls of one server. go_on: has a coroutine function, given the call's context, finish a call."""

    def __init__(
        self,
        sharing: Sharing,
        load_reports: LoadReports,
        door: _core.Door,
        go_on: Callable[
            [int, _core.DoorCall, str, Callable[[Any, Any], Awaitable[Any]], Callable[[], None]], None
        ],
    ) -> None:
        self._deployments: Deployments = sharing.deployments
        self._settings = sharing.settings
        self._live = sharing.live
        self._metrics = sharing.metrics
        self._watch = sharing.watch
        self._gate = sharing.gate
        self._samplings = sharing.samplings
        self._move = sharing.move
        # Where there is no choice, by model as clients name it.
        self._only: dict[str, _Place] = {}
        self._revision = -1
        self._places: dict[tuple[str, str], _Place] = {}  # of the batch, by model and deployment
        self._load_reports = load_reports
        self._door = door
        self._go_on = go_on
        self._runs: dict[int, _Run] = {}
        self._taken: list[tuple[_Run, EngineRequest]] = []  # of the batch
        self._makers: dict[tuple[Wish, str, str], tuple[Sampling | None, _core.StreamMaker]] = {}
        self._alike: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._ended: deque[_Run] = deque()
        self._trailer: tuple[tuple[str, bytes], ...] = ()
        self._native_trailer = _core.DoorTrailers(())
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def __len__(self) -> int:
        return len(self._runs)

    def take(self, items: Iterable[PlainItem]) -> list[PlainItem]:
        """Admit what came together; gives what is to be served as all other calls are."""
        now = time.monotonic()
        revision = self._deployments.table.revision
        if revision != self._revision or self._deployments.is_draining:
            self._only.clear()
            self._revision = revision
        left = []
        for item in items:
            try:
                if not self._take(item, now):
                    left.append(item)
            except TwinjetError as error:
                self._refuse(item[1], error)
            except Exception:  # one call's fault must not lose the others
                logger.exception("%s failed", METHOD)
                self._fail(item[1], _INTERNAL, None)
        taken, self._taken = self._taken, []
        for run, request in taken:
            try:
                self._accept(run, request)
            except Exception:
                logger.exception("%s failed", METHOD)
                self._fail(run.call, _INTERNAL, None)
                self._let_go(run)
        for place in self._places.values():
            place.engine.flush()
        self._places.clear()
        for run, _ in taken:
            if run.call_id in self._runs:
                self._live.hold(run)
                self._watch.add(run)
        return left

    def cancel(self, call_id: int) -> None:
        """The client or the door has ended a call; nothing if it is none of these, or a task has it."""
        run = self._runs.get(call_id)
        if run is not None and not run.is_late:
            self._let_go(run)
            self._metrics.count_call(METHOD, "CANCELLED")

    async def wait_idle(self) -> None:
        """Return when none is left."""
        await self._is_idle.wait()

    def end_all(self, failure: Failure) -> None:
        """End all that are left, but for those that a task has."""
        for run in list(self._runs.values()):
            if not run.is_late:
                run.call.finish(failure.code.value[0], failure.message, failure.trailing_metadata)
                self.cancel(run.call_id)

    def _place(self, model: str, tenant: str, session: str) -> _Place | None:
        """Where a request goes; None if that is for others to say. Looked at once a batch where there is no choice."""
        if (kept := self._only.get(model)) is not None:
            key = kept.model, kept.deployment.name
            if self._places.get(key) is kept or self._is_as_before(kept):
                self._places[key] = kept
                return kept
            del self._only[model]
        deployments = self._deployments
        try:
            name = deployments.resolve(model)
            route = deployments.table.routes[name]
            deployment = deployments.pick(name, tenant, session)
            place = self._places.get((name, deployment.name))
            if place is None and not route.mirror:
                place = self._look_at(name, deployment)
        except TwinjetError:
            return None
        if place is not None:
            self._places[name, deployment.name] = place
            if len(route.targets()) == 1:
                self._only[model] = place
        return place

    def _is_as_before(self, place: _Place) -> bool:
        try:
            engine, info = place.deployment.ready()
        except TwinjetError:
            return False
        return engine is place.engine and info is place.info

    def _look_at(self, model: str, deployment: Deployment) -> _Place | None:
        engine, info = deployment.ready()
        if "generate" not in info.capabilities or not hasattr(engine, "submit"):
            return None
        vocabulary = engine.tokenizer.vocabulary
        alike = (
            model, deployment.name, info.name, info.sampler.implementation, info.eos_token_ids, vocabulary
        )  # fmt: skip
        if self._alike.setdefault((model, deployment.name), alike) != alike:
            self._makers.clear()
            self._alike = {(model, deployment.name): alike}
        return _Place(model, deployment, cast("PushEngine", engine), info, alike)

    def _take(self, item: PlainItem, now: float) -> bool:
        """Admit one; False, and nothing has happened, if it is not as usual. Raises what its client is to hear."""
        (
            call_id, call, peer, timeout_s, model, text, token_ids, largest_token, sent, request_id, tenant, salt,
            session, seed,
        ) = item  # fmt: skip
        place = self._place(model, tenant, session)
        if place is None:
            return False
        limits, dispatcher = place.info.limits, place.deployment.dispatcher
        if largest_token >= limits.vocab_size or len(token_ids) >= limits.max_context_tokens:
            return False
        try:
            wish = self._samplings.wish_of(sent)
        except (DecodeError, InvalidRequest):
            return False
        if wish.overrides.constraint is not None or (timeout_s is not None and timeout_s <= 0):
            return False
        if text and not self._is_short(text, limits.max_context_tokens):
            return False
        address = self._gate.count(peer)
        is_taken = False
        try:
            try:
                dispatcher.check(request_id, tenant, address)
            except Unavailable:  # perhaps another deployment takes it
                return False
            if text:
                token_ids = tuple(place.engine.tokenizer.encode(text, add_special_tokens=True))
            if not 1 <= len(token_ids) < limits.max_context_tokens:
                return False
            try:
                sampling = wish.resolve(place.info, num_prompt_tokens=len(token_ids), seed=seed)
            except (InvalidRequest, Unsupported):
                return False
            request = EngineRequest(
                request_id=request_id, prompt_token_ids=token_ids, sampling=sampling, tenant=tenant,
                client_address=address, cache_salt=salt, deadline=None if timeout_s is None else now + timeout_s,
                trace_headers=_NO_TRACE,
            )  # fmt: skip
            stream = call.make_carried(
                self._maker(wish, sampling, place), request_id, len(token_ids), sampling.seed,
                sampling.max_tokens, now,
            )  # fmt: skip
            lost = Lost(place.model, place.deployment, wish, stream, now)
            run = _Run(call_id, call, peer, address, session, lost)
            run.ticket = dispatcher.open_carried(request, stream, lambda: self._on_end(run))
            is_taken = True
        finally:
            if not is_taken:
                self._gate.leave(peer, address)
        self._taken.append((run, request))
        return True

    def _accept(self, run: _Run, request: EngineRequest) -> None:
        """Begin the answer, before the engine has the request: what it answers may go to the client at once."""
        self._runs[run.call_id] = run
        self._is_idle.clear()
        run.call.accept(request.request_id, prefix_key(request.prompt_token_ids, request.cache_salt))

    def _is_short(self, text: str, max_context_tokens: int) -> bool:
        """Whether a text is tokenized where it is; see server.encoding."""
        if len(text) > INLINE_CHARS or len(text) > max_context_tokens:
            return False
        return len(text.encode()) <= self._settings.max_prompt_bytes

    def _maker(self, wish: Wish, sampling: Sampling, place: _Place) -> _core.StreamMaker:
        model, deployment, engine, sampler, eos_token_ids, vocabulary = place.alike
        key = (wish, model, deployment)
        kept = self._makers.get(key)
        if kept is not None and kept[0] is wish.base:
            return kept[1]
        maker = _core.StreamMaker(
            vocabulary,
            num_outputs=sampling.n,
            model=model,
            engine=engine,
            deployment=deployment,
            sampler=sampler,
            max_pending_bytes=self._settings.max_pending_bytes,
            **output_rules(sampling, eos_token_ids),
        )
        if len(self._makers) >= _MAX_MAKERS:
            self._makers.clear()
        self._makers[key] = (wish.base, maker)
        return maker

    # Ends.

    def _on_end(self, run: _Run) -> None:
        if not self._ended:
            asyncio.get_running_loop().call_soon(self._end_some)
        self._ended.append(run)

    def _end_some(self) -> None:
        """End some and let the loop turn before the next: new calls come in between."""
        self._door.hold()
        try:
            for _ in range(min(_ENDS_A_TURN, len(self._ended))):
                run = self._ended.popleft()
                if run.call_id not in self._runs:  # cancelled meanwhile
                    continue
                try:
                    self._end(run)
                except Exception:
                    logger.exception("%s failed", METHOD)
                    self._fail(run.call, _INTERNAL, None)
                    self._let_go(run)
        finally:
            self._door.let_go()
        if self._ended:
            asyncio.get_running_loop().call_soon(self._end_some)

    def _end(self, run: _Run) -> None:
        assert run.ticket is not None, "a request ends after it was opened"
        error = run.ticket.error()
        if error is None:
            if run.call.end(run.stream, self._trailers()):
                self._let_go(run)
                self._metrics.observe_finished(run.lost.model, run.lost.deployment.name, run.stream)
                self._metrics.count_call(METHOD, "OK")
                self._load_reports.count(None)
            else:
                self._end_late(run, self._rest)
        elif isinstance(error, TwinjetError) and not run.stream.has_begun:
            self._end_late(run, self._moved)
        elif run.call.hand_over(run.stream, isinstance(error, SlowReader)):
            self._let_go(run)
            self._refuse(run.call, error)
        else:
            self._end_late(run, self._rest)

    def _end_late(self, run: _Run, behaviour: Callable[[_Run, Any], Awaitable[None]]) -> None:
        """Have a task see to the end."""
        run.is_late = True
        self._watch.discard(run)

        async def behave(_: Any, context: Any) -> None:
            await behaviour(run, context)

        handler = guarded(METHOD, behave, self._metrics, self._load_reports)
        self._go_on(run.call_id, run.call.reopen(), run.peer, handler, lambda: self._let_go(run))

    async def _rest(self, run: _Run, context: Any) -> None:
        """Write what is left, as fast as the client reads."""
        ticket, stream = run.ticket, run.stream
        assert ticket is not None, "a request ends after it was opened"
        writer = StreamWriter(context.write)
        try:
            writer.watch_carried(stream, ticket.fail)
            self._watch.add(writer)
            while messages := await ticket.read():
                for message in messages:
                    await writer.write(message)
            await writer.write(stream.summary())
            self._metrics.observe_finished(run.lost.model, run.lost.deployment.name, stream)
        finally:
            self._watch.discard(writer)
            writer.close()

    async def _moved(self, run: _Run, context: Any) -> None:
        """Serve the request elsewhere, if that can be."""
        ticket = run.ticket
        assert ticket is not None, "a request ends after it was opened"
        error = ticket.error()
        assert isinstance(error, TwinjetError), "others move nothing"
        ticket.close()
        await self._move(ticket.entry.request, run.lost, error, run.session, context)

    def _let_go(self, run: _Run) -> None:
        """Give back everything that a request holds."""
        if self._runs.pop(run.call_id, None) is None:
            return
        if not self._runs:
            self._is_idle.set()
        self._watch.discard(run)
        if run.ticket is not None:
            run.ticket.close()
        self._live.let_go(run)
        self._gate.leave(run.peer, run.address)

    def _refuse(self, call: _core.PlainCall, error: Exception) -> None:
        if isinstance(error, TwinjetError):
            failure = to_failure(error)
            logger.info("%s: %s: %s", METHOD, type(error).__name__, failure.message)
            self._fail(call, failure, error)
        else:
            logger.error("%s failed", METHOD, exc_info=error)
            self._fail(call, _INTERNAL, error)

    def _fail(self, call: _core.PlainCall, failure: Failure, error: Exception | None) -> None:
        self._metrics.count_call(METHOD, failure.code.name)
        self._load_reports.count(error if error is not None else RuntimeError(failure.message))
        trailers = (*failure.trailing_metadata, *self._load_reports.trailer())
        call.finish(failure.code.value[0], failure.message, trailers)

    def _trailers(self) -> _core.DoorTrailers:
        trailer = self._load_reports.trailer()
        if trailer is not self._trailer:
            self._trailer, self._native_trailer = trailer, _core.DoorTrailers(trailer)
        return self._native_trailer
