"""The block hash as its specification reads, on hashlib and a plain SipHash. Slow; for tests."""

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence

MASK = 2**64 - 1


def _rotate(x: int, n: int) -> int:
    return (x << n | x >> 64 - n) & MASK


def siphash_2_4_128(key: bytes, message: bytes) -> bytes:
    """SipHash-2-4 with a 128-bit result; key has 16 bytes."""
    k0, k1 = struct.unpack("<QQ", key)
    v0, v1, v2, v3 = (
        k0 ^ 0x736F6D6570736575,
        k1 ^ 0x646F72616E646F6D ^ 0xEE,
        k0 ^ 0x6C7967656E657261,
        k1 ^ 0x7465646279746573,
    )

    def rounds(n: int) -> None:
        nonlocal v0, v1, v2, v3
        for _ in range(n):
            v0 = (v0 + v1) & MASK
            v1 = _rotate(v1, 13) ^ v0
            v0 = _rotate(v0, 32)
            v2 = (v2 + v3) & MASK
            v3 = _rotate(v3, 16) ^ v2
            v0 = (v0 + v3) & MASK
            v3 = _rotate(v3, 21) ^ v0
            v2 = (v2 + v1) & MASK
            v1 = _rotate(v1, 17) ^ v2
            v2 = _rotate(v2, 32)

    whole = len(message) // 8 * 8
    tail = message[whole:].ljust(7, b"\0") + bytes([len(message) & 0xFF])
    for word in (*struct.unpack(f"<{whole // 8}Q", message[:whole]), *struct.unpack("<Q", tail)):
        v3 ^= word
        rounds(2)
        v0 ^= word
    v2 ^= 0xEE
    rounds(4)
    low = v0 ^ v1 ^ v2 ^ v3
    v1 ^= 0xDD
    rounds(4)
    return struct.pack("<QQ", low, v0 ^ v1 ^ v2 ^ v3)


def _functions(algorithm: str, key: bytes) -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    if algorithm == "sha256":
        block_key = key + b"twinjet.kv.block".ljust(32, b"\0")
        root_key = key + b"twinjet.kv.root".ljust(32, b"\0")
        return (
            lambda message: hashlib.sha256(block_key + message).digest()[:16],
            lambda message: hashlib.sha256(root_key + message).digest()[:16],
        )
    return (
        lambda message: siphash_2_4_128(key[:16], message),
        lambda message: siphash_2_4_128(key[16:], message),
    )


def root(key: bytes, salt: bytes = b"", algorithm: str = "sha256") -> bytes:
    return _functions(algorithm, key)[1](b"\0" + salt)


def hash_blocks(
    key: bytes,
    block_size: int,
    tokens: Sequence[int],
    *,
    parent: bytes,
    extra_keys: Mapping[int, bytes] | None = None,
    algorithm: str = "sha256",
) -> list[bytes]:
    block_function, root_function = _functions(algorithm, key)
    hashes: list[bytes] = []
    for i in range(len(tokens) // block_size):
        if extra_keys and i in extra_keys:
            parent = root_function(b"\1" + parent + extra_keys[i])
        block = tokens[i * block_size : (i + 1) * block_size]
        parent = block_function(struct.pack(f"<{block_size}i", *block) + parent)
        hashes.append(parent)
    return hashes
