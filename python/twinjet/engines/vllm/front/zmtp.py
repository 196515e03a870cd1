"""ZMTP 3, the protocol of ZeroMQ's sockets, on a socket of ours: what libzmq at the other end takes for its like.

libzmq reads and writes in a thread of its own, and a message that comes alone wakes it on its way in and on its
way out; here both happen where the message is wanted. Only what an engine core needs is spoken: one peer, the
NULL mechanism (https://rfc.zeromq.org/spec/23/). What it answers is read by csrc/vllm/zmtp_reader.h, once both have
introduced themselves here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

MAX_FRAME_BYTES: Final = 1 << 31

_SIGNATURE = b"\xff\x00\x00\x00\x00\x00\x00\x00\x00\x7f"
_MECHANISM = b"NULL".ljust(20, b"\x00")
_GREETING = _SIGNATURE + b"\x03\x00" + _MECHANISM + bytes(32)

_MORE, _LONG, _COMMAND = 1, 2, 4
_RESERVED = ~(_MORE | _LONG | _COMMAND)
_KEPT_BYTES = 1 << 20
"""A buffer that had to grow beyond this for one message is let go after it."""
_FIRST_BYTES = 1 << 17


class ZmtpError(ConnectionError):
    """The peer does not speak ZMTP 3, or is another kind of socket than it should be."""


class Listener:
    """A path at which one peer is expected. kind: what we are, "ROUTER" or "PULL"; peer: what it has to be."""

    def __init__(self, path: Path, kind: str, peer: str) -> None:
        self._kind, self._peer = kind, peer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        self._socket.listen(1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> Connection:
        """Give the peer that came, and expect no other. Raises BlockingIOError."""
        accepted, _ = self._socket.accept()
        accepted.setblocking(False)
        self.close()
        return Connection(accepted, self._kind, self._peer)

    def close(self) -> None:
        """Expect nobody any more; idempotent."""
        self._socket.close()


class Connection:
    """A peer, on a connected non-blocking stream socket. is_ready: it has introduced itself; only then may it be sent to.

    Not thread-safe.
    """

    def __init__(self, connected: socket.socket, kind: str, peer: str, identity: bytes = b"") -> None:
        """Introduce ourselves. kind, peer: see Listener; identity: by which a ROUTER is to know us."""
        self._socket = connected
        self._peer = peer.encode()
        self.is_ready = False
        self._is_greeted = False
        self._buffer = bytearray(_FIRST_BYTES)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0
        self._wanted = len(_GREETING)
        self._frames: list[bytes] = []
        self._unsent = bytearray()
        self._num_sent = 0  # of those
        ready = b"\x05READY" + _property(b"Socket-Type", kind.encode()) + _property(b"Identity", identity)
        self._put(_GREETING + _header(_COMMAND, len(ready)) + ready)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Let go of the socket; idempotent."""
        self._socket.close()

    # In.

    def fill(self) -> None:
        """Read once from the socket, as much as there is room for.

        Raises ConnectionError when the peer is gone, and ZmtpError.
        """
        self._make_room()
        if self._end == len(self._buffer):
            return
        try:
            count = self._socket.recv_into(self._view[self._end :])
        except BlockingIOError:
            return
        if count == 0:
            raise ConnectionResetError("the peer has closed the connection")
        self._end += count
        if not self.is_ready:
            self._introduce()

    def detach(self) -> bytes:
        """Give what was read and not taken, and read no more: somebody else does."""
        unread = bytes(self._view[self._begin : self._end])
        self._begin = self._end = 0
        return unread

    def take(self) -> list[bytes] | None:
        """Give the frames of the next message; None if it has not come whole. Raises ZmtpError."""
        while self.is_ready:
            frame = self._next_frame()
            if frame is None:
                break
            flags, body = frame
            if flags & _COMMAND:
                self._obey(body)
                continue
            self._frames.append(body)
            if not flags & _MORE:
                frames, self._frames = self._frames, []
                return frames
        return None

    def _make_room(self) -> None:
        held = self._end - self._begin
        size = len(self._buffer)
        if held == 0:
            self._begin = self._end = 0
            if size > _KEPT_BYTES and self._wanted <= _FIRST_BYTES:
                self._replace(_FIRST_BYTES)
        elif self._wanted > size:
            self._replace(max(self._wanted, 2 * size))
        elif self._begin and self._wanted > size - self._begin:
            self._buffer[:held] = self._view[self._begin : self._end]
            self._begin, self._end = 0, held

    def _replace(self, size: int) -> None:
        buffer = bytearray(size)
        held = self._end - self._begin
        buffer[:held] = self._view[self._begin : self._end]
        self._buffer, self._view = buffer, memoryview(buffer)
        self._begin, self._end = 0, held

    def _next_frame(self) -> tuple[int, bytes] | None:
        begin, view = self._begin, self._view
        held = self._end - begin
        header = 2
        if held >= 1:
            flags = view[begin]
            if flags & _RESERVED or (flags & _COMMAND and flags & _MORE):
                raise ZmtpError(f"its messages cannot be read: a frame has the flags {flags:#x}")
            if flags & _LONG:
                header = 9
        if held < header:
            self._wanted = header
            return None
        size = int.from_bytes(view[begin + 1 : begin + 9], "big") if header == 9 else view[begin + 1]
        if size > MAX_FRAME_BYTES:
            raise ZmtpError(f"its messages cannot be read: a frame of {size} bytes")
        if held < header + size:
            self._wanted = header + size
            return None
        self._wanted = header
        self._begin = end = begin + header + size
        return flags, bytes(view[begin + header : end])

    def _introduce(self) -> None:
        """Read the peer's greeting and its READY as far as they have come."""
        if not self._is_greeted:
            held = bytes(self._view[self._begin : self._end])
            for index, expected in ((0, 0xFF), (9, 0x7F)):
                if len(held) > index and held[index] != expected:
                    raise ZmtpError("what connected does not speak ZMTP")
            if len(held) < len(_GREETING):
                return
            if held[10] < 3 or held[12:32] != _MECHANISM:
                raise ZmtpError("what connected speaks another ZMTP, or wants to authenticate")
            self._is_greeted = True
            self._begin += len(_GREETING)
        frame = self._next_frame()
        if frame is None:
            return
        flags, body = frame
        if not flags & _COMMAND:
            raise ZmtpError("what connected sent a message before it was ready")
        self._obey(body)
        if not self.is_ready:
            raise ZmtpError("what connected sent a command before it was ready")

    def _obey(self, body: bytes) -> None:
        name, rest = _split(body)
        if name == b"READY":
            kind = _properties(rest).get(b"socket-type")
            if kind != self._peer:
                raise ZmtpError(f"what connected is {kind!r}, not {self._peer!r}")
            self.is_ready = True
        elif name == b"ERROR":
            raise ZmtpError(f"what connected refuses us: {rest[1:]!r}")
        elif name == b"PING":
            answer = b"\x04PONG" + rest[2:]
            self._put(_header(_COMMAND, len(answer)) + answer)

    # Out.

    @property
    def has_unsent(self) -> bool:
        """Whether something waits until the socket is writable; then call flush()."""
        return bool(self._unsent)

    def send(self, messages: Iterable[Sequence[bytes]]) -> None:
        """Send messages, each of at least one frame; what the socket does not take is kept. Raises ConnectionError."""
        parts: list[bytes] = []
        for frames in messages:
            for frame in frames[:-1]:
                parts += (_header(_MORE, len(frame)), frame)
            parts += (_header(0, len(frames[-1])), frames[-1])
        self._put(b"".join(parts))

    def flush(self) -> None:
        """Send of what is left as much as the socket takes. Raises ConnectionError."""
        self._num_sent += self._try(memoryview(self._unsent)[self._num_sent :])
        if self._num_sent == len(self._unsent):
            self._unsent = bytearray()
            self._num_sent = 0
        elif self._num_sent > max(_KEPT_BYTES, len(self._unsent) // 2):
            del self._unsent[: self._num_sent]
            self._num_sent = 0

    def _put(self, data: bytes) -> None:
        if self._unsent:
            self._unsent += data
        elif (count := self._try(data)) < len(data):
            self._unsent += data[count:]

    def _try(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0


def _header(flags: int, size: int) -> bytes:
    if size < 256:
        return bytes((flags, size))
    return bytes((flags | _LONG,)) + size.to_bytes(8, "big")


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


def _split(body: bytes) -> tuple[bytes, bytes]:
    """Give a command's name and its data. Raises ZmtpError."""
    if not body or len(body) < 1 + body[0]:
        raise ZmtpError("its commands cannot be read")
    end = 1 + body[0]
    return body[1:end], body[end:]


def _properties(data: bytes) -> dict[bytes, bytes]:
    found, at = {}, 0
    while at < len(data):
        name = data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
        size = int.from_bytes(data[at : at + 4], "big")
        found[name.lower()] = data[at + 4 : at + 4 + size]
        at += 4 + size
    return found
