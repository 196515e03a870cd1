"""Every field of Sampling reaches vLLM's SamplingParams."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engines.vllm.support import GREEDY
from twinjet.engines.vllm.fields import EXTRA_KEY
from twinjet.errors import ConfigError, InvalidRequest, Unsupported
from twinjet.grammar.room import CompiledGrammar
from twinjet.grammar.vocabulary import Vocabulary
from twinjet.request import Constraint
from twinjet.sampling.bad_text import BadTextSettings

GRAMMAR = CompiledGrammar("", Vocabulary("/vocabulary", "key", (2,)), 0)

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]


def test_every_field_is_mapped() -> None:
    from vllm.sampling_params import RequestOutputKind

    from twinjet.engines.vllm.fields import GrammarNote
    from twinjet.engines.vllm.front.params import sampling_params

    sampling = replace(
        GREEDY, temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1,
        frequency_penalty=0.2, presence_penalty=-0.3, logit_bias={3: -5.0}, seed=7, n=2, max_tokens=9,
        min_tokens=2, stop=("a", "b"), stop_token_ids=(4,), include_stop=True, ignore_eos=True,
        allowed_token_ids=(3, 4), logprobs=2, prompt_logprobs=1, skip_special_tokens=False,
        constraint=Constraint("regex", "x+"),
    )  # fmt: skip
    made = sampling_params(sampling, 0, native=False, grammar=GRAMMAR)
    found = (
        made.temperature, made.top_p, made.top_k, made.min_p, made.repetition_penalty, made.frequency_penalty,
        made.presence_penalty, made.logit_bias, made.seed, made.n, made.max_tokens, made.min_tokens, made.stop,
        made.stop_token_ids, made.detokenize, made.ignore_eos, made.allowed_token_ids,
        made.logprobs, made.prompt_logprobs,
    )  # fmt: skip
    assert found == (
        0.7, 0.9, 40, 0.05, 1.1, 0.2, -0.3, {3: -5.0}, 7, 1, 9, 2, [], [4], False, True, [3, 4], 2, 1,
    )  # fmt: skip
    assert made.structured_outputs is not None
    assert GrammarNote.is_one(made.structured_outputs.grammar)
    assert made.output_kind == RequestOutputKind.DELTA
    assert sampling_params(sampling, 1, native=False, grammar=GRAMMAR).prompt_logprobs is None


def test_bad_words_go_to_our_sampler_as_strings_and_are_refused_for_vllms() -> None:
    from twinjet.engines.vllm.front.params import sampling_params

    sampling = replace(GREEDY, bad_words=("w", "\n"))
    settings = BadTextSettings("/texts", sampling.bad_words, True)
    made = sampling_params(sampling, 0, native=True, bad_text=settings)
    assert made.extra_args[EXTRA_KEY]["bad_text"] == ["/texts", ("w", "\n"), True]
    assert not made.bad_words
    with pytest.raises(Unsupported, match="bad_words"):
        sampling_params(sampling, 0, native=False)


@pytest.mark.parametrize("native", [False, True])
def test_a_seed_of_64_bits_reaches_vllm_in_63_and_our_sampler_whole(native: bool) -> None:
    from twinjet.engines.vllm.front.params import sampling_params

    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        for index in range(64):
            made = sampling_params(replace(GREEDY, temperature=1.0, seed=seed, n=64), index, native=native)
            assert np.array([made.seed], dtype=np.int64)[0] >= 0
            assert not native or made.extra_args[EXTRA_KEY]["seed"] == seed


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, "1", None])
def test_an_engine_seed_that_a_generator_would_refuse_is_a_wrong_setting(seed: object) -> None:
    from twinjet.engines.vllm.config import engine_config

    with pytest.raises(ConfigError, match=r"options.seed .*allowed: 0 to 4294967295"):
        engine_config("model", {"seed": seed}, scheduler_cls=None, worker_cls=None)


def test_batches_are_as_large_as_those_of_vllms_own_server(
    monkeypatch: pytest.MonkeyPatch, demo_model_path: Path
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from twinjet.engines.vllm.config import engine_config

    server = UsageContext.OPENAI_API_SERVER
    monkeypatch.setattr(
        AsyncEngineArgs, "get_batch_defaults", lambda self, world_size: ({server: 8192}, {server: 1024})
    )
    made = engine_config(str(demo_model_path), {}, scheduler_cls=None, worker_cls=None).scheduler_config
    assert (made.max_num_batched_tokens, made.max_num_seqs) == (8192, 1024)
    own = engine_config(
        str(demo_model_path), {"max_num_seqs": 7}, scheduler_cls=None, worker_cls=None
    ).scheduler_config
    assert own.max_num_seqs == 7


@pytest.mark.parametrize(
    ("temperature", "plain", "native"),
    [(0.0, 0.0, 0.0), (1e-6, 0.0, 0.0), (1e-3, 0.01, 1e-3), (1.0, 1.0, 1.0), (50.0, None, 50.0)],
)
def test_temperatures(temperature: float, plain: float | None, native: float) -> None:
    from twinjet.engines.vllm.front.params import sampling_params

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
    with pytest.raises(Unsupported, match="tokenizer"):
        sampling_params(sampling, 0, native=True)
    made = sampling_params(sampling, 0, native=True, grammar=GRAMMAR)
    made._validate_structured_outputs(None, None, None)
    assert made.structured_outputs is not None
    assert made.structured_outputs._backend == "xgrammar"
    assert GrammarNote.decode(made.structured_outputs.grammar) == GrammarNote("", "/vocabulary", (2,), (9,))
