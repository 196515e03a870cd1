"""Native block hashes for vLLM's requests, in place of its own hasher.

vLLM makes one hasher for each engine core, in `EngineCore.__init__`, right after it made the scheduler,
and hands it to every request. `install()` is called while the scheduler is made: it replaces the
factory for that one call, so the engine whose scheduler is native gets the native hasher, and the
next engine of the process is asked anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cbor2
import vllm.v1.engine.core as engine_core
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from twinjet._core import BlockHasher


class RequestHasher:
    """Hashes the full blocks of a request that have no hash yet. Immutable: any thread may call it."""

    def __init__(self, hasher: BlockHasher) -> None:
        self._hasher = hasher
        self._block_size = hasher.block_size

    def __call__(self, request: Request) -> list[bytes]:
        tokens = request._all_token_ids
        known = request.block_hashes
        start = len(known) * self._block_size
        if start + self._block_size > len(tokens):
            return []
        if request.lora_request is not None or request.mm_features or request.prompt_embeds is not None:
            return self._hash_with_extra_keys(request, start)
        if known:
            return self._hasher.hash_blocks(tokens, parent=known[-1], start=start)
        return self._hasher.hash_blocks(tokens, salt=_salt(request))

    def _hash_with_extra_keys(self, request: Request, start: int) -> list[bytes]:
        """As above, with what else a block depends on: adapter, multi-modal items, embeddings."""
        tokens = request._all_token_ids
        known = request.block_hashes
        extra_keys: dict[int, bytes] = {}
        mm_index = 0
        for index in range((len(tokens) - start) // self._block_size):
            block_start = start + index * self._block_size
            keys, mm_index = kv_cache_utils.generate_block_hash_extra_keys(
                request, block_start, block_start + self._block_size, mm_index
            )
            if keys is not None:
                extra_keys[index] = cbor2.dumps(keys, canonical=True)
        if known:
            return self._hasher.hash_blocks(tokens, parent=known[-1], extra_keys=extra_keys, start=start)
        return self._hasher.hash_blocks(tokens, salt=_salt(request), extra_keys=extra_keys)


def _salt(request: Request) -> bytes:
    return request.cache_salt.encode() if request.cache_salt else b""


def install(hasher: RequestHasher) -> Callable[[], None]:
    """Make the next engine core of this process take `hasher`. Returns a call that undoes it.

    For use while that engine core makes its scheduler, with prefix caching on.
    """
    original = engine_core.get_request_block_hasher

    def take_once(hash_block_size: int, caching_hash_fn: Callable[[Any], bytes]) -> RequestHasher:
        undo()
        return hasher

    def undo() -> None:
        if engine_core.get_request_block_hasher is take_once:
            engine_core.get_request_block_hasher = original

    engine_core.get_request_block_hasher = take_once
    return undo
