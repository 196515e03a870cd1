"""RequestOutputs, as plain look-alikes, become engine events; no vLLM needed."""

from types import SimpleNamespace as Made

import pytest

from twinjet._core import Output, Vocabulary
from twinjet.engines.base import Finish
from twinjet.engines.vllm.front.outputs import failure_of, output_event, prompt_event, token_logprobs
from twinjet.errors import EngineDied, NoAdmissibleToken, RequestFailed

VOCABULARY = Vocabulary(
    "byte_level", ["a", "b", "</s>", "c", "d", "e", "f", "<end>", "g", "h"], special=[2, 7]
)
TEXT = VOCABULARY.token_text


def completion(reason: str | None = None, stop: int | str | None = None, ids: tuple[int, ...] = (5,)) -> Made:
    return Made(text="", token_ids=ids, logprobs=None, finish_reason=reason, stop_reason=stop)


@pytest.mark.parametrize(
    ("made", "finish"),
    [
        (completion(), None),
        (completion("length"), Finish("length")),
        (completion("stop", ids=(5, 2)), Finish("stop", 2, is_eos=True)),
        (completion("stop", 7, ids=(7,)), Finish("stop", 7, is_eos=True)),
        (completion("stop", 9, ids=(9,)), Finish("stop", 9)),
        (completion("stop", ids=(5,)), Finish("stop", None)),
        (completion("stop", ids=()), Finish("stop", None)),
    ],
)
def test_finish(made: Made, finish: Finish | None) -> None:
    output = Output(VOCABULARY, eos_token_ids=[2, 7])
    assert output_event(made, output, 1, None, TEXT).finish == finish


def test_what_follows_a_stop_string_in_the_same_step_is_no_output() -> None:
    output = Output(VOCABULARY, stop=["cd"])
    made = completion(ids=(0, 3, 4, 5))
    made.logprobs = [{i: entry(-1.0, 1)} for i in made.token_ids]
    event = output_event(made, output, 0, 1, TEXT)
    assert (event.text, event.token_ids, event.finish) == ("a", [0, 3, 4], Finish("stop", "cd"))
    assert [logprobs.chosen.text for logprobs in event.logprobs] == ["a", "c", "d"]


def test_failures() -> None:
    assert failure_of(completion(), is_constrained=False) is None
    assert failure_of(completion("stop", 2), is_constrained=True) is None
    assert isinstance(failure_of(completion("stop", -1), is_constrained=False), NoAdmissibleToken)
    assert isinstance(failure_of(completion("error"), is_constrained=True), NoAdmissibleToken)
    lost = failure_of(completion("error", ids=()), is_constrained=True)
    assert isinstance(lost, RequestFailed)
    assert lost.reason == "ENGINE_ERROR"
    assert isinstance(failure_of(completion("abort"), is_constrained=False), EngineDied)


def entry(logprob: float, rank: int) -> Made:
    return Made(logprob=logprob, rank=rank)


def test_logprobs_keep_the_chosen_apart_from_the_best() -> None:
    position = {4: entry(-3.0, 9), 1: entry(-0.5, 1), 3: entry(-1.0, 2)}
    made = token_logprobs(4, position, 2, TEXT)
    assert (made.chosen.token_id, made.chosen.rank) == (4, 9)
    assert [top.token_id for top in made.top] == [1, 3]
    assert (made.chosen.text, made.top[0].text) == ("d", "b")
    assert token_logprobs(1, position, 1, TEXT).top[0] == token_logprobs(1, position, 1, TEXT).chosen
    assert token_logprobs(4, position, 0, TEXT).top == ()


def test_prompt_event() -> None:
    output = Made(num_cached_tokens=3, prompt_logprobs=[None, {8: entry(-1.0, 1)}])
    assert prompt_event(output, [6, 8], None, TEXT).logprobs is None
    event = prompt_event(output, [6, 8], 0, TEXT)
    assert event.num_cached_tokens == 3
    assert event.logprobs is not None
    assert [made.chosen.token_id for made in event.logprobs] == [8]
