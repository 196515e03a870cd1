"""Carries what our sampler knows from the engine's worker processes to the server: logprobs and faults.

TensorRT-LLM has no way back for a logits processor, so a Unix stream socket in a private folder is one. Only
workers on the server's own host can reach it; start-up finds out whether one of them does. Ranks of a
tensor-parallel group all report; the first report of a token counts and the others must agree with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from twinjet.engines.tensorrt_llm.worker.reports import (
    ENTRY_BYTES,
    FAULT,
    HEADER,
    TARGET,
    TOKEN,
    TokenReport,
    close_reporter,
)
from twinjet.private_folder import PrivateFolder


class ReportLost(Exception):
    """No report came in time."""


class FaultReported(Exception):
    """The processor could not draw; the text says why."""


@dataclass(eq=False)
class Inbox:
    """Reports of one engine request; closed by the engine when the request is over.

    target: what draws in the workers ("cuda", a CPU's instruction set), None if they did not say.
    """

    num_disagreements: int = 0
    target: str | None = None
    _reports: dict[int, TokenReport] = field(default_factory=dict)
    _seen: dict[int, int] = field(default_factory=dict)
    _fault: str | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def fault(self) -> str | None:
        return self._fault

    async def take(self, position: int, timeout_s: float) -> TokenReport:
        """Give the report of one output token and forget it.

        Raises FaultReported if the processor failed, ReportLost if nothing comes within timeout_s.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while position not in self._reports:
            if self._fault is not None:
                raise FaultReported(self._fault)
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise ReportLost(f"no report of output token {position} within {timeout_s:g} s") from None
        return self._reports.pop(position)

    def put(self, position: int, report: TokenReport) -> None:
        if position in self._seen:
            self.num_disagreements += self._seen[position] != report.token_id
            if self.num_disagreements:
                self.put_fault(f"ranks drew different tokens at output token {position}")
            return
        self._seen[position] = report.token_id
        self._reports[position] = report
        self._changed.set()

    def put_fault(self, message: str) -> None:
        if self._fault is None:
            self._fault = message
        self._changed.set()


class ReportChannel:
    """The server's end."""

    def __init__(self) -> None:
        self._folder: PrivateFolder | None = None
        self._server: asyncio.Server | None = None
        self._inboxes: dict[int, Inbox] = {}
        self._connections: set[asyncio.StreamWriter] = set()
        self._next_key = 1

    @property
    def folder(self) -> Path:
        """A private folder, for files that workers read."""
        assert self._folder is not None, "start() has not returned"
        return self._folder.path

    @property
    def path(self) -> str:
        """The socket's path."""
        return str(self.folder / "reports")

    async def start(self) -> None:
        self._folder = PrivateFolder("reports")
        # Kept before it serves: a cancellation in between must not lose it.
        self._server = await asyncio.start_unix_server(self._serve, self.path, start_serving=False)
        await self._server.start_serving()

    async def stop(self) -> None:
        """Close everything; idempotent."""
        if self._server is not None:
            close_reporter(self.path)
            self._server.close()
            for writer in list(self._connections):
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
            await self._server.wait_closed()
            self._server = None
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def open(self) -> tuple[int, Inbox]:
        """Make a key that no other request has, and its inbox."""
        key, self._next_key = self._next_key, self._next_key + 1
        inbox = self._inboxes[key] = Inbox()
        return key, inbox

    def close(self, key: int) -> None:
        """Forget a request; later reports of it are dropped."""
        self._inboxes.pop(key, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await self._read_frame(reader)
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _read_frame(self, reader: asyncio.StreamReader) -> None:
        kind, key, position, token_id, rank, count = HEADER.unpack(await reader.readexactly(HEADER.size))
        body = await reader.readexactly(count * (ENTRY_BYTES if kind == TOKEN else 1))
        inbox = self._inboxes.get(key)
        if inbox is None:
            return
        if kind == FAULT:
            inbox.put_fault(body.decode(errors="replace"))
            return
        if kind == TARGET:
            inbox.target = body.decode()
            return
        entries = np.frombuffer(body, dtype=[("id", "<i4"), ("logprob", "<f4")])
        pairs = zip(entries["id"].tolist(), entries["logprob"].tolist(), strict=True)
        inbox.put(position, TokenReport(token_id, rank, tuple(pairs)))
