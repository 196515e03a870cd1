"""The prefix key: names a prompt's first blocks, so that a proxy which hashes a header keeps them at one replica.

Every server must give the same key for the same tokens, so it is hashed under no secret: a key tells whoever sees
it nothing but that two prompts begin alike, or begin as one that they know. The KV cache's own hashes are secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from twinjet import _core

PREFIX_KEY: Final = "twinjet-prefix-key"
"""The request header that a proxy hashes, and the initial response metadata that tells what to send there."""

KEY_BLOCK_TOKENS: Final = 16
KEY_BLOCKS: Final = 16
"""Only so many blocks count: a conversation that grows keeps its key, and one long enough to matter has them."""

_HASHER = _core.BlockHasher(KEY_BLOCK_TOKENS, key=b"twinjet prefix key, version 1\0\0\0")


def prefix_key(token_ids: Sequence[int], cache_salt: str = "", adapter: str = "") -> str:
    """Name a prompt's first 256 tokens in whole blocks of 16, with what keeps KV blocks apart.

    32 hexadecimal digits; "" for a prompt shorter than one block, of which nothing is cached.
    Raises ValueError if one of the tokens that count is outside 0 to 2**31 - 1.
    """
    num_blocks = min(len(token_ids) // KEY_BLOCK_TOKENS, KEY_BLOCKS)
    if num_blocks == 0:
        return ""
    salt = f"{len(adapter)}:{adapter}{cache_salt}".encode() if adapter or cache_salt else b""
    return _HASHER.hash_bytes(token_ids[: num_blocks * KEY_BLOCK_TOKENS], salt=salt)[-16:].hex()
