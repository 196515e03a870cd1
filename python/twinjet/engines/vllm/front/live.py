"""One running request: its outputs' collectors, one wake-up for all of them, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any


class LiveRequest:
    """A request while its iterator is open.

    vLLM puts deltas into one collector for each output and merges them while they are not fetched. All
    collectors share one event here, so that one task waits for n outputs.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.failure: Exception | None = None
        self._wake = asyncio.Event()
        self._submissions: dict[int, asyncio.Task[Any]] = {}
        self._open: dict[int, Any] = {}
        self._done: set[int] = set()

    async def submit(self, output_index: int, submission: asyncio.Task[Any]) -> None:
        """Wait for a submission, which gives a collector; if we are cancelled meanwhile it goes on."""
        self._submissions[output_index] = submission
        collector = await asyncio.shield(submission)
        if collector.output is not None:
            self._wake.set()
        collector.ready = self._wake
        self._open[output_index] = collector

    def fail(self, error: Exception) -> None:
        """End the request with an error, ahead of whatever is queued."""
        self.failure = self.failure or error
        self._wake.set()

    @property
    def is_open(self) -> bool:
        return bool(self._open)

    def finish(self, output_index: int) -> None:
        del self._open[output_index]
        self._done.add(output_index)

    def engine_id(self, output_index: int) -> str:
        """Give vLLM's id of an output whose submission has settled."""
        request_id: str = self._submissions[output_index].result().request_id
        return request_id

    async def wait(self) -> None:
        """Wait for something to fetch. Raises the failure, if any."""
        await self._wake.wait()
        if self.failure is not None:
            raise self.failure

    def fetch(self, *, first_only: bool) -> list[tuple[int, Any]]:
        """Give what has arrived: (output index, RequestOutput). first_only: of output 0 alone."""
        self._wake.clear()
        found = []
        for index, collector in self._open.items():
            if first_only and index != 0:
                continue
            output = collector.get_nowait()
            if output is not None:
                found.append((index, output))
        if first_only and found:
            self._wake.set()
        return found

    async def unfinished_ids(self) -> list[str]:
        """Give vLLM's ids of the outputs that still run, once every submission has settled."""
        found = []
        for index, submission in self._submissions.items():
            if index in self._done:
                continue
            await asyncio.wait([submission])
            if not submission.cancelled() and submission.exception() is None:
                found.append(submission.result().request_id)
        return found
