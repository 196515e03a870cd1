"""Did both arms say the same: equal tokens, where they part and how close the call was. Pure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jsonschema

from twinjet.compare.records import TokenChances
from twinjet.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Answer:
    """One output of one request. chances: one entry a token, or empty. reason: "stop" or "length"."""

    token_ids: tuple[int, ...]
    chances: tuple[TokenChances, ...] = ()
    reason: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class PairSameness:
    """Two answers to one request.

    first_difference: index of the first token that differs, None if the answers are equal. margin: logprob of A's token
    there minus that of B's token, by A's distribution, which is the difference of their logits (nats; small is a near
    tie), None if A did not report B's token. divergence: mean absolute difference of the chosen tokens' logprobs before
    the first difference, None if not reported.
    """

    num_equal: int
    num_compared: int
    first_difference: int | None
    margin: float | None
    divergence: float | None
    same_reason: bool


@dataclass(frozen=True, slots=True)
class Sameness:
    """Over all pairs. equal_tokens: share of tokens before the first difference, 0 to 1; nan without tokens.

    median_margin, largest_margin: of the first differences' absolute margins; median_place: of their places.
    """

    num_pairs: int
    num_equal_pairs: int
    equal_tokens: float
    same_reasons: int
    median_margin: float | None
    divergence: float | None
    largest_margin: float | None = None
    median_place: int | None = None


def compare_answers(a: Answer, b: Answer) -> PairSameness:
    """Hold two answers against each other. Tokens are counted by ids, never by chunks."""
    longest = max(len(a.token_ids), len(b.token_ids))
    shared = min(len(a.token_ids), len(b.token_ids))
    equal = next((i for i in range(shared) if a.token_ids[i] != b.token_ids[i]), shared)
    both = min(len(a.chances), len(b.chances), equal)
    gaps = [abs(a.chances[i].logprob - b.chances[i].logprob) for i in range(both)]
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
    places = sorted(pair.first_difference for pair in pairs if pair.first_difference is not None)
    divergences = [pair.divergence for pair in pairs if pair.divergence is not None]
    return Sameness(
        num_pairs=len(pairs),
        num_equal_pairs=sum(pair.first_difference is None for pair in pairs),
        equal_tokens=sum(pair.num_equal for pair in pairs) / compared if compared else math.nan,
        same_reasons=sum(pair.same_reason for pair in pairs),
        median_margin=margins[len(margins) // 2] if margins else None,
        divergence=math.fsum(divergences) / len(divergences) if divergences else None,
        largest_margin=margins[-1] if margins else None,
        median_place=places[len(places) // 2] if places else None,
    )


def reasons(answers: Sequence[Answer]) -> Mapping[str, int]:
    """Count why outputs ended."""
    return dict(sorted(Counter(answer.reason or "unknown" for answer in answers).items()))


class SchemaCheck:
    """Whether answers are valid by a JSON schema. Raises ConfigError for what is no schema."""

    def __init__(self, schema: str) -> None:
        try:
            value = json.loads(schema)
            kind = jsonschema.validators.validator_for(value, default=jsonschema.Draft202012Validator)
            kind.check_schema(value)
        except (ValueError, TypeError, jsonschema.SchemaError) as error:
            raise ConfigError(f"not a JSON schema: {getattr(error, 'message', error)}") from None
        self._validator = kind(value)

    def is_valid(self, text: str) -> bool:
        """Whether a text is JSON and fits."""
        try:
            value = json.loads(text)
        except ValueError:
            return False
        return bool(self._validator.is_valid(value))


def _margin(a: Answer, b: Answer, index: int) -> float | None:
    if index >= len(a.chances):
        return None
    entry = a.chances[index]
    rival = b.token_ids[index]
    found = next((logprob for token, logprob in entry.rivals if token == rival), None)
    return None if found is None else entry.logprob - found
