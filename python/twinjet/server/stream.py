"""What stands between an engine and a client that may read slower than the engine writes.

HTTP/2 flow control lets a server run hundreds of thousands of small messages ahead of a reader, so it protects
nobody. Here each stream holds at most one unsent delta for each output; a newer one is merged into it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from twinjet.engines.base import EngineEvent, OutputEvent, TokenLogprobs
from twinjet.errors import SlowReader
from twinjet.scheduler import DispatchedEvent, QueuedEvent

StreamEvent = QueuedEvent | DispatchedEvent | EngineEvent

_LOGPROB_BYTES = 32


class _PendingOutput:
    """The unsent tokens of one output."""

    def __init__(self, event: OutputEvent) -> None:
        self._index = event.output_index
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self.num_bytes = 0
        self.finish = event.finish

    def add(self, event: OutputEvent) -> int:
        """Merge an event; return by how many bytes this grew."""
        self._texts.append(event.text)
        self._token_ids.extend(event.token_ids)
        self._logprobs.extend(event.logprobs)
        self.finish = event.finish
        size = len(event.text) + 4 * len(event.token_ids) + _logprob_bytes(event.logprobs)
        self.num_bytes += size
        return size

    def take(self) -> OutputEvent:
        return OutputEvent(self._index, "".join(self._texts), self._token_ids, self._logprobs, self.finish)


def _logprob_bytes(entries: Sequence[TokenLogprobs]) -> int:
    return sum(_LOGPROB_BYTES * (1 + len(entry.top)) for entry in entries)


class StreamBuffer:
    """Holds what a stream has not sent yet: one writer, one reader, both on one asyncio loop."""

    def __init__(self, max_bytes: int, on_overflow: Callable[[SlowReader], None] = lambda _: None) -> None:
        self._max_bytes = max_bytes
        self._on_overflow = on_overflow
        self._queue: deque[StreamEvent | _PendingOutput] = deque()
        self._pending: dict[int, _PendingOutput] = {}
        self._num_bytes = 0
        self._ready = asyncio.Event()
        self._is_closed = False
        self._error: BaseException | None = None

    def put(self, event: StreamEvent) -> None:
        """Add an event. Raises SlowReader, also told to on_overflow, if more than max_bytes would wait."""
        if isinstance(event, OutputEvent):
            pending = self._pending.get(event.output_index)
            if pending is None:
                pending = self._pending[event.output_index] = _PendingOutput(event)
                self._queue.append(pending)
            self._num_bytes += pending.add(event)
            if self._num_bytes > self._max_bytes:
                error = SlowReader(
                    f"the client reads too slowly: more than {self._max_bytes} bytes wait for it"
                )
                self._on_overflow(error)
                raise error
        elif isinstance(event, QueuedEvent) and self._queue and isinstance(self._queue[-1], QueuedEvent):
            self._queue[-1] = event
        else:
            self._queue.append(event)
        self._ready.set()

    def close(self, error: BaseException | None = None) -> None:
        """End the stream: the reader gets what waits, then the error if there is one.

        After SlowReader what waits is dropped, since nobody reads it.
        """
        if isinstance(error, SlowReader):
            self._queue.clear()
        self._is_closed = True
        self._error = error
        self._ready.set()

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        while True:
            while self._queue:
                event = self._queue.popleft()
                if isinstance(event, _PendingOutput):
                    event = self._take(event)
                yield event
            if self._is_closed:
                if self._error is not None:
                    raise self._error
                return
            self._ready.clear()
            await self._ready.wait()

    def _take(self, pending: _PendingOutput) -> OutputEvent:
        event = pending.take()
        del self._pending[event.output_index]
        self._num_bytes -= pending.num_bytes
        return event


class StreamWriter:
    """Writes messages, each within limit_s; a write that is blocked can be interrupted."""

    def __init__(self, write: Callable[[Any], Awaitable[None]], limit_s: float) -> None:
        self._write = write
        self._limit_s = limit_s
        self._timeout: asyncio.Timeout | None = None
        self._interruption: SlowReader | None = None

    async def write(self, message: Any) -> None:
        """Write one message. Raises SlowReader if it takes too long or was interrupted."""
        if self._interruption is not None:
            raise self._interruption
        try:
            async with asyncio.timeout(self._limit_s) as self._timeout:
                await self._write(message)
        except TimeoutError:
            raise self._interruption or SlowReader(
                f"the client has read nothing for {self._limit_s:g} s"
            ) from None
        finally:
            self._timeout = None

    def interrupt(self, error: SlowReader) -> None:
        """Make the write that is blocked, and every later one, raise error."""
        self._interruption = error
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())
