"""The worker's end of the reports' way to the server, and the reports' form on it.

TensorRT-LLM has no way back for a logits processor, so a Unix stream socket in a private folder of the server's is
one; the server's end is twinjet.engines.tensorrt_llm.front.channel.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from dataclasses import dataclass

import numpy as np

log = logging.getLogger(__name__)

HEADER = struct.Struct("<BQIiII")  # kind, key, position, token id, rank, number of entries or bytes
TOKEN = 0
FAULT = 1
TARGET = 2
ENTRY_BYTES = 8
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


def encode_token(key: int, position: int, report: TokenReport) -> bytes:
    """Frame a report of the token drawn as output token number `position` of request `key`."""
    entries = np.empty(len(report.entries), dtype=[("id", "<i4"), ("logprob", "<f4")])
    entries["id"] = [token_id for token_id, _ in report.entries]
    entries["logprob"] = [logprob for _, logprob in report.entries]
    return HEADER.pack(TOKEN, key, position, report.token_id, report.rank, len(entries)) + entries.tobytes()


def encode_fault(key: int, position: int, message: str) -> bytes:
    """Frame a fault."""
    text = message.encode()[:4096]
    return HEADER.pack(FAULT, key, position, -1, 0, len(text)) + text


def encode_target(key: int, name: str) -> bytes:
    """Frame the name of what draws the tokens of request `key`."""
    text = name.encode()
    return HEADER.pack(TARGET, key, 0, -1, 0, len(text)) + text


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
