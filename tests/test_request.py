"""What a client sent, the model's defaults and the context give one complete set of sampling parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinjet.engines.base import EngineInfo
from twinjet.engines.fake import FakeEngine
from twinjet.errors import InvalidRequest
from twinjet.request import Sampling, SamplingOverrides, resolve_sampling

INFO = FakeEngine(options={"max_context_tokens": 100}).describe()


def _resolve(sent: SamplingOverrides, info: EngineInfo = INFO, num_prompt_tokens: int = 10) -> Sampling:
    return resolve_sampling(sent, info, num_prompt_tokens=num_prompt_tokens, seed=42)


def test_nothing_sent_and_no_defaults_is_neutral() -> None:
    sampling = _resolve(SamplingOverrides())
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.n, sampling.max_tokens, sampling.min_tokens, sampling.seed) == (1, 90, 0, 42)
    assert not sampling.is_greedy


def test_a_models_default_fills_a_gap_and_a_sent_zero_does_not_count_as_one() -> None:
    info = replace(
        INFO, default_sampling=SamplingOverrides(temperature=0.6, top_k=20, repetition_penalty=1.1)
    )
    assert _resolve(SamplingOverrides(), info).temperature == 0.6
    sent = _resolve(SamplingOverrides(temperature=0.0, top_k=0), info)
    assert (sent.temperature, sent.top_k, sent.repetition_penalty) == (0.0, 0, 1.1)


def test_minus_one_and_zero_both_turn_top_k_off() -> None:
    assert _resolve(SamplingOverrides(top_k=-1)).top_k == _resolve(SamplingOverrides(top_k=0)).top_k == 0


def test_a_default_longer_than_the_room_is_cut_but_a_sent_one_refused() -> None:
    info = replace(INFO, default_sampling=SamplingOverrides(max_tokens=5000))
    assert _resolve(SamplingOverrides(), info).max_tokens == 90
    with pytest.raises(InvalidRequest, match="allowed: 1 to 90"):
        _resolve(SamplingOverrides(max_tokens=91))


@pytest.mark.parametrize(
    ("temperature", "top_k", "greedy"),
    [(0.0, None, True), (1e-6, None, True), (1e-4, None, False), (1.0, 1, True)],
)
def test_greedy_is_a_temperature_near_zero_or_one_candidate(
    temperature: float, top_k: int | None, greedy: bool
) -> None:
    assert _resolve(SamplingOverrides(temperature=temperature, top_k=top_k)).is_greedy is greedy


@given(
    st.floats(),
    st.floats(),
    st.integers(-5, 2**31 - 1),
    st.floats(),
    st.integers(-1, 70),
    st.integers(-1, 200),
)
def test_what_is_accepted_is_in_range_and_the_rest_is_refused_with_its_name(
    temperature: float, top_p: float, top_k: int, min_p: float, n: int, max_tokens: int
) -> None:
    valid = {
        "temperature": 0 <= temperature <= 100,
        "top_p": 0 < top_p <= 1,
        "top_k": top_k >= -1,
        "min_p": 0 <= min_p <= 1,
        "n": 1 <= n <= 64,
        "max_tokens": 1 <= max_tokens <= 90,
    }
    sent = SamplingOverrides(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, n=n, max_tokens=max_tokens
    )
    try:
        sampling = _resolve(sent)
    except InvalidRequest as error:
        named = {v.field.removeprefix("sampling.") for v in error.violations}
        greedy_n = all(valid.values()) and n > 1 and (temperature < 1e-5 or top_k == 1)
        others = {k for k, ok in valid.items() if not ok}
        assert named == ({"n"} if greedy_n else others) or named == others - {"max_tokens"}
    else:
        assert all(valid.values())
        assert sampling.max_tokens == max_tokens


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_has_64_bits(seed: int) -> None:
    assert _resolve(SamplingOverrides(seed=2**64 - 1)).seed == 2**64 - 1
    with pytest.raises(InvalidRequest, match=r"sampling.seed: .* allowed: 0 to 18446744073709551615"):
        _resolve(SamplingOverrides(seed=seed))
