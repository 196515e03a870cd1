"""Translate vLLM's RequestOutput into engine events. Pure; needs no vLLM at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twinjet.engines.base import Finish, Logprob, OutputEvent, PromptEvent, TokenLogprobs
from twinjet.engines.vllm.fields import NO_TOKEN
from twinjet.errors import NoAdmissibleToken, RequestFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def token_logprobs(token_id: int, position: Mapping[int, Any], most: int) -> TokenLogprobs:
    """Translate one position. vLLM gives the chosen token and the best `most`, in one mapping.

    position: token id to vLLM's Logprob (logprob, rank from 1, decoded_token).
    """
    made = {
        candidate: Logprob(candidate, float(value.logprob), value.rank, value.decoded_token or "")
        for candidate, value in position.items()
    }
    best = sorted(made.values(), key=lambda entry: (entry.rank or 0, entry.token_id))
    return TokenLogprobs(chosen=made[token_id], top=tuple(best[:most]))


def prompt_event(output: Any, prompt_token_ids: Sequence[int], prompt_logprobs: int | None) -> PromptEvent:
    """Translate what the first RequestOutput says of the prompt."""
    logprobs = None
    if prompt_logprobs is not None:
        # The first token has no predecessor, so vLLM's first entry is None.
        logprobs = tuple(
            token_logprobs(token_id, position, prompt_logprobs)
            for token_id, position in zip(
                list(prompt_token_ids)[1:], list(output.prompt_logprobs or ())[1:], strict=True
            )
        )
    return PromptEvent(output.num_cached_tokens, logprobs)


def output_event(
    completion: Any, output_index: int, logprobs: int | None, eos_token_ids: frozenset[int]
) -> OutputEvent:
    """Translate one delta of one output."""
    token_ids = list(completion.token_ids)
    entries: tuple[TokenLogprobs, ...] = ()
    if logprobs is not None and completion.logprobs:
        entries = tuple(
            token_logprobs(token_id, position, logprobs)
            for token_id, position in zip(token_ids, completion.logprobs, strict=True)
        )
    finish = None
    if completion.finish_reason is not None:
        finish = _finish(completion.finish_reason, completion.stop_reason, token_ids, eos_token_ids)
    return OutputEvent(output_index, completion.text, token_ids, entries, finish)


def _finish(
    reason: str, stop_reason: int | str | None, token_ids: Sequence[int], eos_token_ids: frozenset[int]
) -> Finish:
    if reason == "length":
        return Finish("length")
    if isinstance(stop_reason, str):
        return Finish("stop", stop_reason)
    # vLLM names no stop reason for the model's first end token.
    last = token_ids[-1] if token_ids else None
    stopped_by = stop_reason if stop_reason is not None else last
    if stopped_by in eos_token_ids:
        return Finish("stop", stopped_by, is_eos=True)
    return Finish("stop", stop_reason)


def failure(completion: Any, *, is_constrained: bool) -> Exception | None:
    """Say why this output cannot be delivered, or None if it can."""
    reason = completion.finish_reason
    # A grammar never rejects what was drawn under its own mask, unless nothing could be drawn.
    is_rejected = reason == "error" and is_constrained and bool(completion.token_ids)
    if completion.stop_reason == NO_TOKEN or is_rejected:
        return NoAdmissibleToken()
    if reason in (None, "stop", "length"):
        return None
    return RequestFailed("the engine could not finish the request", reason="ENGINE_ERROR")
