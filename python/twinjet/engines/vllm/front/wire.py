"""Requests as vLLM's engine core reads them: msgpack of EngineCoreRequest and SamplingParams. No vLLM.

What AsyncLLM's input processing does to the parameters on the way is done here: the model's end tokens, what
greedy sampling ignores. tests/engines/vllm/test_wire.py holds the result against
vLLM's own for every field; compat.py's fingerprint stands for the order of the fields.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.fields import NO_TOKEN
from twinjet.engines.vllm.front.link import Adapter
from twinjet.errors import InvalidRequest
from twinjet.request import GREEDY_BELOW

ADD = b"\x00"
ABORT = b"\x01"
UTILITY = b"\x03"


_DELTA = 1
_STRUCTURED_FIELDS = {
    "json": None, "regex": None, "choice": None, "grammar": None, "json_object": None,
    "disable_any_whitespace": False, "disable_additional_properties": False, "whitespace_pattern": None,
    "structural_tag": None, "_backend": None, "_backend_was_auto": False,
}  # fmt: skip

_encode = msgspec.msgpack.Encoder().encode


def encode(value: Any) -> bytes:
    """Encode what holds nothing but plain values."""
    return _encode(value)


def add_request(
    request_id: str,
    external_id: str,
    prompt_token_ids: Sequence[int],
    params: dict[str, Any],
    *,
    adapter: Adapter | None,
    cache_salt: str,
    priority: int,
) -> bytes:
    """Encode an EngineCoreRequest. params: from core_params(); priority: lower first, as vLLM has it."""
    return _encode(
        (
            request_id, prompt_token_ids, None, params, None, time.time(), adapter_fields(adapter),
            cache_salt or None, None, None, None, 0, 0, priority, None, False, external_id, None, None, False,
            None, None,
        )
    )  # fmt: skip


def adapter_fields(adapter: Adapter | None) -> tuple[Any, ...] | None:
    """Give vLLM's LoRARequest."""
    return None if adapter is None else (adapter.name, adapter.number, adapter.path, None, False, False)


def core_params(fields: dict[str, Any], facts: Facts, *, native: bool) -> dict[str, Any]:
    """Give SamplingParams as it leaves AsyncLLM.

    fields: from params.sampling_fields(); a grammar is a GrammarNote.
    Raises InvalidRequest for min_tokens above max_tokens.
    """
    if fields["min_tokens"] > fields["max_tokens"]:
        raise InvalidRequest.of(
            "sampling.min_tokens", f"{fields['min_tokens']} is above max_tokens, {fields['max_tokens']}"
        )
    params = {name: value for name, value in fields.items() if value is not None and name != "n"}
    params["stop_token_ids"] = stops = list(dict.fromkeys(fields["stop_token_ids"]))
    params["bad_words"] = []
    if fields["temperature"] < GREEDY_BELOW:
        params |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    params |= {
        "output_kind": _DELTA,
        "skip_clone": True,
        "skip_reading_prefix_cache": fields["prompt_logprobs"] is not None,
        "watermarking": False,
    }
    structured = fields["structured_outputs"]
    if structured is not None:
        params["structured_outputs"] = _STRUCTURED_FIELDS | structured
    # vLLM's min-tokens rule masks them all, and NO_TOKEN is none of them.
    params["_all_stop_token_ids"] = set(stops)
    if native and structured is None:
        # Grammars get the stop tokens and refuse it; there, a row without a token ends by a token that the
        # grammar rejects.
        stops.append(NO_TOKEN)
    _add_end_tokens(params, facts)
    return params


def _add_end_tokens(params: dict[str, Any], facts: Facts) -> None:
    others = [token for token in facts.generation_eos if token != facts.eos]
    params["_all_stop_token_ids"].update(facts.eos_token_ids)
    if params["ignore_eos"]:
        return
    if facts.eos is not None:
        params["_eos_token_id"] = facts.eos
    params["stop_token_ids"] = list(dict.fromkeys(others + params["stop_token_ids"]))
