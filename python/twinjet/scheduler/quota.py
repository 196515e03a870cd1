"""Quotas: a token bucket, and retry delays that spread refused clients over the time to come."""

from __future__ import annotations


class TokenBucket:
    """Tokens a minute, holding at most one minute's worth.

    Outputs are charged as they stream, so the level may fall below zero;
    nothing passes until it is paid back.
    """

    def __init__(self, tokens_per_minute: int, now: float) -> None:
        self._capacity = float(tokens_per_minute)
        self._rate = tokens_per_minute / 60.0
        self._level = self._capacity
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self._capacity, self._level + max(0.0, now - self._at) * self._rate)
        self._at = max(now, self._at)
        return self._level

    def wait_s(self, now: float, tokens: float, promised: float = 0.0) -> float:
        """Seconds until `tokens` may be taken, 0 if now. More than a bucketful waits for a full bucket.

        promised: tokens of requests let in that will be taken later.
        """
        missing = min(tokens, self._capacity) - (self.level(now) - promised)
        return missing / self._rate if missing > 0 else 0.0

    def take(self, tokens: float) -> None:
        self._level -= tokens


class RetryPacer:
    """Gives each refused client a later time to come back, one drained request apart.

    If all were told the same delay they would return together and be refused together.
    """

    def __init__(self, min_s: float, max_s: float) -> None:
        self._min = min_s
        self._max = max_s
        self._next = 0.0

    def delay_s(self, now: float, interval_s: float) -> float:
        """Seconds until the next free place that nobody was told of yet; interval_s: between two places."""
        self._next = min(max(self._next, now) + interval_s, now + self._max)
        return min(max(self._next - now, self._min), self._max)
