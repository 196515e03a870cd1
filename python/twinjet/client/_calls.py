"""What both clients do around a call: metadata, time limits, batches, waiting for a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from twinjet.client._answers import LoadingProgress, Model
from twinjet.client._errors import DeadlinePassed, ServerFailure, TwinjetClientError, Unavailable
from twinjet.client._events import Completion

Metadata = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
"""Metadata of a call, such as traceparent. Bytes go with names that end in -bin."""

READY_POLL_S = 0.25
"""How often a loading model is asked for its state."""

_FOREVER_S = 1e8
"""A time limit beyond this, three years, is none; gRPC could not represent it."""


def merged_metadata(*parts: Metadata | None) -> tuple[tuple[str, str | bytes], ...]:
    """Join metadata; a name in a later part replaces that of earlier ones. Raises ValueError for what cannot be sent."""
    merged: list[tuple[str, str | bytes]] = []
    for part in parts:
        pairs = part.items() if isinstance(part, Mapping) else part or ()
        added = [(name.lower(), value) for name, value in pairs]
        for name, value in added:
            _check_metadata(name, value)
        names = {name for name, _ in added}
        merged = [pair for pair in merged if pair[0] not in names] + added
    return tuple(merged)


def _check_metadata(name: str, value: str | bytes) -> None:
    if not re.fullmatch(r"[0-9a-z_.-]+", name, re.ASCII):
        raise ValueError(f"{name!r} cannot name metadata; allowed: letters, digits, '_', '.' and '-'")
    if name.endswith("-bin"):
        if not isinstance(value, bytes):
            raise ValueError(f"metadata {name} must be bytes, as its name ends in -bin")
    elif not isinstance(value, str) or not value.isascii() or not value.isprintable():
        raise ValueError(f"metadata {name} must be printable ASCII text; bytes need a name that ends in -bin")


def time_limit(timeout_s: float | None) -> float | None:
    """Give a time limit as gRPC takes it; infinite is None. Raises ValueError unless it is above 0."""
    if timeout_s is None:
        return None
    if math.isnan(timeout_s) or timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s:g}; allowed: above 0, or None")
    return None if timeout_s >= _FOREVER_S else timeout_s


def ready_or_loading(model: Model) -> LoadingProgress | None:
    """Give None if a model is ready, else how far it is. Raises if it will not become ready by itself."""
    match model.state:
        case "ready":
            return None
        case "failed":
            raise ServerFailure(
                f"model {model.name!r} failed: {model.failure}", code="UNAVAILABLE", reason="ENGINE_FAILED"
            )
        case "draining":
            raise Unavailable(f"model {model.name!r} is draining", code="UNAVAILABLE", reason="DRAINING")
    return model.loading or LoadingProgress("", 0.0, 0.0)


def not_ready_in_time(name: str, last: LoadingProgress | None, timeout_s: float) -> DeadlinePassed:
    """Make the error for a model that takes too long."""
    state = f"it is {last.done:.0%} done ({last.phase})" if last else "the server has not answered"
    return DeadlinePassed(
        f"model {name!r} is not ready after {timeout_s:g} s; {state}", code="DEADLINE_EXCEEDED"
    )


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """How far a batch is. failed: those of done that failed. total: None where the streams came without a length."""

    done: int
    failed: int
    total: int | None
    output_tokens: int


class Tally:
    """Collects the results of a batch in the order of its streams."""

    def __init__(self, streams: Iterable[object]) -> None:
        self._total = len(streams) if isinstance(streams, Sequence) else None
        self._results: dict[int, Completion | TwinjetClientError] = {}
        self._num_failed = 0
        self._num_tokens = 0

    def add(self, index: int, result: Completion | TwinjetClientError) -> BatchProgress:
        """Take the result of one stream."""
        self._results[index] = result
        if isinstance(result, Completion):
            self._num_tokens += result.summary.usage.output_tokens
        else:
            self._num_failed += 1
        return BatchProgress(len(self._results), self._num_failed, self._total, self._num_tokens)

    def results(self) -> list[Completion | TwinjetClientError]:
        """Give all results."""
        return [self._results[index] for index in sorted(self._results)]


def check_limit(limit: int) -> None:
    """Raise ValueError unless so many streams can run at once."""
    if limit < 1:
        raise ValueError(f"limit is {limit}; allowed: 1 or more")
