"""Protobuf's encoding by hand, for the few messages whose generated code would cost more than it saves."""

from __future__ import annotations

import struct


def varint(value: int) -> bytes:
    """Give a number, 0 or more, in protobuf's variable length."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: bytes) -> bytes:
    """Give a length-delimited field: bytes, text or a message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def number_field(number: int, value: int) -> bytes:
    """Give a field that is a number, a bool or an enum."""
    return varint(number << 3) + varint(value)


def double_field(number: int, value: float) -> bytes:
    """Give a field that is a double."""
    return varint(number << 3 | 1) + struct.pack("<d", value)
