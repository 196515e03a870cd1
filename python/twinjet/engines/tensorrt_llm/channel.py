"""Carries what our sampler knows from the engine's worker processes to the server: logprobs and faults.

TensorRT-LLM has no way back for a logits processor, so a Unix stream socket in a private folder is one. Only
workers on the server's own host can reach it; start-up finds out whether one of them does. Ranks of a
tensor-parallel group all report; the first report of a token counts and the others must agree with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
import struct
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<BQIiII")  # kind, key, position, token id, rank, number of entries or bytes
_TOKEN = 0
_FAULT = 1
_TARGET = 2
_ENTRY_BYTES = 8
_SEND_BUFFER_BYTES = 4 << 20
_SEND_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class TokenReport:
    """One drawn token: its rank (1 is best), then (token id, natural-log probability) pairs.

    entries[0] is the token itself, the others are the most probable ones, best first.
    """

    token_id: int
    rank: int
    entries: tuple[tuple[int, float], ...]


class ReportLost(Exception):
    """No report came in time."""


class FaultReported(Exception):
    """The processor could not draw; the text says why."""


def encode_token(key: int, position: int, report: TokenReport) -> bytes:
    """Frame a report of the token drawn as output token number `position` of request `key`."""
    entries = np.empty(len(report.entries), dtype=[("id", "<i4"), ("logprob", "<f4")])
    entries["id"] = [token_id for token_id, _ in report.entries]
    entries["logprob"] = [logprob for _, logprob in report.entries]
    return _HEADER.pack(_TOKEN, key, position, report.token_id, report.rank, len(entries)) + entries.tobytes()


def encode_fault(key: int, position: int, message: str) -> bytes:
    """Frame a fault."""
    text = message.encode()[:4096]
    return _HEADER.pack(_FAULT, key, position, -1, 0, len(text)) + text


def encode_target(key: int, name: str) -> bytes:
    """Frame the name of what draws the tokens of request `key`."""
    text = name.encode()
    return _HEADER.pack(_TARGET, key, 0, -1, 0, len(text)) + text


class Reporter:
    """The worker's end: sends frames and never raises, since an exception would end the engine.

    After a failed send the connection is given up for good: the server notices by its missing reports. Any
    thread may send.
    """

    def __init__(self, path: str) -> None:
        self._sending = threading.Lock()
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            self._socket.settimeout(_SEND_TIMEOUT_S)
            self._socket.connect(path)
        except OSError as error:
            self._give_up(error)

    def send(self, frame: bytes) -> None:
        with self._sending:
            if self._socket is None:
                return
            try:
                self._socket.sendall(frame)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _give_up(self, error: OSError) -> None:
        log.warning("cannot report to the server: %s", error)
        self.close()


_reporters: dict[str, Reporter] = {}
_connecting = threading.Lock()


def reporter(path: str) -> Reporter:
    """Give this process's connection to the server at path."""
    with _connecting:
        found = _reporters.get(path)
        if found is None:
            found = _reporters[path] = Reporter(path)
    return found


def close_reporter(path: str) -> None:
    """Close this process's connection, if it has one: workers may share the server's process."""
    found = _reporters.pop(path, None)
    if found is not None:
        found.close()


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
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None
        self._inboxes: dict[int, Inbox] = {}
        self._connections: set[asyncio.StreamWriter] = set()
        self._next_key = 1

    @property
    def folder(self) -> Path:
        """A private folder, for files that workers read."""
        assert self._folder is not None, "start() has not returned"
        return self._folder

    @property
    def path(self) -> str:
        """The socket's path."""
        return str(self.folder / "reports")

    async def start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="twinjet-"))
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
            shutil.rmtree(self._folder, ignore_errors=True)
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
        kind, key, position, token_id, rank, count = _HEADER.unpack(await reader.readexactly(_HEADER.size))
        body = await reader.readexactly(count * (_ENTRY_BYTES if kind == _TOKEN else 1))
        inbox = self._inboxes.get(key)
        if inbox is None:
            return
        if kind == _FAULT:
            inbox.put_fault(body.decode(errors="replace"))
            return
        if kind == _TARGET:
            inbox.target = body.decode()
            return
        entries = np.frombuffer(body, dtype=[("id", "<i4"), ("logprob", "<f4")])
        pairs = zip(entries["id"].tolist(), entries["logprob"].tolist(), strict=True)
        inbox.put(position, TokenReport(token_id, rank, tuple(pairs)))
