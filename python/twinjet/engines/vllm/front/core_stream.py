"""What has come of one output and is not fetched yet, merged; stands where AsyncLLM's collector would."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from twinjet.request import Sampling

FINISHES = (None, "stop", "length", "abort", "error")
"""By the decoder's number; see csrc/stream/step_outputs.h: EngineFinish."""


class Candidate(NamedTuple):
    """One entry of a position's log probabilities, as outputs.token_logprobs() reads it."""

    logprob: float
    rank: int


class CoreOutput:
    """A delta. Looks like vLLM's RequestOutput with its one CompletionOutput in the same object."""

    __slots__ = (
        "finish_reason", "logprobs", "num_cached_tokens", "prompt_logprobs", "stop_reason", "token_ids",
    )  # fmt: skip

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Candidate]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.num_cached_tokens: int | None = None
        self.prompt_logprobs: list[dict[int, Candidate] | None] | None = None

    @property
    def outputs(self) -> tuple[CoreOutput]:
        return (self,)


class CoreStream:
    """One output of a request while it runs. key: by which the engine core's rows are told apart."""

    __slots__ = (
        "_num_logprobs", "_num_prompt_logprobs", "_prompt", "key", "output", "ready", "request_id",
    )  # fmt: skip

    def __init__(self, key: int, request_id: str, sampling: Sampling, output_index: int) -> None:
        self.key = key
        self.request_id = request_id
        self.output: CoreOutput | None = None
        self.ready = asyncio.Event()
        self._num_logprobs = sampling.logprobs
        self._num_prompt_logprobs = sampling.prompt_logprobs if output_index == 0 else None
        self._prompt: CoreOutput | None = CoreOutput()

    def get_nowait(self) -> CoreOutput | None:
        """Give what has come; None if nothing has."""
        output, self.output = self.output, None
        if output is not None:
            self.ready.clear()
        return output

    def take(self, token_ids: list[int], rest: tuple[Any, ...] | None) -> bool:
        """Take one row of a step (see _core.CoreOutputs.rows); True if it ends the output."""
        output = self.output
        if rest is None and output is not None:
            output.token_ids += token_ids
            return False
        finish = cause = logprobs = None
        if rest is not None:
            number, cause, num_cached, logprobs, prompt_logprobs = rest
            finish = FINISHES[number]
            if self._prompt is not None:
                self._take_prompt(num_cached, prompt_logprobs)
            if not token_ids and finish is None:
                # Part of a long prompt's log probabilities; more follow.
                return False
        if output is None:
            # What is known of the prompt comes with the first tokens.
            self.output = output = self._prompt or CoreOutput()
            self._prompt = None
            self.ready.set()
        output.token_ids += token_ids
        if logprobs is not None and self._num_logprobs is not None:
            output.logprobs += _positions(logprobs, self._num_logprobs)
        output.finish_reason, output.stop_reason = finish, cause
        return finish is not None

    def _take_prompt(self, num_cached: int | None, rows: Sequence[Any] | None) -> None:
        assert self._prompt is not None
        if num_cached is not None and num_cached >= 0:
            self._prompt.num_cached_tokens = num_cached
        if rows is not None and self._num_prompt_logprobs is not None:
            known = self._prompt.prompt_logprobs or [None]
            self._prompt.prompt_logprobs = [*known, *_positions(rows, self._num_prompt_logprobs)]


def _positions(rows: Sequence[Any], most: int) -> list[dict[int, Candidate]]:
    """Make vLLM's mappings: the token in the sequence with its rank, then the best with theirs."""
    return [
        {token: Candidate(logprob, i or rank) for i, (token, logprob) in enumerate(candidates[: most + 1])}
        for candidates, rank in rows
    ]
