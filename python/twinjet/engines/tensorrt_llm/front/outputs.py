"""From the engine's cumulative, mutable result to steps that never take anything back.

The engine yields one object again and again, whose token list grows and, when a stop token is stripped,
shrinks. So each output counts what it has taken. Ends by a token or by length are seen here, since they must be confirmed
before anyone hears of them; text, and ends by it, are the pump's, as for every engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinjet.engines.base import Finish, LogprobRow
from twinjet.engines.tensorrt_llm.worker.logits import LOGPROB_FLOOR
from twinjet.engines.tensorrt_llm.worker.reports import TokenReport
from twinjet.errors import RequestAborted, RequestFailed
from twinjet.request import EngineRequest


@dataclass(frozen=True, slots=True)
class News:
    """What has come of an output. logprobs: a row a token, or empty. finish: with its last tokens."""

    token_ids: list[int]
    logprobs: list[LogprobRow]
    finish: Finish | None


class OutputTracker:
    """One output of a request: tokens in, news of them and at last a Finish out."""

    def __init__(self, request: EngineRequest, index: int, eos_token_ids: frozenset[int]) -> None:
        sampling = request.sampling
        self.index = index
        self.finish: Finish | None = None
        self.num_tokens = 0
        self._eos = frozenset() if sampling.ignore_eos else eos_token_ids
        self._ends = self._eos | frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self._max_tokens = sampling.max_tokens
        self._tokens: list[int] = []
        self._logprobs: list[LogprobRow] = []
        self._may_tell_finish = False
        self._is_told = False

    def new_tokens(self, cumulative: Sequence[int]) -> list[int]:
        """Copy the tokens that were not taken yet; none if the list has shrunk."""
        return list(cumulative[self.num_tokens :])

    def feed(self, token_id: int, logprobs: LogprobRow | None) -> None:
        """Take one token. Does nothing once the output has its finish."""
        if self.finish is not None:
            return
        self._tokens.append(token_id)
        self.num_tokens += 1
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if self.num_tokens > self._min_tokens and token_id in self._ends:
            self.finish = Finish("stop", token_id, is_eos=token_id in self._eos)
        elif self.num_tokens >= self._max_tokens:
            self.finish = Finish("length")

    def engine_ended(self, finish_reason: str | None, stop_reason: int | str | None) -> None:
        """Take the engine's word that the output is over; does nothing if that is known already.

        Raises RequestFailed for an end that is no regular one, RequestAborted for "cancelled".
        """
        if self.finish is not None:
            return
        if finish_reason == "cancelled":
            raise RequestAborted("the engine cancelled the request")
        if finish_reason == "stop":
            self.finish = Finish("stop", stop_reason)
        elif finish_reason == "length":
            self.finish = Finish("length")
        else:
            raise RequestFailed(
                f"the engine ended the output with {finish_reason!r}",
                reason="ENGINE_TIMEOUT" if finish_reason == "timeout" else "ENGINE_ENDED_EARLY",
            )

    @property
    def tokens(self) -> list[int]:
        """What was not taken yet."""
        return list(self._tokens)

    @property
    def logprobs(self) -> list[LogprobRow]:
        """Of what was not taken yet."""
        return list(self._logprobs)

    def settle(self) -> None:
        """Let the finish be told: nothing can go wrong with this output any more."""
        self._may_tell_finish = True

    def take(self) -> News | None:
        """Give what has come since the last call, or None if nothing has.

        The last tokens wait, with the finish, for settle().
        """
        if self._is_told or (self.finish is not None and not self._may_tell_finish):
            return None
        if not self._tokens and self.finish is None:
            return None
        self._is_told = self.finish is not None
        news = News(self._tokens, self._logprobs, self.finish)
        self._tokens, self._logprobs = [], []
        return news


def report_row(report: TokenReport) -> LogprobRow:
    """Convert a report of our sampler."""
    ids, values = zip(*report.entries, strict=True)
    return ids, [max(LOGPROB_FLOOR, value) for value in values], report.rank


def engine_row(token_id: int, entry: Any, num_top: int) -> LogprobRow:
    """Convert one element of the engine's logprobs: {token id: object with logprob and rank}, or a float.

    Raises RequestFailed if the token itself is not among them.
    """
    if not isinstance(entry, Mapping):
        return [token_id], [max(LOGPROB_FLOOR, float(entry))], None
    if token_id not in entry:
        raise RequestFailed("the engine left out a token's logprob", reason="LOGPROBS_LOST")
    # Sorted by value, since ranks may be missing and the drawn token may stand before the best ones.
    best = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[0]))[:num_top]
    rows = [(token_id, entry[token_id]), *best]
    return (
        [token for token, _ in rows],
        [max(LOGPROB_FLOOR, value.logprob) for _, value in rows],
        entry[token_id].rank,
    )
