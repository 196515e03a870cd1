"""The native sampler's request objects, kept by vLLM's request id inside the engine's process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from twinjet.engines.vllm.fields import EXTRA_KEY
from twinjet.sampling import Request
from twinjet.sampling.bad_text import BadTextSettings, bad_text


def reason_for_stock(params: Any, prompt_token_ids: Sequence[int] | None) -> str:
    """Say why a request must be sampled by vLLM's own sampler, "" if ours covers it.

    params: vLLM's SamplingParams. A reason is a word for a counter.
    """
    extra = params.extra_args or {}
    if EXTRA_KEY not in extra:
        return "foreign_request"
    if prompt_token_ids is None:
        return "prompt_embeddings"
    if params.logprobs == -1:
        return "all_logprobs"
    if params.logprob_token_ids:
        return "logprobs_of_chosen_ids"
    if params.thinking_token_budget is not None:
        return "thinking_budget"
    if params.trace_decode_token_ids:
        return "trace_replay"
    return ""


def native_request(params: Any, vocab_size: int, prompt_token_ids: Sequence[int]) -> Request:
    """Make the native request of one output. params: vLLM's SamplingParams, made by params.py."""
    own = params.extra_args[EXTRA_KEY]
    words = own.get("bad_text")
    return Request(
        vocab_size,
        temperature=own["temperature"],
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=own["seed"],
        output_index=own["output_index"],
        position_offset=len(prompt_token_ids),
        # Long lists take their time, and nothing else asks for them.
        prompt_token_ids=prompt_token_ids if params.repetition_penalty != 1.0 else (),
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids,
        bad_text=bad_text(BadTextSettings(words[0], tuple(words[1]), words[2])) if words else None,
        min_tokens=params.min_tokens,
        stop_token_ids=(
            [token for token in sorted(params.all_stop_token_ids) if token >= 0] if params.min_tokens else ()
        ),
    )


class RequestTable:
    """Native requests of the sequences that run, or a reason why one has none."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._entries: dict[str, Request | str] = {}

    def get(
        self, request_id: str, params: Any, prompt_token_ids: Sequence[int] | None, output: Sequence[int]
    ) -> Request | str:
        """Give a sequence's native request, brought up to its output so far, or why it has none.

        The output differs from what the native request has seen after a step of vLLM's own sampler and
        after a token that the scheduler threw away.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            reason = reason_for_stock(params, prompt_token_ids)
            try:
                entry = reason or native_request(params, self._vocab_size, prompt_token_ids or ())
            except ValueError:
                # The front end checks by the same bounds. Should it miss a value, one request is drawn by
                # vLLM's sampler; raised here, it would end the engine with all its requests.
                entry = "refused_parameters"
            self._entries[request_id] = entry
        if isinstance(entry, str):
            return entry
        known = entry.num_output_tokens
        if known > len(output):
            entry.truncate(len(output))
        elif known < len(output):
            if min(output[known:]) < 0:
                # Asynchronous scheduling: vLLM's own sampler drew them and the host does not know them yet.
                self._entries[request_id] = "tokens_not_known"
                return "tokens_not_known"
            for token in output[known:]:
                entry.append(token)
        return entry

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._entries.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._entries)
