"""One request in the dispatcher's hands whose outputs the pump makes ready, and how it is read and ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from twinjet.errors import EngineDied, SlowReader

if TYPE_CHECKING:
    from twinjet._core import Stream
    from twinjet.engines.base import LogprobRow, Outlet, PushEngine
    from twinjet.scheduler.dispatcher import Dispatcher
    from twinjet.scheduler.entry import Entry


class Ticket:
    """What Dispatcher.open gives: read() until it gives nothing, then close(). Implements engines.base.Run.

    stream: where the outputs become messages. on_overflow: called when too much waits for the
    reader.
    """

    __slots__ = (
        "_dispatcher", "_error", "_is_over", "_last_place", "_reports_queue", "_waiter", "engine", "entry",
        "is_granted", "key", "on_overflow", "stream",
    )  # fmt: skip

    def __init__(
        self,
        dispatcher: Dispatcher,
        entry: Entry,
        stream: Stream,
        *,
        reports_queue: bool,
        on_overflow: Callable[[SlowReader], None],
    ) -> None:
        self.entry = entry
        self.stream = stream
        self.on_overflow = on_overflow
        self.key = 0
        self.engine: PushEngine | None = None
        self.is_granted = False
        self._dispatcher = dispatcher
        self._reports_queue = reports_queue
        self._last_place: tuple[int, float | None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._is_over = False

    @property
    def outlet(self) -> Outlet:
        return self._dispatcher

    def error(self) -> Exception | None:
        return self._error

    async def read(self) -> list[bytes]:
        """Wait for messages and give those that are ready; none at the end. Cancelling it loses nothing.

        Raises DeadlinePassed, RequestAborted, SlowReader, the error given to Dispatcher.detach() and whatever
        the engine raises, after the messages that came before.
        """
        while True:
            reports = self._reports_queue and not self.is_granted and self._error is None
            if reports:
                self._report_place()
            if messages := self.stream.take():
                return messages
            if self._error is not None:
                raise self._error
            if self._is_over:
                return []
            await self._wait(self._dispatcher.report_interval_s if reports else None)

    def close(self) -> None:
        """Leave the queue or stop the engine's work, if that is not done, and be forgotten. Idempotent."""
        self._dispatcher.forget(self)

    def grant(self) -> None:
        """Go to the engine; called by the dispatcher."""
        self._dispatcher.hand_over(self)

    def fail(self, error: Exception) -> None:
        """End the request with an error; the first one counts, and none once all outputs have ended."""
        if self._error is not None or self._is_over:
            return
        if isinstance(error, EngineDied) and self.is_granted:
            error = EngineDied(str(error), retry_after_s=error.retry_after_s, was_running=True)
        self._error = error
        if isinstance(error, SlowReader):
            self.on_overflow(error)
        self._dispatcher.leave(self)
        self.wake()

    end = fail

    def hand_off(
        self, num_cached_tokens: int | None, prompt_logprobs: Sequence[LogprobRow] | None, state: bytes
    ) -> None:
        """End a prefill with what another engine needs; see engines.base.Run."""
        if self._error is None and not self._is_over:
            self._dispatcher.hand_off(self, num_cached_tokens, prompt_logprobs, state)
            self.finish()

    def finish(self) -> None:
        """Every output has ended; what is ready can still be read."""
        self._is_over = True
        self._dispatcher.leave(self, finished=True)
        self.wake()

    is_carried: ClassVar[bool] = False
    """Whether it is told of its end alone, and nobody waits for messages."""

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, limit_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if limit_s is None else loop.call_later(limit_s, self.wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _report_place(self) -> None:
        place = self._dispatcher.place(self.entry)
        if place != self._last_place:
            self._last_place = place
            self.stream.put_queued(*place)


class CarriedTicket(Ticket):
    """A ticket that nobody reads while its stream has a carrier. on_end: called once when it is over or has failed.

    Then read() gives what the carrier had no room for, and close() is still to be called.
    """

    __slots__ = ("_on_end",)

    is_carried = True

    def __init__(
        self, dispatcher: Dispatcher, entry: Entry, stream: Stream, on_end: Callable[[], None]
    ) -> None:
        super().__init__(dispatcher, entry, stream, reports_queue=False, on_overflow=_nothing)
        self._on_end: Callable[[], None] | None = on_end

    def wake(self) -> None:
        if (self._is_over or self._error is not None) and (on_end := self._on_end) is not None:
            self._on_end = None
            on_end()
        super().wake()

    def close(self) -> None:
        self._on_end = None
        super().close()


def _nothing(_: SlowReader) -> None:
    pass
