"""Takes the first gRPC message out of a body that comes in pieces."""

from __future__ import annotations

import zlib
from typing import Final

_HEAD: Final = 5


class FrameError(ValueError):
    """The body is not gRPC's, or of an encoding that is not read."""


class FrameReader:
    """The first message of a body.

    encoding: grpc-encoding of the request. max_bytes: of a message, as sent and decompressed; of a longer one the first
    so many are given.
    """

    def __init__(self, encoding: str, max_bytes: int) -> None:
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    @property
    def has_enough(self) -> bool:
        """Whether more bytes would change nothing."""
        buffer = self._buffer
        return len(buffer) >= _HEAD and len(buffer) - _HEAD >= min(self._size(), self._max_bytes)

    def add(self, piece: bytes) -> None:
        """Take the next piece of the body; what is too much is not kept."""
        room = _HEAD + self._max_bytes - len(self._buffer)
        if room > 0:
            self._buffer += piece[:room]

    def message(self) -> bytes:
        """Give the message, or the part of it that has come.

        Raises FrameError.
        """
        buffer = self._buffer
        if len(buffer) < _HEAD:
            raise FrameError("no whole frame has come")
        if buffer[0] > 1:
            raise FrameError(f"a frame cannot begin with byte {buffer[0]}")
        data = bytes(buffer[_HEAD : _HEAD + self._size()])
        return self._decompressed(data) if buffer[0] else data

    def _size(self) -> int:
        return int.from_bytes(self._buffer[1:_HEAD], "big")

    def _decompressed(self, data: bytes) -> bytes:
        if self._encoding not in ("gzip", "deflate"):
            raise FrameError(f"encoding {self._encoding[:40]!r} is not read")
        # gzip and zlib are told apart by their first bytes.
        reader = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        try:
            return reader.decompress(data, self._max_bytes)
        except zlib.error as error:
            raise FrameError(f"the message cannot be decompressed: {error}") from None
