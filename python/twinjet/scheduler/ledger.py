"""KV ledger: which blocks the engine's running requests hold, as far as can be known from outside.

Reads requests for the native ledger (csrc/sched/kv_ledger.h says what it accounts for, and what it cannot
see); tests/models/ledger_model.py says the same slowly.
"""

from __future__ import annotations

from twinjet import _core
from twinjet.request import EngineRequest


class KvLedger(_core.KvLedger):
    """Blocks of one engine."""

    def hash(self, request: EngineRequest) -> bytes:
        """Block hashes of the prompt, for find_cached() and hold(); empty without a prefix cache."""
        salt = _salt(request) if request.cache_salt or request.adapter else b""
        return self.hash_tokens(request.prompt_token_ids, salt)


def _salt(request: EngineRequest) -> bytes:
    """What keeps prefixes apart in the engine: the adapter and the salt, unambiguous when joined."""
    if not request.adapter:
        return request.cache_salt.encode()
    adapter = request.adapter.encode()
    return len(adapter).to_bytes(4, "big") + b"\0" + adapter + request.cache_salt.encode()
