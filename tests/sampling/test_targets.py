"""Every instruction set this CPU has gives the same tokens, whatever the row and the parameters."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinjet.sampling import Request, Sampler, cpu_targets

SAMPLERS = [Sampler(1, target) for target in cpu_targets()]


def make_row(shape: str, vocab_size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(vocab_size)
    rows = {
        "normal": 3 * normal,
        "peaked": np.where(np.arange(vocab_size) == seed % vocab_size, 9.0, normal - 40),
        "flat": np.full(vocab_size, 0.5),
        "ties": rng.integers(0, 3, vocab_size),
        "masked": np.where(rng.random(vocab_size) < 0.95, -np.inf, normal),
        "denormal": rng.integers(-999, 999, vocab_size) * 1e-42,
        "nan": np.where(rng.random(vocab_size) < 0.3, np.nan, normal),
        "infinite": np.where(rng.random(vocab_size) < 0.1, np.inf, normal),
    }
    return rows[shape].astype(np.float32)[None]


def draw_all(row: np.ndarray, options: dict[str, Any], num_logprobs: int | None, mode: Any) -> list[Any]:
    results = []
    for sampler in SAMPLERS:
        result = sampler.sample(
            row, [Request(row.shape[1], **options)], num_logprobs=num_logprobs, logprobs_mode=mode
        )
        parts = [result.token_ids, result.status]
        if result.logprobs is not None:
            parts += [result.logprobs.token_ids, result.logprobs.logprobs, result.logprobs.ranks]
        results.append([part.tobytes() for part in parts])
    return results


OPTIONS = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**64 - 1), "position_offset": st.integers(0, 2**62)},
    optional={
        "temperature": st.floats(0, 5, width=32),
        "top_k": st.integers(-1, 400),
        "top_p": st.floats(-0.5, 1.5, width=32),
        "min_p": st.floats(-0.5, 1.5, width=32),
        "repetition_penalty": st.floats(0.25, 4, width=32),
        "frequency_penalty": st.floats(-2, 2, width=32),
        "presence_penalty": st.floats(-2, 2, width=32),
        "prompt_token_ids": st.lists(st.integers(0, 500), max_size=20),
    },
)
SHAPES = ["normal", "peaked", "flat", "ties", "masked", "denormal", "nan", "infinite"]


@given(
    st.sampled_from(SHAPES),
    st.integers(1, 2000),
    st.integers(0, 2**32),
    OPTIONS,
    st.sampled_from([None, 0, 5]),
    st.sampled_from(["raw", "processed"]),
)
@settings(max_examples=600, deadline=None)
def test_targets_agree(
    shape: str, vocab_size: int, seed: int, options: dict[str, Any], num_logprobs: int | None, mode: str
) -> None:
    results = draw_all(make_row(shape, vocab_size, seed), options, num_logprobs, mode)
    assert all(result == results[0] for result in results)


@pytest.mark.slow
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 300_000),
    st.integers(0, 2**32),
    OPTIONS,
    st.sampled_from([None, 20]),
)
@settings(max_examples=400, deadline=None)
def test_targets_agree_on_large_rows(
    shape: str, vocab_size: int, seed: int, options: dict[str, Any], num_logprobs: int | None
) -> None:
    results = draw_all(make_row(shape, vocab_size, seed), options, num_logprobs, "raw")
    assert all(result == results[0] for result in results)
