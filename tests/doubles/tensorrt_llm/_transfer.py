"""Stands for the transceivers of all engines of a machine: blocks that a context engine holds until they are fetched.

A generation engine believes what it is told and waits for it in its own loop, without limit.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from tensorrt_llm import _contract
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.utils import RequestError

_addresses = itertools.count(1)


class Transceiver:
    """One engine's. held: prompts by request id, whose blocks nobody has fetched."""

    by_address: dict[str, Transceiver] = {}  # noqa: RUF012 - the network, which all engines see

    def __init__(self) -> None:
        self.address = f"tcp://127.0.0.1:{next(_addresses)}"
        self.held: dict[int, list[int]] = {}
        self.by_address[self.address] = self

    def hold(self, request_id: int, prompt: list[int], first_token: int) -> Any:
        """Keep blocks for whoever comes with what this gives."""
        self.held[request_id] = prompt
        newer = {"ctx_dp_rank": 0, "ctx_info_endpoint": self.address} if _contract.VERSION >= "1.3" else {}
        return DisaggregatedParams(
            request_type="context_only",
            first_gen_tokens=[first_token],
            ctx_request_id=request_id,
            opaque_state=json.dumps({"address": self.address}).encode(),
            **newer,
        )

    @classmethod
    def fetch(cls, params: Any, prompt: list[int]) -> bool:
        """Take blocks over; False while there are none, which may be for ever."""
        try:
            address = json.loads(params.opaque_state)["address"]
        except (ValueError, KeyError, TypeError):
            raise RequestError("std::bad_alloc") from None
        found = cls.by_address.get(address)
        if found is None or found.held.get(params.ctx_request_id) != prompt:
            return False
        del found.held[params.ctx_request_id]
        return True


def refusal(args: Any, params: Any) -> str | None:
    """Say why an engine with these arguments refuses a request, if it does."""
    if params.request_type == "context_and_generation":
        return None
    if args.cache_transceiver_config is None:
        return "kv_cache_transceiver is disabled, please set 'cache_transceiver_config'"
    overlaps = not args.disable_overlap_scheduler
    if params.request_type == "context_only" and overlaps and _contract.has("context_only_needs_no_overlap"):
        return "Context only requests are not supported in pytorch backend when overlap is enabled."
    return None
