"""Is B faster than A, by how much, and how sure is that: intervals for ratios of paired blocks. Pure.

A block is a set of requests that both arms ran close together in time, A B B A, so that what drifts slowly hits
both alike. Requests within a block disturb each other; blocks are as good as independent, and so they are what is
resampled. Every random choice comes from a seed: the same data give the same words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Confidence of the intervals that verdicts rest on."""
SELF_TEST_LEVEL = 0.99
"""Confidence at which A must not differ from itself; higher, since a lucky failure costs the whole run."""
NUM_RESAMPLES = 2000
MIN_BLOCKS = 6
"""Fewer blocks give no interval worth the name."""
_POWER_Z = 1.2815515655446004
"""Standard normal quantile of 0.9: what is called detectable is found in nine of ten runs."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BlockTotals:
    """One block's cost in each arm, same requests on both sides: seconds, or seconds a token. Each above 0."""

    a: float
    b: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio B / A with its confidence interval. num_blocks: how many blocks it rests on."""

    ratio: float
    low: float
    high: float
    num_blocks: int

    @property
    def half_width(self) -> float:
        """Half the width relative to the ratio: 0.02 is plus or minus 2%."""
        return (self.high - self.low) / (2 * self.ratio)

    def excludes(self, ratio: float) -> bool:
        """Whether the interval leaves this ratio out."""
        return not self.low <= ratio <= self.high


def ratio_interval(
    blocks: Sequence[BlockTotals],
    *,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Give the ratio of sums B / A and its bootstrap interval over blocks.

    The percentile interval is too narrow with few blocks, by the factor that the normal falls short of Student's t and
    the plug-in variance of the unbiased one; the tails are widened by just that (Hesterberg, "What teachers
    should know about the bootstrap", 2015: expanded percentile interval).
    Raises ValueError for fewer than MIN_BLOCKS blocks or a total that is not a positive number.
    """
    totals = _totals(blocks)
    n = len(totals)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, n, size=(num_resamples, n))
    sums = totals[picks].sum(axis=1)
    ratios = sums[:, 1] / sums[:, 0]
    tail = _normal_cdf(-math.sqrt(n / (n - 1)) * t_quantile(0.5 + level / 2, n - 1))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    whole = totals.sum(axis=0)
    return Interval(float(whole[1] / whole[0]), float(low), float(high), n)


def quantile_ratio_interval(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    quantile: float,
    *,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Give the ratio of a quantile (0.99 for p99) of B to A, resampling whole blocks.

    a, b: one sequence of values (seconds) a block, the same blocks in both. Raises ValueError as ratio_interval.
    """
    if len(a) != len(b) or len(a) < MIN_BLOCKS:
        raise ValueError(f"{len(a)} and {len(b)} blocks; needed: as many in both, at least {MIN_BLOCKS}")
    n = len(a)
    sides = [[np.asarray(block, dtype=np.float64) for block in side] for side in (a, b)]
    if any(not len(block) or not (block > 0).all() for side in sides for block in side):
        raise ValueError("every block needs at least one value, and each must be above 0")
    rng = np.random.default_rng(seed)
    ratios = np.empty(num_resamples)
    for i in range(num_resamples):
        picks = rng.integers(0, n, size=n)
        value_a, value_b = (np.quantile(np.concatenate([side[p] for p in picks]), quantile) for side in sides)
        ratios[i] = value_b / value_a
    tail = _normal_cdf(-math.sqrt(n / (n - 1)) * t_quantile(0.5 + level / 2, n - 1))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    whole_a, whole_b = (float(np.quantile(np.concatenate(side), quantile)) for side in sides)
    return Interval(whole_b / whole_a, float(low), float(high), n)


@dataclass(frozen=True, slots=True)
class Precision:
    """The rule that fixes how many blocks a comparison gets, before its first one is run.

    half_width: wanted half width of the 95% interval, relative (0.02 is 2%). min_blocks, max_blocks: bounds.
    """

    half_width: float = 0.02
    min_blocks: int = 10
    max_blocks: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.half_width < 1:
            raise ValueError(f"a half width of {self.half_width:g}; allowed: above 0, below 1")
        if not MIN_BLOCKS <= self.min_blocks <= self.max_blocks:
            raise ValueError(
                f"{self.min_blocks} to {self.max_blocks} blocks; the least is {MIN_BLOCKS}, and at most the most"
            )

    def num_blocks(self, self_test: Sequence[BlockTotals]) -> int:
        """Give the number of blocks, from A against itself alone: what A against B shows plays no part in it.

        The spread of few blocks is itself uncertain, so its upper 80% bound is planned with.
        """
        totals = _totals(self_test)
        n = len(totals)
        spread = float(np.std(np.log(totals[:, 1] / totals[:, 0]), ddof=1))
        spread *= math.sqrt((n - 1) / _chi_square_quantile(0.2, n - 1))
        for count in range(self.min_blocks, self.max_blocks):
            if t_quantile(0.5 + LEVEL / 2, count - 1) * spread / math.sqrt(count) <= self.half_width:
                return count
        return self.max_blocks


Outcome = Literal["a_faster", "b_faster", "no_difference", "not_comparable"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be said of A and B. words: the sentence. detectable: smallest relative difference found in 9 of 10 runs."""

    outcome: Outcome
    words: str
    interval: Interval | None = None
    noise_floor: float | None = None
    detectable: float | None = None


def noise_floor(self_test: Interval) -> float:
    """Give the largest relative difference that A shows to itself with 95% confidence."""
    return max(abs(self_test.low - 1), abs(self_test.high - 1))


def compare(
    self_test: Sequence[BlockTotals],
    blocks: Sequence[BlockTotals],
    *,
    a: str = "A",
    b: str = "B",
    seed: int = 0,
    drift: float = 0.0,
) -> Verdict:
    """Judge B against A from A's blocks against itself and the comparison's own.

    Totals are costs, so the arm with the smaller is the faster. Nothing below the noise floor is claimed, and
    nothing at all where A differs from itself. drift: relative difference that the conditions of both sides are known
    to have had, where they did not run side by side; it raises the floor. Raises ValueError as ratio_interval.
    """
    found = ratio_interval(self_test, level=SELF_TEST_LEVEL, seed=seed)
    if found.excludes(1):
        return not_comparable(
            f"{a} differs from itself by {_percent(found.ratio - 1)}% "
            f"[{_percent(found.low - 1)}, {_percent(found.high - 1)}]: the machine or the load is not steady"
        )
    own = ratio_interval(self_test, seed=seed)
    interval = ratio_interval(blocks, seed=seed + 1)
    # A self-test of fewer blocks than the comparison is the wider for it; scaled to the same number.
    floor = max(drift, noise_floor(own) * math.sqrt(min(1.0, own.num_blocks / interval.num_blocks)))
    detectable = max(
        floor, interval.half_width * (1 + _POWER_Z / t_quantile(0.5 + LEVEL / 2, interval.num_blocks - 1))
    )
    if not interval.excludes(1) or abs(interval.ratio - 1) < floor:
        words = f"no difference shown (detectable: {100 * detectable:.1f}% or more)"
        return Verdict("no_difference", words, interval, floor, detectable)
    if interval.ratio > 1:
        gain, low, high, faster = interval.ratio - 1, interval.low - 1, interval.high - 1, a
    else:
        gain, low, high, faster = 1 / interval.ratio - 1, 1 / interval.high - 1, 1 / interval.low - 1, b
    words = f"{faster} is faster by {100 * gain:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    outcome: Outcome = "a_faster" if interval.ratio > 1 else "b_faster"
    return Verdict(outcome, words, interval, floor, detectable)


def not_comparable(reason: str) -> Verdict:
    """Give the verdict that says why there is none."""
    return Verdict("not_comparable", f"not comparable because {reason}")


def _percent(value: float) -> str:
    return f"{100 * value:+.1f}"


def _totals(blocks: Sequence[BlockTotals]) -> Floats:
    if len(blocks) < MIN_BLOCKS:
        raise ValueError(f"{len(blocks)} blocks; at least {MIN_BLOCKS} are needed")
    totals = np.array([(block.a, block.b) for block in blocks], dtype=np.float64)
    if not (np.isfinite(totals) & (totals > 0)).all():
        raise ValueError("a block's totals must be positive numbers")
    return totals


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def t_quantile(p: float, degrees: int) -> float:
    """Give Student's t quantile for 0.5 <= p < 1, by bisection of its distribution function.

    Own code since scipy is no dependency of the product; tests hold it against scipy.
    """
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, degrees: int) -> float:
    # Abramowitz and Stegun 26.7.3 and 26.7.4: finite sums for whole degrees of freedom.
    theta = math.atan2(t, math.sqrt(degrees))
    cos, sin = math.cos(theta), math.sin(theta)
    if degrees % 2:
        term, total = cos, 0.0
        for i in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= cos * cos * (2 * i) / (2 * i + 1)
        share = 2 / math.pi * (theta + sin * total)
    else:
        term, total = 1.0, 0.0
        for i in range(1, degrees // 2 + 1):
            total += term
            term *= cos * cos * (2 * i - 1) / (2 * i)
        share = sin * total
    return 0.5 + share / 2


def _chi_square_quantile(p: float, degrees: int) -> float:
    # Wilson and Hilferty's approximation, within a percent from five degrees on.
    z = _normal_quantile(p)
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + z * math.sqrt(spread)) ** 3)


def _normal_quantile(p: float) -> float:
    low, high = -40.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _normal_cdf(middle) < p else (low, middle)
    return (low + high) / 2
