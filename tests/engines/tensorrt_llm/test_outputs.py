"""Cumulative results to deltas: nothing twice, nothing taken back, text and ends as for every engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinjet.engines.base import Finish, TokenLogprobs
from twinjet.engines.fake import EOS, FakeTokenizer
from twinjet.engines.tensorrt_llm.front.outputs import LogprobFormatter, OutputTracker
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
    return OutputTracker(request, 0, FakeTokenizer(), frozenset({EOS}))


def feed(output: OutputTracker, text: str) -> None:
    for byte in text.encode():
        output.feed(byte, None)


@given(st.text(max_size=40), st.lists(st.integers(1, 5), max_size=60))
def test_pieces_join_to_the_text(text: str, sizes: list[int]) -> None:
    """Characters of several bytes arrive a byte a token, taken out in pieces of any size."""
    output = tracker(max_tokens=1000)
    data, taken, tokens = list(text.encode()), "", []
    for size in [*sizes, len(data)]:
        for token in data[:size]:
            output.feed(token, None)
        del data[:size]
        if (event := output.take()) is not None:
            assert "\ufffd" not in event.text or "\ufffd" in text, "half a character was shown"
            taken += event.text
            tokens += event.token_ids
    output.engine_ended("length", None)
    output.settle()
    last = output.take()
    assert last is not None
    assert taken + last.text == text
    assert tokens + list(last.token_ids) == list(text.encode())


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_join_to_what_decoding_gives(data: bytes) -> None:
    output = tracker(max_tokens=1000)
    for byte in data:
        output.feed(byte, None)
    output.engine_ended("length", None)
    output.settle()
    event = output.take()
    assert event is not None
    assert event.text == FakeTokenizer().decode(list(data), skip_special_tokens=True)


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=3))
def test_a_stop_string_is_never_shown_in_part(text: str, stop: str) -> None:
    output = tracker(stop=(stop,), max_tokens=1000)
    shown = ""
    for byte in text.encode():
        output.feed(byte, None)
        if (event := output.take()) is not None:
            shown += event.text
            assert shown == text[: len(shown)]
            assert stop not in shown
    if output.finish is None:
        output.engine_ended("length", None)
    output.settle()
    last = output.take()
    shown += last.text if last is not None else ""
    assert shown == (text[: text.index(stop)] if stop in text else text)


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
    event = output.take()
    assert event is not None
    assert (event.text, list(event.token_ids), event.finish) == ("ab", [97, 98], Finish("length"))
    assert output.take() is None


def test_an_end_token_counts_and_shows_nothing() -> None:
    output = tracker()
    feed(output, "hi")
    output.feed(EOS, None)
    output.settle()
    event = output.take()
    assert event is not None
    assert (event.text, event.token_ids[-1]) == ("hi", EOS)
    assert event.finish == Finish("stop", EOS, is_eos=True)


def test_an_ignored_end_token_ends_nothing() -> None:
    output = tracker(ignore_eos=True)
    output.feed(EOS, None)
    assert output.finish is None


def test_an_included_stop_token_shows_its_text() -> None:
    output = tracker(stop_token_ids=(33,), include_stop=True)
    feed(output, "hi!")
    output.settle()
    event = output.take()
    assert event is not None
    assert event.text == "hi!"
    assert event.finish == Finish("stop", 33)


def test_a_held_beginning_of_a_stop_string_is_shown_at_the_end() -> None:
    output = tracker(stop=("xyz",), max_tokens=4)
    feed(output, "abxy")
    output.settle()
    event = output.take()
    assert event is not None
    assert event.text == "abxy"


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
    found = LogprobFormatter(FakeTokenizer()).from_engine(98, entry, 1)
    assert isinstance(found, TokenLogprobs)
    assert (found.chosen.token_id, found.chosen.rank, found.chosen.text) == (98, 9, "b")
    assert [top.token_id for top in found.top] == [97]
    all_of_them = LogprobFormatter(FakeTokenizer()).from_engine(98, entry, 3)
    assert all_of_them.top[-1].logprob == -9999.0


def test_a_missing_logprob_is_an_error_not_a_zero() -> None:
    with pytest.raises(RequestFailed):
        LogprobFormatter(FakeTokenizer()).from_engine(5, {97: EngineLogprob(-0.1, 1)}, 1)


def test_reports_become_logprobs() -> None:
    report = TokenReport(98, 4, ((98, -2.0), (97, -0.5), (99, -1.0)))
    found = LogprobFormatter(FakeTokenizer()).from_report(report)
    assert (found.chosen.logprob, found.chosen.rank) == (-2.0, 4)
    assert [(top.token_id, top.rank) for top in found.top] == [(97, 1), (99, 2)]
