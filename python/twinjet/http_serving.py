"""A small HTTP server beside a gRPC one: its clients can take neither threads nor descriptors from it.

A thread for each connection, but only so many; one more closes the oldest. Who is silent for seconds is closed too.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client.exposition import ThreadingWSGIServer

logger = logging.getLogger("twinjet.http")

MAX_CONNECTIONS: Final = 64
SILENCE_S: Final = 10.0
"""Without a byte from the client, or to it."""

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: pages ask every second."""


class HttpServer(ThreadingWSGIServer):
    """address_family: set for each host before the socket is made."""

    request_queue_size = 128

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, socket.socket] = {}
        super().__init__(*arguments, **named)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread, and close the oldest if there are too many."""
        with self._lock:
            oldest = next(iter(self._open.values())) if len(self._open) >= MAX_CONNECTIONS else None
            if oldest is not None:
                del self._open[id(oldest)]
                _shut(oldest)
            self._open[id(request)] = request
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that has been answered."""
        with self._lock:
            self._open.pop(id(request), None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""
        logger.debug("an HTTP connection failed", exc_info=True)


def _shut(connection: socket.socket) -> None:
    """Wake the thread that reads or writes; it closes the connection."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        logger.debug("an HTTP connection had been closed already")


def listen(application: Application, host: str, port: int) -> HttpServer:
    """Answer on a port from now on, until shutdown() and server_close(). Raises OSError if it cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = type("HttpServer", (HttpServer,), {"address_family": family})
    server: HttpServer = make_server(host, port, application, server_class=kind, handler_class=_Handler)
    threading.Thread(target=server.serve_forever, name="web", daemon=True).start()
    return server
