"""Every field of Sampling reaches vLLM's SamplingParams."""

from dataclasses import replace

import pytest

from tests.engines.vllm.support import GREEDY
from twinjet.errors import InvalidRequest
from twinjet.grammar.room import CompiledGrammar
from twinjet.grammar.vocabulary import Vocabulary
from twinjet.request import Constraint

GRAMMAR = CompiledGrammar("", Vocabulary("/vocabulary", "key", (2,)), 0)

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]


def test_every_field_is_mapped() -> None:
    from vllm.sampling_params import RequestOutputKind

    from twinjet.engines.vllm.fields import GrammarNote
    from twinjet.engines.vllm.front.params import sampling_params

    sampling = replace(
        GREEDY, temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1,
        frequency_penalty=0.2, presence_penalty=-0.3, logit_bias={3: -5.0}, seed=2**64 - 1, n=2, max_tokens=9,
        min_tokens=2, stop=("a", "b"), stop_token_ids=(4,), include_stop=True, ignore_eos=True,
        bad_words=("w",), allowed_token_ids=(3, 4), logprobs=2, prompt_logprobs=1, skip_special_tokens=False,
        constraint=Constraint("regex", "x+"),
    )  # fmt: skip
    made = sampling_params(sampling, 0, native=False, grammar=GRAMMAR)
    found = (
        made.temperature, made.top_p, made.top_k, made.min_p, made.repetition_penalty, made.frequency_penalty,
        made.presence_penalty, made.logit_bias, made.seed, made.n, made.max_tokens, made.min_tokens, made.stop,
        made.stop_token_ids, made.include_stop_str_in_output, made.ignore_eos, made.bad_words,
        made.allowed_token_ids, made.logprobs, made.prompt_logprobs, made.skip_special_tokens,
    )  # fmt: skip
    assert found == (
        0.7, 0.9, 40, 0.05, 1.1, 0.2, -0.3, {3: -5.0}, 2**64 - 1, 1, 9, 2, ["a", "b"], [4], True, True, ["w"],
        [3, 4], 2, 1, False,
    )  # fmt: skip
    assert made.structured_outputs is not None
    assert GrammarNote.is_one(made.structured_outputs.grammar)
    assert made.output_kind == RequestOutputKind.DELTA
    assert sampling_params(sampling, 1, native=False, grammar=GRAMMAR).prompt_logprobs is None


def test_seeds_of_outputs_differ_and_do_not_meet_a_neighbours() -> None:
    from twinjet.engines.vllm.front.params import output_seed

    seeds = [output_seed(seed, i) for seed in (0, 1, 2, 2**64 - 1) for i in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert output_seed(5, 0) == 5


@pytest.mark.parametrize(
    ("temperature", "plain", "native"),
    [(0.0, 0.0, 0.0), (1e-6, 0.0, 0.0), (1e-3, 0.01, 1e-3), (1.0, 1.0, 1.0), (50.0, None, 50.0)],
)
def test_temperatures(temperature: float, plain: float | None, native: float) -> None:
    from twinjet.engines.vllm.front.params import EXTRA_KEY, sampling_params

    sampling = replace(GREEDY, temperature=temperature)
    made = sampling_params(sampling, 3, native=True)
    assert made.extra_args == {EXTRA_KEY: {"temperature": native, "seed": 1, "output_index": 3}}
    if plain is None:
        with pytest.raises(InvalidRequest, match="allowed: 0 to 2"):
            sampling_params(sampling, 0, native=False)
    else:
        assert sampling_params(sampling, 0, native=False).temperature == plain


def test_a_constraint_goes_in_as_a_note_of_its_compiled_grammar() -> None:
    from twinjet.engines.vllm.fields import GrammarNote
    from twinjet.engines.vllm.front.params import sampling_params

    sampling = replace(GREEDY, constraint=Constraint("regex", "a"), stop_token_ids=(9,))
    with pytest.raises(ValueError, match="compiled"):
        sampling_params(sampling, 0, native=True)
    made = sampling_params(sampling, 0, native=True, grammar=GRAMMAR)
    made._validate_structured_outputs(None, None, None)
    assert made.structured_outputs is not None
    assert made.structured_outputs._backend == "xgrammar"
    assert GrammarNote.decode(made.structured_outputs.grammar) == GrammarNote("", "/vocabulary", (2,), (9,))
