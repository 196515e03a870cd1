"""Writes a stream's messages to a client that may read slower than the engine writes.

HTTP/2 flow control lets a server run hundreds of thousands of small messages ahead of a reader, so it protects
nobody. What waits for a blocked write is merged, and bounded, in the native stream (csrc/stream/stream.h); here
is how long a write may be blocked, which one timer for all writers watches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from twinjet.errors import SlowReader

if TYPE_CHECKING:
    from twinjet._core import Stream

_LOOKS_A_LIMIT = 8
"""A blocked write is found at most an eighth of the limit late."""


def _nothing(_: SlowReader) -> None:
    pass


class StreamWriter:
    """Writes the messages of one task, one at a time; a write that is blocked can be interrupted."""

    __slots__ = ("_blocked_since", "_fail", "_interruption", "_stream", "_task", "_write")

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._write = write
        self._stream: Stream | None = None
        self._fail: Callable[[SlowReader], None] = _nothing
        self._task: asyncio.Task[object] | None = None
        self._interruption: SlowReader | None = None
        self._blocked_since: float | None = None

    def watch_carried(self, stream: Stream, fail: Callable[[SlowReader], None]) -> None:
        """Count as blocked, too, while a door that carries the stream is; then `fail` is called."""
        self._stream = stream
        self._fail = fail

    @property
    def blocked_since(self) -> float | None:
        """Since when nothing goes out though it should, in time.monotonic() seconds; None if all is well."""
        if self._blocked_since is None and self._stream is not None:
            return self._stream.blocked_since
        return self._blocked_since

    async def write(self, message: bytes) -> None:
        """Write one message. Raises SlowReader if it was interrupted."""
        if self._interruption is not None:
            raise self._interruption
        # Asked once, since it is always the same one.
        task = self._task = self._task or asyncio.current_task()
        assert task is not None, "streams are written by tasks"
        cancelling = task.cancelling()
        self._blocked_since = time.monotonic()
        try:
            await self._write(message)
        except asyncio.CancelledError:
            # Ours if interrupt() made it and nobody else cancelled the same task as well.
            interruption = self._interrupted_by()
            if interruption is None or task.uncancel() > cancelling:
                raise
            raise interruption from None
        finally:
            self._blocked_since = None

    def _interrupted_by(self) -> SlowReader | None:
        return self._interruption

    def interrupt(self, error: SlowReader) -> None:
        """Make the write that is blocked, and every later one, raise error; the first error counts."""
        if self._interruption is not None:
            return
        self._interruption = error
        if self._blocked_since is not None and self._task is not None:
            self._task.cancel()

    def stall(self, error: SlowReader) -> None:
        """Interrupt whatever is blocked."""
        self.interrupt(error)
        self._fail(error)

    def close(self) -> None:
        """Let go of the call and the stream; nothing is written or interrupted any more.

        Who writes is known to the ticket, and the ticket here: without this each request would wait, with its prompt, for
        the garbage collector.
        """
        self._task = self._stream = self._blocked_since = None
        self._fail = _nothing


class Watched(Protocol):
    """What may be blocked: see StreamWriter."""

    @property
    def blocked_since(self) -> float | None: ...

    def stall(self, error: SlowReader) -> None: ...


class WriterWatch:
    """Interrupts writes that are blocked for limit_s; looks at all of them together, now and then."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._writers: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, writer: Watched) -> None:
        self._writers.add(writer)
        if self._timer is None:
            self._set_timer()

    def discard(self, writer: Watched) -> None:
        self._writers.discard(writer)

    def _set_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._limit_s / _LOOKS_A_LIMIT, self._look)

    def _look(self) -> None:
        self._timer = None
        latest = time.monotonic() - self._limit_s
        for writer in list(self._writers):
            since = writer.blocked_since
            if since is not None and since <= latest:
                writer.stall(SlowReader(f"the client has read nothing for {self._limit_s:g} s"))
        if self._writers:
            self._set_timer()
