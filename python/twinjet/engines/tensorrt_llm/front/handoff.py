"""What a prefill hands to the engine that decodes, sealed on its way through the client.

The engine believes whatever it is told here: it connects to the address in it, and waits in its own loop for blocks that nobody
sends. So nothing reaches it that a server with the same key has not sealed, for this very request, lately and for the first time.
Sealed is not secret: a client can read what is in it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from twinjet.engines.base import LogprobRow
from twinjet.errors import ConfigError, InvalidRequest
from twinjet.request import EngineRequest

FIELD = "options.handoff"
MIN_KEY_BYTES = 32
_VERSION = 1
_TAG_BYTES = 32
_PROCESS_KEY = secrets.token_bytes(MIN_KEY_BYTES)
"""Without a key of the user's: handoffs are of use between the deployments of one server."""

_CARRIED = (
    "first_gen_tokens",
    "ctx_request_id",
    "draft_tokens",
    "disagg_request_id",
    "ctx_dp_rank",
    "ctx_info_endpoint",
)
"""Fields of DisaggregatedParams that go along as they are; opaque_state is bytes. What newer versions add for pictures
or for another order of the two phases does not."""


def read_key(path: Path | None) -> bytes:
    """Read the key that servers share, or give this process's own. Raises ConfigError."""
    if path is None:
        return _PROCESS_KEY
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"options.twinjet.handoff_key_file: {error}") from None
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"options.twinjet.handoff_key_file: {len(key)} bytes; at least {MIN_KEY_BYTES} are needed"
        )
    return key


@dataclass(frozen=True, slots=True)
class Handoff:
    """params: fields of DisaggregatedParams. first_tokens: the output so far. logprobs: of these, if asked for."""

    params: Mapping[str, Any]
    first_tokens: tuple[int, ...]
    logprobs: Sequence[LogprobRow]


def carried(params: Any) -> dict[str, Any] | None:
    """Give what of an engine's DisaggregatedParams has to go along; None if it says nothing of blocks to fetch."""
    if params is None or getattr(params, "ctx_request_id", None) is None:
        return None
    state = getattr(params, "opaque_state", None)
    told = {name: getattr(params, name, None) for name in _CARRIED}
    if not told["first_gen_tokens"] or (state is None and told["ctx_info_endpoint"] is None):
        return None
    told["opaque_state"] = None if state is None else base64.b64encode(state).decode()
    return {name: value for name, value in told.items() if value is not None}


class Handoffs:
    """Seals and opens. lifetime_s: how long a handoff is of use. clock: seconds that all servers agree on."""

    def __init__(self, key: bytes, lifetime_s: float, *, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._used: dict[str, float] = {}

    def seal(
        self, request: EngineRequest, params: Mapping[str, Any], logprobs: Sequence[LogprobRow]
    ) -> bytes:
        """Make the state that a client carries. params: as carried() gives them."""
        body = {
            "version": _VERSION,
            "id": secrets.token_hex(16),
            "expires": self._clock() + self._lifetime_s,
            "request": _digest(request),
            "params": dict(params),
            "logprobs": [[list(ids), list(values), rank] for ids, values, rank in logprobs],
        }
        payload = json.dumps(body, separators=(",", ":")).encode()
        return self._tag(payload) + payload

    def open(self, request: EngineRequest) -> Handoff:
        """Open a request's handoff and spend it. Raises InvalidRequest saying why it is of no use."""
        tag, payload = request.handoff[:_TAG_BYTES], request.handoff[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(payload)):
            raise InvalidRequest.of(
                FIELD, "was not made by this server, nor by one with the same handoff_key_file"
            )
        body = json.loads(payload)
        if body["version"] != _VERSION:
            raise InvalidRequest.of(FIELD, f"is of version {body['version']}; this server takes {_VERSION}")
        now = self._clock()
        if body["expires"] <= now:
            raise InvalidRequest.of(FIELD, f"is older than {self._lifetime_s:g} s; prefill again")
        if body["request"] != _digest(request):
            raise InvalidRequest.of(
                FIELD,
                "belongs to another request; prompt, sampling, seed, adapter and cache_salt must be the prefill's",
            )
        self._spend(body["id"], body["expires"], now)
        params = dict(body["params"])
        if "opaque_state" in params:
            params["opaque_state"] = base64.b64decode(params["opaque_state"])
        rows = [(ids, values, rank) for ids, values, rank in body["logprobs"]]
        return Handoff(params, tuple(params["first_gen_tokens"]), rows)

    def _spend(self, handoff_id: str, expires: float, now: float) -> None:
        # Oldest first, if not to the second: what is over stays a little longer at most.
        while self._used and next(iter(self._used.values())) <= now:
            del self._used[next(iter(self._used))]
        if handoff_id in self._used:
            raise InvalidRequest.of(FIELD, "has been used; prefill again")
        self._used[handoff_id] = expires

    def _tag(self, payload: bytes) -> bytes:
        return hmac.digest(self._key, b"twinjet handoff\0" + payload, "sha256")


def _digest(request: EngineRequest) -> str:
    """Tell requests apart whose first token or blocks may differ."""
    sampling = {field.name: getattr(request.sampling, field.name) for field in fields(request.sampling)}
    sampling["logit_bias"] = sorted(request.sampling.logit_bias.items())
    constraint = request.sampling.constraint
    sampling["constraint"] = None if constraint is None else asdict(constraint)
    # The prefill's alone: they come with it.
    del sampling["prompt_logprobs"]
    what = [list(request.prompt_token_ids), sampling, request.adapter, request.cache_salt]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
