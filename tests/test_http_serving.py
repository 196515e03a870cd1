"""The HTTP server beside gRPC: silent connections take no more than their number, and nobody waits behind them."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from twinjet import http_serving


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(http_serving, "MAX_CONNECTIONS", 8)

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"here"]

    server = http_serving.listen(answer, "127.0.0.1", 0)
    yield server.server_port
    server.shutdown()
    server.server_close()


def _get(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        return bytes(answer.read())


def test_of_many_silent_connections_the_oldest_go(port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(40)]
    assert _get(port) == b"here"
    # The answer came after all of them had been taken.
    for connection in silent[:32]:
        assert connection.recv(1) == b""
    for connection in silent:
        connection.close()
    assert _get(port) == b"here"


def test_who_says_nothing_for_long_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_serving._Handler, "timeout", 0.05)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET / HT")
        assert connection.recv(1) == b""
