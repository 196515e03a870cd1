"""Did both arms say the same: equal tokens, where they part and how close the call was. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from twinjet.engines.base import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Answer:
    """One output of one request. logprobs: one entry a token, or empty. reason: "stop" or "length"."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PairSameness:
    """Two answers to one request.

    first_difference: index of the first token that differs, None if the answers are equal. margin: logprob of A's token
    there minus that of B's token, by A's distribution (nats; small is a near tie), None if A did not report B's token.
    divergence: mean absolute difference of the chosen tokens' logprobs before the first difference, None if not reported.
    """

    num_equal: int
    num_compared: int
    first_difference: int | None
    margin: float | None
    divergence: float | None
    same_reason: bool


@dataclass(frozen=True, slots=True)
class Sameness:
    """Over all pairs. equal_tokens: share of tokens before the first difference, 0 to 1; nan without tokens."""

    num_pairs: int
    num_equal_pairs: int
    equal_tokens: float
    same_reasons: int
    median_margin: float | None
    divergence: float | None


def compare_answers(a: Answer, b: Answer) -> PairSameness:
    """Hold two answers against each other. Tokens are counted by ids, never by chunks."""
    longest = max(len(a.token_ids), len(b.token_ids))
    shared = min(len(a.token_ids), len(b.token_ids))
    equal = next((i for i in range(shared) if a.token_ids[i] != b.token_ids[i]), shared)
    both = min(len(a.logprobs), len(b.logprobs), equal)
    gaps = [abs(a.logprobs[i].chosen.logprob - b.logprobs[i].chosen.logprob) for i in range(both)]
    return PairSameness(
        num_equal=equal,
        num_compared=longest,
        first_difference=None if equal == longest else equal,
        margin=_margin(a, b, equal) if equal < shared else None,
        divergence=math.fsum(gaps) / len(gaps) if gaps else None,
        same_reason=a.reason == b.reason,
    )


def summarize(pairs: Sequence[PairSameness]) -> Sameness:
    """Sum up pairs."""
    compared = sum(pair.num_compared for pair in pairs)
    margins = sorted(abs(pair.margin) for pair in pairs if pair.margin is not None)
    divergences = [pair.divergence for pair in pairs if pair.divergence is not None]
    return Sameness(
        num_pairs=len(pairs),
        num_equal_pairs=sum(pair.first_difference is None for pair in pairs),
        equal_tokens=sum(pair.num_equal for pair in pairs) / compared if compared else math.nan,
        same_reasons=sum(pair.same_reason for pair in pairs),
        median_margin=margins[len(margins) // 2] if margins else None,
        divergence=math.fsum(divergences) / len(divergences) if divergences else None,
    )


def _margin(a: Answer, b: Answer, index: int) -> float | None:
    if index >= len(a.logprobs):
        return None
    entry = a.logprobs[index]
    rival = b.token_ids[index]
    found = next((top.logprob for top in entry.top if top.token_id == rival), None)
    return None if found is None else entry.chosen.logprob - found
