"""Speeds measured while requests run: tokens over a window, and means that forget."""

from __future__ import annotations

import math


class WindowRate:
    """Amount per second over the last `window_s` seconds, in whole-second buckets."""

    __slots__ = ("_buckets", "_first_s", "_index", "_second", "_size", "_started", "_window")

    def __init__(self, window_s: int = 10) -> None:
        self._window = window_s
        self._size = window_s + 1
        self._buckets = [0.0] * self._size
        self._second = 0
        self._index = 0
        self._started = False
        self._first_s = 0.0

    def add(self, now: float, amount: float) -> None:
        if now >= self._second + 1:
            self._advance(now, int(now))
        self._buckets[self._index] += amount

    def rate(self, now: float) -> float:
        """Amount per second; the part of the window before the first amount does not count."""
        if not self._started:
            return 0.0
        second = int(now)
        if second != self._second:
            self._advance(now, second)
        span = min(float(self._window) + (now - second), now - self._first_s)
        return sum(self._buckets) / max(span, 1.0)

    def _advance(self, now: float, second: int) -> None:
        if not self._started:
            self._started = True
            self._first_s = now
        size = self._size
        for s in range(max(self._second + 1, second - size + 1), second + 1):
            self._buckets[s % size] = 0.0
        self._second = second
        self._index = second % size


class ForgetfulMean:
    """Mean of samples in which older ones count less; unknown again `max_age_s` after the last sample.

    A stale speed must not decide: a deployment that refuses everything by it would never measure again.
    """

    __slots__ = ("_at", "_max_age", "_mean", "_share")

    def __init__(self, *, share: float = 0.05, max_age_s: float = 30.0) -> None:
        self._share = share
        self._max_age = max_age_s
        self._mean: float | None = None
        self._at = 0.0

    def add(self, now: float, sample: float) -> None:
        if self._mean is None or now - self._at > self._max_age:
            self._mean = sample
        else:
            self._mean += self._share * (sample - self._mean)
        self._at = now

    def value(self, now: float) -> float | None:
        return None if self._mean is None or now - self._at > self._max_age else self._mean


class BackloggedRate:
    """Work per second while requests waited, that is the speed at which a queue drains.

    Time without a queue does not count: a quiet server is not a slow one. Older time counts less, by a
    factor e each `memory_s`.
    """

    __slots__ = ("_at", "_fresh_time", "_fresh_work", "_memory", "_min", "_step", "_time", "_total", "_work")

    def __init__(self, *, memory_s: float = 30.0, min_s: float = 1.0, step_s: float = 0.05) -> None:
        self._memory = memory_s
        self._min = min_s
        self._step = step_s
        self._fresh_time = 0.0
        self._fresh_work = 0.0
        self._at: float | None = None
        self._total = 0.0
        self._work = 0.0
        self._time = 0.0

    def observe(self, now: float, total: float, *, backlogged: bool) -> None:
        """total: all work done so far. backlogged: requests waited since the last call."""
        if self._at is not None and backlogged:
            self._fresh_time += now - self._at
            self._fresh_work += total - self._total
            if self._fresh_time >= self._step:
                keep = math.exp(-self._fresh_time / self._memory)
                self._time = self._time * keep + self._fresh_time
                self._work = self._work * keep + self._fresh_work
                self._fresh_time = self._fresh_work = 0.0
        self._at = now
        self._total = total

    def rate(self, now: float) -> float | None:
        """Work per second; None before `min_s` seconds with a queue, or if nothing was done in them."""
        if self._time < self._min or self._work <= 0:
            return None
        return self._work / self._time
