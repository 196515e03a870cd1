"""Cumulative results to steps: nothing twice, nothing taken back, ends by token as for every engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinjet.engines.base import Finish
from twinjet.engines.fake import EOS
from twinjet.engines.tensorrt_llm.front.outputs import OutputTracker, engine_row, report_row
from twinjet.engines.tensorrt_llm.worker.reports import TokenReport
from twinjet.errors import RequestAborted, RequestFailed
from twinjet.request import EngineRequest, Sampling

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": {}, "seed": 1, "n": 1, "max_tokens": 100,
    "min_tokens": 0, "stop": (), "stop_token_ids": (), "include_stop": False, "ignore_eos": False,
    "bad_words": (), "allowed_token_ids": (), "logprobs": None, "prompt_logprobs": None,
    "skip_special_tokens": True, "constraint": None,
}  # fmt: skip


def tracker(**sampling: Any) -> OutputTracker:
    request = EngineRequest(
        request_id="r", prompt_token_ids=(257, 104), sampling=Sampling(**(NEUTRAL | sampling))
    )
    return OutputTracker(request, 0, frozenset({EOS}))


def feed(output: OutputTracker, text: str) -> None:
    for byte in text.encode():
        output.feed(byte, None)


@given(st.lists(st.integers(0, 255), max_size=40), st.lists(st.integers(1, 5), max_size=60))
def test_pieces_join_to_the_tokens(tokens: list[int], sizes: list[int]) -> None:
    output = tracker(max_tokens=1000)
    left, taken = list(tokens), []
    for size in [*sizes, len(left)]:
        for token in left[:size]:
            output.feed(token, None)
        del left[:size]
        if (news := output.take()) is not None:
            taken += news.token_ids
    output.engine_ended("length", None)
    output.settle()
    last = output.take()
    assert last is not None
    assert taken + last.token_ids == tokens and last.finish == Finish("length")


def test_a_list_that_shrank_gives_nothing_and_loses_nothing() -> None:
    output = tracker()
    feed(output, "abc")
    assert output.new_tokens([97, 98]) == []
    assert output.new_tokens([97, 98, 99, 100]) == [100]


def test_new_tokens_are_a_copy() -> None:
    cumulative = [1, 2]
    new = tracker().new_tokens(cumulative)
    cumulative.append(3)
    assert new == [1, 2]


def test_nothing_follows_the_finish() -> None:
    output = tracker(max_tokens=2)
    feed(output, "abcd")
    assert output.take() is None, "the finish waits until it is settled"
    output.settle()
    news = output.take()
    assert news is not None
    assert (news.token_ids, news.finish) == ([97, 98], Finish("length"))
    assert output.take() is None


def test_an_end_token_counts() -> None:
    output = tracker()
    feed(output, "hi")
    output.feed(EOS, None)
    output.settle()
    news = output.take()
    assert news is not None
    assert news.token_ids == [*b"hi", EOS]
    assert news.finish == Finish("stop", EOS, is_eos=True)


def test_an_ignored_end_token_ends_nothing() -> None:
    output = tracker(ignore_eos=True)
    output.feed(EOS, None)
    assert output.finish is None


def test_a_stop_token_ends_nothing_before_the_least_number_of_tokens() -> None:
    output = tracker(stop_token_ids=(33,), min_tokens=2)
    for token in (33, 33):
        output.feed(token, None)
        assert output.finish is None
    output.feed(33, None)
    assert output.finish == Finish("stop", 33)


@pytest.mark.parametrize("reason", ["timeout", "not_finished", None])
def test_an_irregular_end_is_a_failure(reason: str | None) -> None:
    with pytest.raises(RequestFailed):
        tracker().engine_ended(reason, None)


def test_a_cancelled_output_is_an_abort() -> None:
    with pytest.raises(RequestAborted):
        tracker().engine_ended("cancelled", None)


def test_the_engine_may_end_earlier() -> None:
    output = tracker()
    feed(output, "a")
    output.engine_ended("stop", 7)
    assert output.finish == Finish("stop", 7)


class EngineLogprob:
    def __init__(self, logprob: float, rank: int | None) -> None:
        self.logprob, self.rank = logprob, rank


def test_engine_logprobs_keep_the_token_and_the_best() -> None:
    entry = {98: EngineLogprob(-5.0, 9), 97: EngineLogprob(-0.1, 1), 99: EngineLogprob(float("-inf"), 3)}
    assert engine_row(98, entry, 1) == ([98, 97], [-5.0, -0.1], 9)
    assert engine_row(98, entry, 3) == ([98, 97, 98, 99], [-5.0, -0.1, -5.0, -9999.0], 9)


def test_a_missing_logprob_is_an_error_not_a_zero() -> None:
    with pytest.raises(RequestFailed):
        engine_row(5, {97: EngineLogprob(-0.1, 1)}, 1)


def test_reports_become_logprobs() -> None:
    ids, logprobs, rank = report_row(TokenReport(98, 4, ((98, -2.0), (97, -0.5), (99, -math.inf))))
    assert (list(ids), list(logprobs), rank) == ([98, 97, 99], [-2.0, -0.5, -9999.0], 4)
