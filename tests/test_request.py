"""What a client sent, the model's defaults and the context give one complete set of sampling parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twinjet import _core
from twinjet.engines.base import EngineInfo
from twinjet.engines.fake import FakeEngine
from twinjet.errors import ConfigError, InvalidRequest
from twinjet.request import NUMBER_BOUNDS, Sampling, SamplingOverrides, check_defaults, resolve_sampling
from twinjet.sampling import Request, Sampler

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
    st.floats(width=32),
    st.floats(width=32),
    st.integers(-5, 2**31 - 1),
    st.floats(width=32),
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


EDGES = [
    0.0, -0.0, 1e-45, -1e-45, 1.17549435e-38, 2.938736e-39, 5e-324, 1e-9, 0.01, 0.5, 1.0, 2.0, 100.0, 1e9,
    3.4028234663852886e38, 3.5e38, 1.7976931348623157e308, math.inf, -math.inf, math.nan,
]  # fmt: skip
numbers = st.floats() | st.floats(width=32) | st.sampled_from(EDGES + [-x for x in EDGES])


@settings(max_examples=2000)
@given(st.sampled_from(sorted(NUMBER_BOUNDS)), numbers)
@example("repetition_penalty", 1e-45)
def test_what_the_contract_accepts_the_sampler_in_the_engine_accepts_too(name: str, value: float) -> None:
    """The sampler runs inside the engine's process: what it refuses there ends the engine."""
    vocab_size = INFO.limits.vocab_size
    sent: dict[str, Any] = {name: value}
    if name == "top_k":
        sent = {name: int(max(-(2**31), min(2**31 - 1, value))) if math.isfinite(value) else 0}
    elif name == "logit_bias":
        sent = {name: {3: value}}
    try:
        sampling = _resolve(SamplingOverrides(**sent))
    except InvalidRequest as error:
        assert [v.field for v in error.violations] == [f"sampling.{name}"]
        return
    request = Request(
        vocab_size,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        seed=sampling.seed,
        prompt_token_ids=[1, 2],
        logit_bias=dict(sampling.logit_bias) or None,
    )
    logits = np.linspace(-30, 30, vocab_size, dtype=np.float32)[None]
    drawn = Sampler(1).sample(logits, [request], num_logprobs=2)
    assert 0 <= int(drawn.token_ids[0]) < vocab_size
    assert not drawn.status.any()


def test_every_range_of_the_contract_lies_within_the_samplers() -> None:
    assert NUMBER_BOUNDS.keys() == _core.SAMPLER_RANGES.keys()
    for name, bound in NUMBER_BOUNDS.items():
        low, high = _core.SAMPLER_RANGES[name]
        assert low <= bound.low <= bound.high <= high, name


@pytest.mark.parametrize("bad", [{"repetition_penalty": 0.0}, {"temperature": math.nan}, {"top_p": 1e-60}])
def test_a_models_own_defaults_are_held_to_the_same_bounds(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        check_defaults(replace(INFO, default_sampling=SamplingOverrides(**bad)))  # type: ignore[arg-type]
