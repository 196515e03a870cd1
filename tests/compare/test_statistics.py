"""Intervals that hold what they promise, and words that follow from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from twinjet.compare.statistics import (
    BlockTotals,
    Precision,
    _chi_square_quantile,
    compare,
    noise_floor,
    quantile_ratio_interval,
    ratio_interval,
    t_quantile,
)


def _blocks(
    seed: int, n: int, *, ratio: float = 1.0, spread: float = 0.03, drift: float = 0.3
) -> list[BlockTotals]:
    rng = np.random.default_rng(seed)
    common = np.exp(rng.normal(0, drift, n))
    a, b = np.exp(rng.normal(0, spread / math.sqrt(2), (2, n)))
    return [BlockTotals(float(c * x), float(c * y * ratio)) for c, x, y in zip(common, a, b, strict=True)]


@given(st.floats(0.5, 0.9999), st.integers(1, 200))
def test_t_quantiles_are_those_of_scipy(p: float, degrees: int) -> None:
    expected = float(scipy.stats.t.ppf(p, degrees))
    if expected < 999:
        assert t_quantile(p, degrees) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("degrees", [5, 9, 30, 59])
def test_chi_square_quantiles_are_near_those_of_scipy(degrees: int) -> None:
    assert _chi_square_quantile(0.2, degrees) == pytest.approx(scipy.stats.chi2.ppf(0.2, degrees), rel=0.01)


@pytest.mark.parametrize("num_blocks", [6, 10, 30])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(num_blocks: int) -> None:
    covered = sum(
        not ratio_interval(_blocks(seed, num_blocks, ratio=1.1), num_resamples=600, seed=seed).excludes(1.1)
        for seed in range(400)
    )
    # 95% of 400 is 380 with a standard deviation of 4.4; four of them to either side.
    assert 362 <= covered <= 398


def test_what_both_sides_share_cancels() -> None:
    calm = ratio_interval(_blocks(1, 20, drift=0.0))
    wild = ratio_interval(_blocks(1, 20, drift=0.5))
    assert wild.half_width < 2 * calm.half_width


def test_the_same_data_give_the_same_interval() -> None:
    assert ratio_interval(_blocks(1, 12), seed=3) == ratio_interval(_blocks(1, 12), seed=3)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_totals_that_are_no_cost_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        ratio_interval([*_blocks(0, 8), BlockTotals(1.0, bad)])


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="5 blocks; at least 6"):
        ratio_interval(_blocks(0, 5))


def test_a_quantiles_ratio_is_found() -> None:
    rng = np.random.default_rng(0)
    a = [list(np.exp(rng.normal(0, 0.2, 50))) for _ in range(20)]
    b = [list(1.3 * np.exp(rng.normal(0, 0.2, 50))) for _ in range(20)]
    found = quantile_ratio_interval(a, b, 0.9)
    assert not found.excludes(1.3) and found.excludes(1.0)


def test_verdict_names_the_faster_side_by_how_much_it_does_more() -> None:
    own = _blocks(1, 20, spread=0.01)
    slower = compare(own, _blocks(2, 20, ratio=1.25, spread=0.01), a="vllm", b="trt")
    faster = compare(own, _blocks(2, 20, ratio=0.8, spread=0.01), a="vllm", b="trt")
    assert slower.outcome == "a_faster" and slower.words.startswith("vllm is faster by 2")
    assert faster.outcome == "b_faster" and faster.words.startswith("trt is faster by 2")
    assert slower.interval is not None
    low, high = 100 * (slower.interval.low - 1), 100 * (slower.interval.high - 1)
    assert slower.words.endswith(f"[{low:.1f}, {high:.1f}]")


def test_no_difference_says_what_could_have_been_found() -> None:
    verdict = compare(_blocks(1, 20), _blocks(2, 20))
    assert verdict.outcome == "no_difference"
    assert verdict.detectable is not None
    assert verdict.words == f"no difference shown (detectable: {100 * verdict.detectable:.1f}% or more)"


def test_nothing_below_the_noise_floor_is_claimed() -> None:
    noisy = _blocks(1, 12, spread=0.2)
    floor = noise_floor(ratio_interval(noisy))
    verdict = compare(noisy, _blocks(2, 12, ratio=1 + floor / 3, spread=0.001))
    assert verdict.outcome == "no_difference"


def test_no_verdict_where_a_differs_from_itself() -> None:
    verdict = compare(_blocks(1, 20, ratio=1.5, spread=0.01), _blocks(2, 20))
    assert verdict.outcome == "not_comparable"
    assert verdict.words.startswith("not comparable because A differs from itself by +")


def test_the_number_of_blocks_grows_with_the_spread_and_stays_in_bounds() -> None:
    rule = Precision(0.02, 10, 60)
    counts = [rule.num_blocks(_blocks(1, 10, spread=spread)) for spread in (0.001, 0.03, 0.05, 1.0)]
    assert counts[0] == 10 and counts[-1] == 60
    assert counts == sorted(counts)


@pytest.mark.parametrize(
    "wrong", [{"half_width": 0.0}, {"half_width": 1.0}, {"min_blocks": 3}, {"max_blocks": 9}]
)
def test_a_rule_that_cannot_be_kept_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"allowed|the least"):
        Precision(**wrong)  # type: ignore[arg-type]
