"""What the clients say when no server of ours has answered: where they looked, and what that mostly means."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from twinjet.client import AsyncClient, Client, DeadlinePassed, RetryPolicy, TwinjetClientError, Unavailable

ONCE = RetryPolicy(attempts=1)


@pytest.fixture(params=["aio", "sync"])
def failure(request: pytest.FixtureRequest) -> Callable[..., TwinjetClientError]:
    """Ask a server that does not answer: failure(address, **client_options)."""

    def ask(address: str, **options: Any) -> TwinjetClientError:
        def run() -> None:
            with Client(address, retry=ONCE, **options) as client:
                client.generate("x").text()

        async def run_aio() -> None:
            async with AsyncClient(address, retry=ONCE, **options) as client:
                await client.generate("x").text()

        with pytest.raises(TwinjetClientError) as caught:
            run() if request.param == "sync" else asyncio.run(run_aio())
        return caught.value

    return ask


@pytest.fixture
def listen() -> Iterator[Callable[[bytes | None], str]]:
    """Listen and say the given bytes to who comes, or nothing and be silent; gives the address."""
    with ExitStack() as stack:

        def start(words: bytes | None) -> str:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            if words is not None:

                def answer() -> None:
                    while True:
                        try:
                            connection, _ = listener.accept()
                        except OSError:
                            return
                        with connection:
                            connection.sendall(words)
                            connection.recv(1 << 16)

                threading.Thread(target=answer, daemon=True).start()
                # Closing alone does not wake who accepts.
                stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield start


def test_a_port_where_nobody_listens(failure: Callable[..., TwinjetClientError]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    error = failure(address)
    assert type(error) is Unavailable
    assert error.message.startswith(f"the server at {address} cannot be reached: is it running")


def test_a_server_of_another_kind(
    failure: Callable[..., TwinjetClientError], listen: Callable[[bytes | None], str]
) -> None:
    address = listen(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    error = failure(address)
    assert type(error) is Unavailable
    assert error.message.startswith(f"the server at {address} cannot be reached: no gRPC server is there")
    error = failure(address, credentials=grpc.ssl_channel_credentials())
    assert "perhaps it does not speak TLS" in error.message


def test_a_server_that_never_answers(
    failure: Callable[..., TwinjetClientError], listen: Callable[[bytes | None], str]
) -> None:
    address = listen(None)
    error = failure(address, timeout_s=0.3)
    assert type(error) is DeadlinePassed
    assert error.message == f"the deadline passed before the server at {address} had finished"
