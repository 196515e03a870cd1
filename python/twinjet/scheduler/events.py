"""What the scheduler tells: events of a stream before the engine's own, and readings of its load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Refusal = Literal["deadline", "quota", "queue_full", "too_large"]
"""Why the queue did not take a request."""


@dataclass(frozen=True, slots=True)
class QueuedEvent:
    """The request waits. position: how many waiting requests are expected to go earlier; 0 is next.

    expected_wait_s: predicted seconds until it goes; None is not known yet.
    """

    position: int
    expected_wait_s: float | None


@dataclass(frozen=True, slots=True)
class DispatchedEvent:
    """The request was handed to the engine. queue_s: seconds it waited."""

    queue_position_at_arrival: int
    queue_s: float


@dataclass(frozen=True, slots=True)
class TenantReading:
    """Load of one tenant. served_tokens: weighted, since the dispatcher was made."""

    waiting: int
    running: int
    served_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLoad:
    """Load of one deployment.

    waiting, running: requests. waiting_tokens: prompt tokens. kv_blocks_*: the ledger's view, None without a
    ledger. *_tokens_per_s: over the last ten seconds. refused, expired: requests since the dispatcher was
    made. refused_by_reason: the same by deadline, quota, queue_full and too_large. kv_overflows: tokens since
    then for which the ledger had no room, each a possible preemption.
    """

    waiting: int
    running: int
    waiting_tokens: int
    tenants: Mapping[str, TenantReading] = field(default_factory=dict)
    request_ids: tuple[str, ...] = ()
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    kv_blocks_total: int | None
    kv_blocks_used: int | None
    kv_overflows: int
    refused: int
    refused_by_reason: Mapping[Refusal, int]
    expired: int
    expected_wait_s: float | None
