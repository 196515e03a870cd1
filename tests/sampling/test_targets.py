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


def narrowed(row: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (row.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    return row.astype(dtype)


def within(options: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The options with their token ids brought into the vocabulary."""

    def fold(ids: list[int]) -> list[int]:
        return [i % vocab_size for i in ids]

    changed = dict(options)
    for name in ("allowed_token_ids", "stop_token_ids", "output_token_ids"):
        if name in options:
            changed[name] = fold(options[name])
    if "bad_words" in options:
        changed["bad_words"] = [fold(word) for word in options["bad_words"]]
    if "logit_bias" in options:
        changed["logit_bias"] = {i % vocab_size: bias for i, bias in options["logit_bias"].items()}
    return changed


def draw_all(
    row: np.ndarray,
    options: dict[str, Any],
    num_logprobs: int | None,
    mode: Any,
    dtype: str = "float32",
    mask_seed: int | None = None,
) -> list[Any]:
    vocab_size = row.shape[1]
    logits = narrowed(row, dtype)
    words = None
    if mask_seed is not None:
        words = np.random.default_rng(mask_seed).integers(
            -(2**31), 2**31, (1, (vocab_size + 31) // 32), np.int32
        )
    results = []
    for sampler in SAMPLERS:
        result = sampler.sample(
            logits,
            [Request(vocab_size, **within(options, vocab_size))],
            bitmask=words,
            num_logprobs=num_logprobs,
            logprobs_mode=mode,
            dtype="bfloat16" if dtype == "bfloat16" else "",
        )
        parts = [result.token_ids, result.status]
        if result.logprobs is not None:
            parts += [result.logprobs.token_ids, result.logprobs.logprobs, result.logprobs.ranks]
        results.append([part.tobytes() for part in parts])
    return results


TOKENS = st.lists(st.integers(0, 300_000), min_size=1, max_size=6)
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
        "output_token_ids": st.lists(st.integers(0, 500), max_size=20),
        "logit_bias": st.dictionaries(st.integers(0, 300_000), st.floats(-100, 100, width=32), max_size=6),
        "allowed_token_ids": TOKENS,
        "bad_words": st.lists(TOKENS, max_size=3),
        "stop_token_ids": TOKENS,
        "min_tokens": st.integers(0, 30),
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
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.none() | st.integers(0, 2**32),
)
@settings(max_examples=600)
def test_targets_agree(
    shape: str,
    vocab_size: int,
    seed: int,
    options: dict[str, Any],
    num_logprobs: int | None,
    mode: str,
    dtype: str,
    mask_seed: int | None,
) -> None:
    results = draw_all(make_row(shape, vocab_size, seed), options, num_logprobs, mode, dtype, mask_seed)
    assert all(result == results[0] for result in results)


@pytest.mark.slow
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 300_000),
    st.integers(0, 2**32),
    OPTIONS,
    st.sampled_from([None, 20]),
)
@settings(max_examples=400)
def test_targets_agree_on_large_rows(
    shape: str, vocab_size: int, seed: int, options: dict[str, Any], num_logprobs: int | None
) -> None:
    results = draw_all(make_row(shape, vocab_size, seed), options, num_logprobs, "raw")
    assert all(result == results[0] for result in results)
