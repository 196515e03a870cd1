"""Translate vLLM's RequestOutput into engine events. Pure; needs no vLLM at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from twinjet.engines.base import Logprob, OutputEvent, PromptEvent, TokenLogprobs
from twinjet.engines.text import finish_of
from twinjet.engines.vllm.fields import NO_TOKEN
from twinjet.errors import EngineDied, NoAdmissibleToken, RequestFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from twinjet._core import Output

    TokenText = Callable[[int], str]

TOLD_TO_END = "it was told to end"


def token_logprobs(
    token_id: int, position: Mapping[int, Any], most: int, token_text: TokenText
) -> TokenLogprobs:
    """Translate one position. vLLM gives the chosen token and the best `most`, in one mapping.

    position: token id to vLLM's Logprob (logprob, rank from 1).
    """
    made = {
        candidate: Logprob(candidate, float(value.logprob), value.rank, token_text(candidate))
        for candidate, value in position.items()
    }
    best = sorted(made.values(), key=lambda entry: (entry.rank or 0, entry.token_id))
    return TokenLogprobs(chosen=made[token_id], top=tuple(best[:most]))


def prompt_event(
    output: Any, prompt_token_ids: Sequence[int], prompt_logprobs: int | None, token_text: TokenText
) -> PromptEvent:
    """Translate what the first RequestOutput says of the prompt."""
    logprobs = None
    if prompt_logprobs is not None:
        # The first token has no predecessor, so vLLM's first entry is None.
        logprobs = tuple(
            token_logprobs(token_id, position, prompt_logprobs, token_text)
            for token_id, position in zip(
                list(prompt_token_ids)[1:], list(output.prompt_logprobs or ())[1:], strict=True
            )
        )
    return PromptEvent(output.num_cached_tokens, logprobs)


def output_event(
    completion: Any, output: Output, output_index: int, logprobs: int | None, token_text: TokenText
) -> OutputEvent:
    """Translate one delta of one output; `output` makes its text and decides its end, perhaps before vLLM."""
    reason = completion.finish_reason
    token_ids = list(completion.token_ids)
    ended_by = reason if reason in ("stop", "length") else None
    num_taken, text = output.take(token_ids, ended_by, completion.stop_reason)
    del token_ids[num_taken:]
    entries: tuple[TokenLogprobs, ...] = ()
    if logprobs is not None and completion.logprobs:
        entries = tuple(
            token_logprobs(token_id, position, logprobs, token_text)
            for token_id, position in zip(token_ids, completion.logprobs, strict=False)
        )
    return OutputEvent(output_index, text, token_ids, entries, finish_of(output))


def failure(
    reason: Literal["no_token", "error", "abort"], *, is_constrained: bool, has_new_tokens: bool
) -> Exception:
    """Say why an output that ended irregularly cannot be delivered.

    reason: no_token is NO_TOKEN as the stop reason, the others are vLLM's own. has_new_tokens: its last delta
    has some.
    """
    if reason == "abort":
        # Where we did not ask for it, the engine core got a signal to end.
        return EngineDied(f"the engine died: {TOLD_TO_END}")
    # A grammar never rejects what was drawn under its own mask, unless nothing could be drawn.
    if reason == "no_token" or (reason == "error" and is_constrained and has_new_tokens):
        return NoAdmissibleToken()
    return RequestFailed("the engine could not finish the request", reason="ENGINE_ERROR")


def failure_of(completion: Any, *, is_constrained: bool) -> Exception | None:
    """Say why vLLM's CompletionOutput cannot be delivered, or None if it can."""
    reason = completion.finish_reason
    if completion.stop_reason == NO_TOKEN:
        reason = "no_token"
    elif reason in (None, "stop", "length"):
        return None
    return failure(reason, is_constrained=is_constrained, has_new_tokens=bool(completion.token_ids))
