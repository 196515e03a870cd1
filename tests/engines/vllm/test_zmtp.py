"""Our ZMTP against libzmq, and against bytes that are none."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from twinjet.engines.vllm.front.zmtp import MAX_FRAME_BYTES, Connection, Listener, ZmtpError

PATIENCE_MS = 20_000
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"


def filled(connection: Connection) -> None:
    """Read what comes next; the event loop's part."""
    poller = zmq.Poller()
    poller.register(connection.fileno(), zmq.POLLIN)
    assert poller.poll(PATIENCE_MS), "nothing came"
    connection.fill()


def read_on(connection: Connection) -> None:
    while True:
        filled(connection)


def received(connection: Connection) -> list[bytes]:
    while (message := connection.take()) is None:
        filled(connection)
    return message


@contextlib.contextmanager
def peer(
    folder: Path, kind: int, ours: str, theirs: str, **options: int
) -> Iterator[tuple[zmq.Socket[bytes], Connection]]:
    """A socket of libzmq that is connected to a Connection."""
    path = folder / "s"
    listener = Listener(path, ours, theirs)
    context = zmq.Context()
    other = context.socket(kind)
    for name, value in options.items():
        other.setsockopt(getattr(zmq, name), value)
    other.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
    other.connect(f"ipc://{path}")
    poller = zmq.Poller()
    poller.register(listener.fileno(), zmq.POLLIN)
    assert poller.poll(PATIENCE_MS)
    connection = listener.accept()
    try:
        while not connection.is_ready:
            filled(connection)
        yield other, connection
    finally:
        connection.close()
        context.destroy(linger=0)
        path.unlink()


def sizes() -> st.SearchStrategy[list[list[int]]]:
    """Sizes of the frames of messages: around the bounds of short frames and of the buffer, and beyond it."""
    edges = st.sampled_from(
        [0, 1, 254, 255, 256, 257, 8191, 8193, 65_536, 131_060, 131_072, 131_073, 400_000]
    )
    return st.lists(st.lists(edges | st.integers(0, 3000), min_size=1, max_size=4), min_size=1, max_size=8)


@settings(max_examples=25)
@given(sizes(), st.integers(0, 2**32))
def test_messages_of_any_shape_go_both_ways(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], seed: int
) -> None:
    draw = random.Random(seed)
    messages = [[draw.randbytes(size) for size in shape] for shape in shapes]
    with peer(tmp_path_factory.mktemp("z"), zmq.DEALER, "ROUTER", "DEALER") as (other, connection):
        for message in messages:
            other.send_multipart(message)
        assert [received(connection) for _ in messages] == messages
        assert connection.take() is None
        connection.send(messages)
        arrived = []
        for _ in messages:
            while not other.poll(10) and connection.has_unsent:
                connection.flush()
            arrived.append(other.recv_multipart())
        assert arrived == messages
        assert not connection.has_unsent


def test_a_peer_that_does_not_read_costs_memory_and_no_message(tmp_path: Path) -> None:
    message = bytes(100_000)
    with peer(tmp_path, zmq.DEALER, "ROUTER", "DEALER", RCVHWM=1) as (other, connection):
        for _ in range(100):
            connection.send([(b"k", message)])
        assert connection.has_unsent
        for _ in range(100):
            while not other.poll(10):
                connection.flush()
            assert other.recv_multipart() == [b"k", message]


def test_a_peer_knows_us_by_our_identity(tmp_path: Path) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
    router.bind(f"ipc://{tmp_path}/r")
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(f"{tmp_path}/r")
    connected.setblocking(False)
    connection = Connection(connected, "DEALER", "ROUTER", b"\x00\x07")
    try:
        while not connection.is_ready:
            filled(connection)
        connection.send([[b"hello"]])
        assert router.recv_multipart() == [b"\x00\x07", b"hello"]
        router.send_multipart([b"\x00\x07", b"answer", b""])
        assert received(connection) == [b"answer", b""]
    finally:
        connection.close()
        context.destroy(linger=0)


def test_pings_are_answered(tmp_path: Path) -> None:
    options = {"HEARTBEAT_IVL": 5, "HEARTBEAT_TIMEOUT": 300}
    with peer(tmp_path, zmq.PUSH, "PULL", "PUSH", **options) as (other, connection):
        closed = other.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        for _ in range(100):
            filled(connection)  # a ping
            assert connection.take() is None
        assert not closed.poll(0)
        other.send(b"after them")
        assert received(connection) == [b"after them"]
        other.disable_monitor()


def test_a_peer_that_goes_is_told_after_its_last_message(tmp_path: Path) -> None:
    with peer(tmp_path, zmq.PUSH, "PULL", "PUSH") as (other, connection):
        other.send(b"last")
        other.close(linger=-1)
        assert received(connection) == [b"last"]
        with pytest.raises(ConnectionError):
            read_on(connection)


def test_sending_to_a_peer_that_is_gone_raises(tmp_path: Path) -> None:
    with peer(tmp_path, zmq.DEALER, "ROUTER", "DEALER") as (other, connection):
        other.close(linger=0)
        with pytest.raises(ConnectionError):
            read_on(connection)
        with pytest.raises(ConnectionError):
            connection.send([(b"k", b"v")])


def header(flags: int, size: int) -> bytes:
    return bytes((flags | 2,)) + size.to_bytes(8, "big")


def fed(data: bytes, pieces: int = 1) -> list[list[bytes]]:
    """What a connection makes of a peer's bytes, however they are cut."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(ours, "PULL", "PUSH")
    messages = []
    try:
        cuts = sorted({len(data) * i // pieces for i in range(1, pieces + 1)})
        for begin, end in zip([0, *cuts], cuts, strict=False):
            theirs.sendall(data[begin:end])
            connection.fill()
            while (message := connection.take()) is not None:
                messages.append(message)
    finally:
        connection.close()
        theirs.close()
    return messages


HELLO = GREETING + header(4, len(READY)) + READY


@pytest.mark.parametrize("pieces", [1, 2, 3, 1000])
def test_bytes_may_come_in_any_pieces(pieces: int) -> None:
    body = bytes(range(256)) * 2
    data = HELLO + b"\x01\x02ab" + header(0, len(body)) + body + b"\x00\x00"
    assert fed(data, pieces) == [[b"ab", body], [b""]]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1", "does not speak ZMTP"),
        (b"\xff" + bytes(8) + b"\x01", "does not speak ZMTP"),
        (GREETING.replace(b"NULL", b"PLAIN"), "another ZMTP"),
        (GREETING.replace(b"\x03\x01", b"\x02\x01"), "another ZMTP"),
        (GREETING + b"\x00\x01a", "before it was ready"),
        (GREETING + b"\x04\x08\x04PING\x00\x00a", "before it was ready"),
        (GREETING + b"\x04\x00", "commands cannot be read"),
        (GREETING + b"\x04\x05\x09READ", "commands cannot be read"),
        (GREETING + b"\x04\x0b\x05ERROR\x04None", "refuses us"),
        (HELLO.replace(b"\x04PUSH", b"\x04PULL"), "not b'PUSH'"),
        (HELLO + b"\x08\x00", "flags 0x8"),
        (HELLO + b"\x05\x00", "flags 0x5"),
        (HELLO + header(0, MAX_FRAME_BYTES + 1), "a frame of"),
    ],
)
def test_what_is_not_its_protocol_is_told(data: bytes, why: str) -> None:
    with pytest.raises(ZmtpError, match=why):
        fed(data)


@given(st.binary(max_size=300), st.integers(1, 40), st.booleans())
def test_no_bytes_do_more_than_raise(data: bytes, pieces: int, is_greeted: bool) -> None:
    with contextlib.suppress(ZmtpError):
        fed(HELLO + data if is_greeted else data, pieces)
