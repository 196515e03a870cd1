"""Parameters of requests that were seen before are those that would be made anew."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines.vllm.test_wire import GRAMMAR, samplings
from twinjet.engines.fake import FakeEngine
from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front import core_params, wire
from twinjet.engines.vllm.front.core_params import CoreParams
from twinjet.engines.vllm.front.params import sampling_fields
from twinjet.request import Sampling, SamplingOverrides, resolve_sampling

FACTS = Facts(
    version="", device="cpu", source="", tokenizer="", max_model_len=2048, vocab_size=49152, max_logprobs=5,
    max_num_seqs=8, has_adapters=False, has_prefix_cache=True, has_priority=True, default_sampling={}, eos=2,
    generation_eos=(0, 2, 5), settings={},
)  # fmt: skip


@settings(max_examples=60)
@given(
    wishes=st.lists(samplings(), min_size=1, max_size=3),
    requests=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans(), st.integers(0, 9), st.integers(1, 50)),
        min_size=1, max_size=8,
    ),
)  # fmt: skip
def test_parameters_that_are_kept_are_those_that_would_be_made(
    wishes: list[Sampling], requests: list[tuple[int, int, bool, int, int]]
) -> None:
    kept = CoreParams(FACTS)
    for which, index, native, seed, max_tokens in requests:
        wish = wishes[which % len(wishes)]
        sampling = wish.fitted(seed=seed, max_tokens=max(max_tokens, wish.min_tokens))
        fields = sampling_fields(sampling, index, native=native, grammar=GRAMMAR)
        made = kept.of(sampling, index, native=native, grammar=GRAMMAR, bad_text=None)
        assert made == wire.core_params(fields, FACTS, native=native)
        # What was given out before must not change what comes after.
        made.clear()


def test_clients_that_never_repeat_themselves_do_not_fill_the_memory() -> None:
    kept = CoreParams(FACTS)
    info = FakeEngine().describe()
    for i in range(3 * core_params.MAX_KEPT):
        sent = SamplingOverrides(temperature=1 + i / 1000)
        kept.of(
            resolve_sampling(sent, info, num_prompt_tokens=1, seed=0),
            0,
            native=True,
            grammar=None,
            bad_text=None,
        )
    assert len(kept._kept) <= core_params.MAX_KEPT
