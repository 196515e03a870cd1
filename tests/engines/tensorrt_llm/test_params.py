"""Every field of the contract is mapped, drawn by us or refused; nothing is dropped."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any

import pytest

from tests.engines.tensorrt_llm.test_outputs import NEUTRAL
from twinjet.engines.tensorrt_llm.front.params import (
    EngineSampler,
    TokenFacts,
    drawn_by_engine,
    drawn_by_us,
)
from twinjet.errors import Unsupported
from twinjet.grammar.compilation import written
from twinjet.request import Constraint, EngineRequest, Sampling
from twinjet.sampling.bad_text import BadTextSettings

TOKENS = TokenFacts(vocab_size=258, eos_token_ids=(256, 13), first_eos_token_id=256)
NOTHING = EngineSampler()
ALL = EngineSampler(
    penalties=True, min_p=True, logit_bias=True, min_tokens=True, logprobs=True, prompt_logprobs=True,
    guided_backend="xgrammar", guided_decoding=dict,
)  # fmt: skip


def request(**sampling: Any) -> EngineRequest:
    return EngineRequest(
        request_id="r", prompt_token_ids=(1, 2, 3), sampling=Sampling(**(NEUTRAL | sampling))
    )


def ours(**sampling: Any) -> dict[str, Any]:
    return drawn_by_us(
        request(**sampling),
        2,
        TOKENS,
        key=5,
        report_path="/p",
        bad_text=BadTextSettings("/texts", ("w",), True),
        grammar=None,
    )


def engines(can: EngineSampler = ALL, **sampling: Any) -> dict[str, Any]:
    constraint = sampling.get("constraint")
    guide = constraint and written(constraint.kind, constraint.value, constraint.choices)
    return drawn_by_engine(request(**sampling), 1, one_end(sampling), can, guide)


def one_end(sampling: dict[str, Any]) -> TokenFacts:
    """With min_tokens a model of one end token, which is all that the engine's sampler can hold back."""
    return (
        TokenFacts(vocab_size=258, eos_token_ids=(256,), first_eos_token_id=256)
        if "min_tokens" in sampling
        else TOKENS
    )


# Each field with a value that is not neutral. The run applies "elsewhere" ones itself: n as n requests, stop
# and skip_special_tokens on the text that it makes, the constraint as a compiled grammar.
CHANGED: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5,
    "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {3: 1.5}, "seed": 99, "max_tokens": 7,
    "min_tokens": 3, "stop_token_ids": (44,), "ignore_eos": True, "allowed_token_ids": (1, 2), "logprobs": 2,
    "prompt_logprobs": 2,
}  # fmt: skip
ELSEWHERE = {"n", "stop", "include_stop", "skip_special_tokens", "bad_words", "constraint"}


def seen(arguments: dict[str, Any]) -> str:
    arguments = dict(arguments)
    processor = arguments.pop("logits_processor", None)
    return repr(sorted(arguments.items())) + repr(None if processor is None else processor.settings)


def test_the_table_is_complete() -> None:
    assert set(CHANGED) | ELSEWHERE == {f.name for f in fields(Sampling)}


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_reaches_our_draw(name: str) -> None:
    assert seen(ours(**{name: CHANGED[name]})) != seen(ours())


@pytest.mark.parametrize("name", [*CHANGED, "bad_words", "constraint"])
def test_every_field_reaches_the_engines_sampler_or_is_refused(name: str) -> None:
    value = {"bad_words": ("x",), "constraint": Constraint("regex", "a")}.get(name) or CHANGED[name]
    for can in (ALL, NOTHING):
        try:
            arguments = engines(can, **{name: value})
        except Unsupported as refusal:
            assert refusal.capability in (name, "penalties", "regex")
        else:
            assert seen(arguments) != seen(engines(can))


def test_nothing_is_left_to_the_engines_defaults() -> None:
    for arguments in (ours(), engines()):
        assert {"temperature", "top_p", "top_k", "max_tokens", "n", "best_of"} <= arguments.keys()


def test_a_forced_token_meets_no_rule_of_the_engines_own() -> None:
    arguments = ours(min_tokens=3, repetition_penalty=2.0, logit_bias={1: 1.0}, min_p=0.5, seed=4)
    assert (arguments["top_k"], arguments["temperature"]) == (1, 1.0)
    forbidden = {"min_tokens", "bad", "embedding_bias", "guided_decoding", "repetition_penalty", "min_p"}
    assert not forbidden & arguments.keys()


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-6}])
def test_greedy_means_greedy(greedy: dict[str, Any]) -> None:
    arguments = engines(**greedy)
    assert (arguments["top_k"], arguments["temperature"]) == (1, 1.0)
    assert ours(**greedy)["logits_processor"].settings.temperature == greedy.get("temperature", 1.0)


def test_off_does_not_become_greedy() -> None:
    arguments = engines()
    assert (arguments["temperature"], arguments["top_p"], arguments["top_k"]) == (1.0, 1.0, 0)


def test_all_end_tokens_end_an_output() -> None:
    assert ours()["stop_token_ids"] == [13], "the engine knows 256 by itself"
    assert ours(ignore_eos=True, stop_token_ids=(44,))["stop_token_ids"] == [44]
    assert ours()["logits_processor"].settings.end_token_ids == (13, 256)


def test_outputs_of_the_engines_sampler_get_seeds_of_their_own() -> None:
    starts = (5, 2**63, 2**64 - 1)
    seeds = {
        drawn_by_engine(request(seed=seed), index, TOKENS, ALL)["seed"]
        for seed in starts
        for index in range(64)
    }
    assert len(seeds) == 64 * len(starts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_engine_is_asked_for_at_least_one_logprob() -> None:
    assert engines(logprobs=0)["logprobs"] == 1
    assert engines(prompt_logprobs=0)["prompt_logprobs"] == 1
    assert "logprobs" not in ours(logprobs=5), "ours come from our sampler"


@pytest.mark.parametrize(
    ("constraint", "guide"),
    [
        (Constraint("json_schema", '{"type": "null"}'), {"json": '{"enum": [null]}'}),
        (Constraint("json_object"), {"json": '{"type": "object", "additionalProperties": {}}'}),
        (Constraint("regex", "a+"), {"regex": "a+"}),
        (Constraint("ebnf", 'root ::= "a"'), {"grammar": 'root ::= "a"'}),
        (Constraint("choice", choices=('a"b', "c")), {"grammar": 'root ::= "a\\"b" | "c"'}),
    ],
)
def test_constraints_become_guides(constraint: Constraint, guide: dict[str, Any]) -> None:
    assert engines(constraint=constraint)["guided_decoding"] == guide
    with pytest.raises(Unsupported):
        engines(NOTHING, constraint=constraint)


def test_arguments_survive_the_way_to_the_worker() -> None:
    copy = pickle.loads(pickle.dumps(ours(logit_bias={1: 2.0})))
    assert copy["logits_processor"].settings.logit_bias == {1: 2.0}


def test_bad_words_are_strings_which_only_our_sampler_can_keep_out() -> None:
    assert ours(bad_words=("w",))["logits_processor"].settings.bad_text == ("/texts", ("w",), True)
    with pytest.raises(Unsupported, match="bad_words"):
        engines(bad_words=("w",))
