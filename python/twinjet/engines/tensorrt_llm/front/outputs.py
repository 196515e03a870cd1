"""From the engine's cumulative, mutable result to deltas that never take anything back.

The engine yields one object again and again, whose token list grows and, when a stop token is stripped,
shrinks. So each output counts what it has taken. Ends are decided here, from the tokens and the text, by the
same rules for every engine; the engine's own finish reason serves where it ends an output earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twinjet.engines.base import Finish, Logprob, OutputEvent, Tokenizer, TokenLogprobs
from twinjet.engines.tensorrt_llm.worker.logits import LOGPROB_FLOOR
from twinjet.engines.tensorrt_llm.worker.reports import TokenReport
from twinjet.engines.text import finish_of, make_output
from twinjet.errors import RequestAborted, RequestFailed
from twinjet.request import EngineRequest


class OutputTracker:
    """One output of a request: tokens in, deltas and at last a Finish out."""

    def __init__(
        self, request: EngineRequest, index: int, tokenizer: Tokenizer, eos_token_ids: frozenset[int]
    ) -> None:
        self.index = index
        self.finish: Finish | None = None
        self.num_tokens = 0
        self._output = make_output(tokenizer.vocabulary, request.sampling, eos_token_ids)
        self._text = ""
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._may_tell_finish = False
        self._is_told = False

    def new_tokens(self, cumulative: Sequence[int]) -> list[int]:
        """Copy the tokens that were not taken yet; none if the list has shrunk."""
        return list(cumulative[self.num_tokens :])

    def feed(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Take one token. Does nothing once the output has its finish."""
        if self.finish is not None:
            return
        self._tokens.append(token_id)
        self.num_tokens += 1
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._text += self._output.take((token_id,))[1]
        self.finish = finish_of(self._output)

    def engine_ended(self, finish_reason: str | None, stop_reason: int | str | None) -> None:
        """Take the engine's word that the output is over; does nothing if that is known already.

        Raises RequestFailed for an end that is no regular one, RequestAborted for "cancelled".
        """
        if self.finish is not None:
            return
        if finish_reason == "cancelled":
            raise RequestAborted("the engine cancelled the request")
        if finish_reason not in ("stop", "length"):
            raise RequestFailed(
                f"the engine ended the output with {finish_reason!r}",
                reason="ENGINE_TIMEOUT" if finish_reason == "timeout" else "ENGINE_ENDED_EARLY",
            )
        self._text += self._output.take((), finish_reason, stop_reason)[1]
        self.finish = finish_of(self._output)

    def settle(self) -> None:
        """Let the finish be told: nothing can go wrong with this output any more."""
        self._may_tell_finish = True

    def take(self) -> OutputEvent | None:
        """Give what has come since the last call, or None if nothing has.

        The last tokens wait, with the finish, for settle().
        """
        if self._is_told or (self.finish is not None and not self._may_tell_finish):
            return None
        if not self._tokens and not self._text and self.finish is None:
            return None
        self._is_told = self.finish is not None
        event = OutputEvent(self.index, self._text, self._tokens, self._logprobs, self.finish)
        self._text, self._tokens, self._logprobs = "", [], []
        return event


class LogprobFormatter:
    """Makes contract logprobs from ours and from the engine's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_text = tokenizer.vocabulary.token_text

    def from_report(self, report: TokenReport) -> TokenLogprobs:
        """Convert a report of our sampler."""
        (_, chosen), *top = report.entries
        return TokenLogprobs(
            self._entry(report.token_id, chosen, report.rank),
            tuple(self._entry(t, value, rank) for rank, (t, value) in enumerate(top, start=1)),
        )

    def from_engine(self, token_id: int, entry: Any, num_top: int) -> TokenLogprobs:
        """Convert one element of the engine's logprobs: {token id: object with logprob and rank}, or a float.

        Raises RequestFailed if the token itself is not among them.
        """
        if not isinstance(entry, Mapping):
            return TokenLogprobs(self._entry(token_id, float(entry), None), ())
        if token_id not in entry:
            raise RequestFailed("the engine left out a token's logprob", reason="LOGPROBS_LOST")
        # Sorted by value, since ranks may be missing and the drawn token may stand before the best ones.
        best = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[0]))[:num_top]
        chosen = entry[token_id]
        return TokenLogprobs(
            self._entry(token_id, chosen.logprob, chosen.rank),
            tuple(
                self._entry(t, value.logprob, value.rank or rank)
                for rank, (t, value) in enumerate(best, start=1)
            ),
        )

    def _entry(self, token_id: int, logprob: float, rank: int | None) -> Logprob:
        return Logprob(token_id, max(LOGPROB_FLOOR, logprob), rank, self._token_text(token_id))
