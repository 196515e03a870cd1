"""What is drawn is distributed as the exact float64 softmax with filters says.

Seeds are fixed, so the tests always do the same. Each chi-square is accepted at p > 1e-4: with fresh
seeds about one run of the whole table in 400 would raise a false alarm.
"""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
from scipy import stats

from twinjet import _core
from twinjet.sampling import Request, Sampler, cpu_targets

VOCAB = 700
ROWS, STEPS = 512, 120
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.9},
    "both": {"top_k": 40, "top_p": 0.8},
    "min_p": {"min_p": 0.02},
    "all": {"top_k": 60, "top_p": 0.95, "min_p": 0.01},
}


def exact_probabilities(row: np.ndarray, temperature: float, options: dict[str, Any]) -> np.ndarray:
    x = row.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p[p < options.get("min_p", 0.0)] = 0.0
    k = options.get("top_k", 0)
    if k:
        p[x < np.sort(x)[-k]] = 0.0
    p /= p.sum()
    if "top_p" in options:
        order = np.argsort(-p, kind="stable")
        above = np.cumsum(p[order]) - p[order]
        p[order[above >= options["top_p"]]] = 0.0
    return p / p.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 4.0])
@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_softmax(name: str, temperature: float) -> None:
    row = (2.0 * np.random.default_rng(3).standard_normal(VOCAB)).astype(np.float32)
    check_draws(row, temperature, FILTERS[name])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("options", [{"top_p": 0.95}, {"top_p": 0.6, "min_p": 0.02}])
def test_long_nuclei_follow_the_softmax(options: dict[str, Any], temperature: float) -> None:
    row = np.random.default_rng(4).standard_normal(6000).astype(np.float32)
    assert (exact_probabilities(row, temperature, options) > 0).sum() > len(row) / 20  # too long to list
    check_draws(row, temperature, options)


def check_draws(row: np.ndarray, temperature: float, options: dict[str, Any]) -> None:
    vocab_size = len(row)
    batch = np.broadcast_to(row, (ROWS, vocab_size))
    requests = [Request(vocab_size, temperature=temperature, seed=i, **options) for i in range(ROWS)]
    sampler = Sampler(1)
    counts = np.zeros(vocab_size, np.int64)
    for _ in range(STEPS):
        counts += np.bincount(sampler.sample(batch, requests).token_ids, minlength=vocab_size)
    expected = exact_probabilities(row, temperature, options) * counts.sum()
    assert counts[expected == 0].sum() == 0
    order = np.argsort(expected)
    order = order[expected[order] > 0]
    # Rare tokens share a cell, so that each cell expects at least 10.
    cells = np.minimum(np.cumsum(expected[order]) // 10, np.arange(len(order)) + 1e9)
    small = expected[order] < 10
    labels = np.where(small, cells, 1e12 + np.arange(len(order)))
    _, inverse = np.unique(labels, return_inverse=True)
    observed = np.bincount(inverse, counts[order])
    predicted = np.bincount(inverse, expected[order])
    keep = predicted >= 5
    statistic = float(((observed[keep] - predicted[keep]) ** 2 / predicted[keep]).sum())
    assert stats.chi2.sf(statistic, keep.sum() - 1) > 1e-4


def test_exponentials_are_exponential() -> None:
    values = [_core.sampler_exponential(11, position, 0, 5) for position in range(40_000)]
    assert stats.kstest(values, "expon").pvalue > 1e-3
    neighbours = [_core.sampler_exponential(11, 0, 0, index) for index in range(40_000)]
    assert stats.kstest(neighbours, "expon").pvalue > 1e-3
    assert abs(np.corrcoef(values, neighbours)[0, 1]) < 0.02


@pytest.mark.parametrize("target", cpu_targets())
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_weights_are_within_the_derived_bound(target: str, temperature: float) -> None:
    rng = np.random.default_rng(5)
    x = np.sort(rng.uniform(-32 * temperature, 0, 3000).astype(np.float32))
    weights = _core.sampler_weights(x, temperature, target)
    t = mpmath.mpf(float(np.float32(temperature)))
    with mpmath.workdps(40):
        for value, weight in zip(x.tolist(), weights.tolist(), strict=True):
            d = (mpmath.mpf(value) - mpmath.mpf(float(x[-1]))) / t
            exact = mpmath.e**d * 2**44
            z = float(-d) / math.log(2)
            relative = 2**-23 + 1.01 * math.log(2) * 3 * 2**-24 * z
            assert abs(weight - exact) <= exact * relative + 1


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_mass_and_distribution_of_a_row_are_within_the_derived_bound(
    spread: float, temperature: float
) -> None:
    vocab_size = 128_256
    x = (spread * np.random.default_rng(7).standard_normal(vocab_size)).astype(np.float32)
    weights = np.array(_core.sampler_weights(x, temperature, cpu_targets()[0])).astype(np.uint64)
    wide = x.astype(np.longdouble)
    t = np.longdouble(np.float32(temperature))
    exact = np.exp((wide - wide.max()) / t)
    distance = (wide.max() - wide) / t  # ln 2 |z*|
    bound = float((exact * (2**-23 + 3.01 * 2**-24 * distance)).sum() + vocab_size * 2**-44)
    mass = np.longdouble(int(weights.sum())) / 2**44
    assert abs(mass - exact.sum()) <= bound
    # Both the weights and their sum are off by at most the bound.
    variation = np.abs(weights / np.longdouble(2**44) / mass - exact / exact.sum()).sum() / 2
    assert variation <= bound / exact.sum()


def test_ln_is_within_four_units() -> None:
    rng = np.random.default_rng(6)
    for x in [*rng.random(2000), *(2.0 ** rng.uniform(-53, 63, 2000)), 1 - 2**-53, 2.0**-53]:
        exact = mpmath.log(mpmath.mpf(float(x)))
        assert abs(_core.sampler_ln(float(x)) - exact) <= 4 * 2**-53 * abs(exact)


def test_tokens_do_not_depend_on_the_batch() -> None:
    vocab_size = 6000  # long enough for every way to find a nucleus
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((64, vocab_size)).astype(np.float32)
    rows[::2] *= 3
    options: list[dict[str, Any]] = [
        {"temperature": float(rng.choice([0, 0.7, 1.3])), "top_p": float(rng.choice([0.9, 1.0])), "seed": i}
        | ({"top_k": 30} if i % 3 == 0 else {})
        | ({"min_p": 0.01} if i % 5 == 0 else {})
        | (
            {"repetition_penalty": 1.3, "prompt_token_ids": rng.integers(0, vocab_size, 50)}
            if i % 4 == 0
            else {}
        )
        for i in range(64)
    ]

    def draw(order: np.ndarray, threads: int) -> list[list[int]]:
        sampler, requests = Sampler(threads), [Request(vocab_size, **options[i]) for i in order]
        steps = [sampler.sample(rows[order], requests).token_ids for _ in range(4)]
        back = np.argsort(order)
        return [step[back].tolist() for step in steps]

    everything = np.arange(64)
    expected = draw(everything, 1)
    assert draw(everything, 2) == expected
    assert draw(rng.permutation(64), 2) == expected
    for i in range(64):
        alone = Sampler(1)
        request = Request(vocab_size, **options[i])
        drawn = [int(alone.sample(rows[i], [request]).token_ids[0]) for _ in range(4)]
        assert drawn == [step[i] for step in expected]


def test_a_text_can_be_taken_up_midway() -> None:
    rows = np.random.default_rng(9).standard_normal((6, 400)).astype(np.float32)
    prompt = [3, 1, 4]
    whole = Request(400, seed=2, prompt_token_ids=prompt, presence_penalty=1.0)
    sampler = Sampler(1)
    tokens = [int(sampler.sample(row, [whole]).token_ids[0]) for row in rows]
    rest = Request(400, seed=2, prompt_token_ids=prompt, output_token_ids=tokens[:2], presence_penalty=1.0)
    assert [int(sampler.sample(row, [rest]).token_ids[0]) for row in rows[2:]] == tokens[2:]


def test_logprobs_equal_log_softmax() -> None:
    row = (3 * np.random.default_rng(10).standard_normal((1, 5000))).astype(np.float32)
    x = row[0].astype(np.float64)
    exact = x - x.max() - np.log(np.exp(x - x.max()).sum())
    result = Sampler(1).sample(row, [Request(5000, temperature=0.5, seed=1)], num_logprobs=20)
    assert result.logprobs is not None
    ids = result.logprobs.token_ids[0]
    assert np.abs(result.logprobs.logprobs[0] - exact[ids]).max() < 2e-6
    assert ids[1:].tolist() == np.argsort(-x, kind="stable")[:20].tolist()
    assert result.logprobs.ranks[0] == (x >= x[ids[0]]).sum()
