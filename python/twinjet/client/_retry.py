"""When a call may be tried again: only what has given nothing yet, within bounds, never past the deadline."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import NamedTuple

from twinjet.client._errors import DeadlinePassed, Overloaded, TwinjetClientError, Unavailable

ENGINE_DIED_RUNNING = "ENGINE_DIED_RUNNING"
"""The server's word for an engine that died while it had this very request."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently.

    attempts: tries in all, at least 1 (1: never again). first_delay_s doubles with each try where the server does
    not say when to come back; jitter is added. max_delay_s: a server that asks for more patience than this is not
    waited for.
    """

    attempts: int = 4
    first_delay_s: float = 0.2
    max_delay_s: float = 30.0


class Pause(NamedTuple):
    """Seconds to wait before the next try. Between the two, a server that says it serves again ends the wait."""

    at_least_s: float
    at_most_s: float

    @property
    def may_end_early(self) -> bool:
        return self.at_least_s < self.at_most_s


class Attempts:
    """The tries of one call, whose deadline they share. timeout_s: None is no deadline."""

    def __init__(self, policy: RetryPolicy, timeout_s: float | None) -> None:
        self._policy = policy
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._num_failed = 0

    @property
    def remaining_s(self) -> float | None:
        """Seconds left for the next try. Raises DeadlinePassed if there are none."""
        if self._deadline is None:
            return None
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlinePassed("the deadline passed before the call began", code="DEADLINE_EXCEEDED")
        return left_s

    def pause_after(self, error: TwinjetClientError) -> Pause:
        """Say how long to wait before the next try; raises the error itself if there is none.

        A request that an engine had when it died is not sent again: it may be what ended the engine.
        An overload is only tried again if the server says when: without RetryInfo it is a limit, such as a
        message's size, that will hold next time too.
        """
        self._num_failed += 1
        is_safe = (isinstance(error, Unavailable) and error.reason != ENGINE_DIED_RUNNING) or (
            isinstance(error, Overloaded) and error.retry_after_s is not None
        )
        if not is_safe or self._num_failed >= self._policy.attempts:
            raise error
        backoff_s = min(self._policy.max_delay_s, self._policy.first_delay_s * 2.0 ** (self._num_failed - 1))
        asked_s = error.retry_after_s
        jitter_s = random.uniform(0, 0.2) * backoff_s
        delay_s = (asked_s if asked_s is not None else backoff_s) + jitter_s
        if asked_s is not None and asked_s > self._policy.max_delay_s:
            raise error
        if self._deadline is not None and time.monotonic() + delay_s >= self._deadline:
            raise error
        # A model that loads or restarts says roughly when it will be back; its health says it exactly.
        least_s = min(delay_s, backoff_s + jitter_s) if isinstance(error, Unavailable) else delay_s
        return Pause(least_s, delay_s)
