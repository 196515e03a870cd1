"""The length estimate of the scheduler, said with numpy: whole arrays at a time, nothing kept."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_EDGES: Final[Floats] = np.unique(np.floor(2.0 ** (np.arange(0, 81) / 4))) - 1.0
"""Bin edges in tokens, four to the octave: 0, 1, 2, 3, 4, ... 2**20 - 1."""

_PRIOR_WEIGHT: Final = 8.0
_SHORTEST_MEMORY: Final = 64
_SMALLEST_LOG: Final = -30.0


class LengthModel:
    """Survival function of output lengths, by the product-limit estimator (Kaplan and Meier 1958).

    An output cut short by max_tokens, a cancellation or an abort says only that it would have been longer;
    the estimator uses just that. Bins are a quarter of an octave, the hazard inside one is constant. Until
    data outweighs it, lengths are taken as geometric with mean `prior_mean`.
    """

    def __init__(self, prior_mean: float, *, memory: int = 1000) -> None:
        size = len(_EDGES) - 1
        widths = np.diff(_EDGES)
        self._growth = 1.0 + 1.0 / memory
        self._weight = 1.0
        self._ended = [0.0] * size
        self._left = [0.0] * size
        self._prior_hazard = -np.expm1(-widths / prior_mean)
        self._prior_risk = _PRIOR_WEIGHT * np.maximum(np.exp(-_EDGES[:-1] / prior_mean), 1e-4)
        self._edges: list[float] = _EDGES.tolist()
        self.num_observed = 0
        self._num_fresh = 1

    def observe(self, length: int, *, complete: bool) -> None:
        """Learn from one output. complete: it ended by itself, not because something cut it short."""
        b = min(bisect_right(self._edges, length) - 1, len(self._left) - 1)
        self._left[b] += self._weight
        if complete:
            self._ended[b] += self._weight
        self._weight *= self._growth
        if self._weight > 1e6:
            self._left = [x / self._weight for x in self._left]
            self._ended = [x / self._weight for x in self._ended]
            self._weight = 1.0
        self.num_observed += 1
        self._num_fresh += 1

    def survival(self, start: float, times: Floats) -> Floats:
        """Probability that an output of `start` tokens gets over times[k] tokens more; times[0] is 0."""
        self._renew()
        logs = np.interp(times + start, _EDGES, self._log)
        logs -= logs[0]
        survival: Floats = np.exp(logs, logs)
        return survival

    def survival_near(self, start: int, times: Floats) -> Floats:
        """As survival(), from the lower edge of the bin of `start`."""
        return self.survival(self._edges[bisect_right(self._edges, start) - 1], times)

    def mean(self, limit: float) -> float:
        """Expected length of an output that may have at most `limit` tokens."""
        self._renew()
        edges = self._edges
        b = min(bisect_right(edges, limit) - 1, len(edges) - 2)
        share = (limit - edges[b]) / (edges[b + 1] - edges[b])
        return self._area[b] + min(share, 1.0) * (self._area[b + 1] - self._area[b])

    def _renew(self) -> None:
        """Make the distribution anew once enough was observed: the first times at once, then by eighths."""
        if self._num_fresh < min(64, 1 + self.num_observed // 8):
            return
        self._num_fresh = 0
        left = np.asarray(self._left) / self._weight
        ended = np.asarray(self._ended) / self._weight
        # Those cut short inside a bin were at risk for half of it.
        at_risk = np.cumsum(left[::-1])[::-1] - 0.5 * (left - ended)
        risk = at_risk + self._prior_risk
        hazard = np.minimum((ended + self._prior_risk * self._prior_hazard) / risk, 1.0 - 1e-9)
        logs = np.concatenate(([0.0], np.cumsum(np.log1p(-hazard))))
        self._log = np.maximum(logs, _SMALLEST_LOG)
        survival = np.exp(self._log)
        areas = np.concatenate(([0.0], np.cumsum((survival[1:] + survival[:-1]) / 2 * np.diff(_EDGES))))
        self._area: list[float] = areas.tolist()


def horizon(longest: int) -> Floats:
    """Steps ahead at which use of the KV cache is predicted: 0, 16, then two to the octave past `longest`."""
    octaves = max(1.0, math.log2(max(longest, 32)) - 4 + 1)
    steps = 16 * 2.0 ** (np.arange(0, 2 * math.ceil(octaves) + 1) / 2)
    times: Floats = np.concatenate(([0.0], np.floor(steps)))
    return times
