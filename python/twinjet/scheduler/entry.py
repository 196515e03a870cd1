"""One request inside the scheduler, and whom it is accounted to: a tenant, and a client of the anonymous one."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Final

from twinjet.request import EngineRequest

if TYPE_CHECKING:
    from twinjet._core import LengthEstimator
    from twinjet.scheduler.quota import TokenBucket
    from twinjet.scheduler.settings import TenantSettings


class State(Enum):
    WAITING = 0
    RUNNING = 1
    ENDED = 2


# An Enum class is slow to read a member from.
WAITING: Final = State.WAITING
RUNNING: Final = State.RUNNING
ENDED: Final = State.ENDED


class Tenant:
    """One tenant's account. counter: virtual tokens, weighted service divided by the tenant's weight.

    own_lengths: of the tenant's outputs; lengths: what to go by, of all tenants' until the own tell enough.
    first_lengths: length and whether complete of its outputs, until there are enough for own_lengths.
    index: a small number of its own while it has requests, but for the anonymous tenant, whose clients have theirs. has_quota, has_limits: whether any quota, any limit of its waiting requests is set.
    """

    __slots__ = (
        "bucket", "counter", "first_lengths", "has_limits", "has_quota", "index", "lengths", "name", "num_running",
        "num_waiting", "own_lengths", "served", "settings", "waiting_bytes", "waiting_tokens", "weight",
    )  # fmt: skip

    def __init__(
        self, name: str, settings: TenantSettings, bucket: TokenBucket | None, lengths: LengthEstimator
    ) -> None:
        self.name = name
        self.settings = settings
        self.weight = settings.weight
        self.bucket = bucket
        self.has_quota = bucket is not None or settings.max_streams > 0
        self.has_limits = any((settings.max_waiting, settings.max_waiting_tokens, settings.max_waiting_bytes))
        self.counter = 0.0
        self.index = -1
        self.lengths = lengths
        self.own_lengths: LengthEstimator | None = None
        self.first_lengths: list[tuple[int, bool]] = []
        self.served = 0.0
        self.num_waiting = 0
        self.num_running = 0
        self.waiting_tokens = 0
        self.waiting_bytes = 0


class Client:
    """One address from which requests come that name no tenant. counter, index, bucket: as a Tenant's, by weight 1.

    name: the address, "" where it is unknown. tenant: the anonymous one, which has all of this in its own account too.
    """

    __slots__ = (
        "bucket", "counter", "index", "name", "num_running", "num_waiting", "tenant", "waiting_bytes",
        "waiting_tokens",
    )  # fmt: skip

    def __init__(self, name: str, tenant: Tenant, bucket: TokenBucket | None) -> None:
        self.name = name
        self.tenant = tenant
        self.bucket = bucket
        self.counter = 0.0
        self.index = -1
        self.num_waiting = 0
        self.num_running = 0
        self.waiting_tokens = 0
        self.waiting_bytes = 0


Account = Tenant | Client


class Entry:
    """One request from offer to release. Times are seconds of the scheduler's clock.

    account: the client, if the tenant is the anonymous one; else the tenant. order: arrival. key: place among the tenant's requests, least first. is_fixed: outputs will have max_tokens.
    What decisions need of the request is kept here: by then the request itself has left the CPU's caches.
    """

    __slots__ = (
        "account", "arrival", "deadline", "dispatched_at", "expected_output", "expired", "first_token_at", "holding",
        "is_fixed", "is_leaving", "key", "last_token_at", "leaves_at", "max_tokens", "num_bytes", "num_finished",
        "num_output_tokens", "num_prompt_tokens", "num_sequences", "order", "position_at_arrival",
        "prefix_hashes", "priority", "request", "request_id", "state", "tenant", "work",
    )  # fmt: skip

    def __init__(
        self, request: EngineRequest, account: Account, order: int, arrival: float, num_bytes: int
    ) -> None:
        self.request = request
        self.account = account
        self.tenant = account.tenant if isinstance(account, Client) else account
        self.order = order
        self.key = order
        self.arrival = arrival
        self.deadline = math.inf if request.deadline is None else request.deadline
        self.priority = request.priority
        self.num_prompt_tokens = len(request.prompt_token_ids)
        sampling = request.sampling
        self.num_sequences = sampling.n
        self.max_tokens = 1 if request.prefill_only else sampling.max_tokens
        self.is_fixed = sampling.ignore_eos and not sampling.stop
        self.request_id = request.request_id
        self.num_bytes = num_bytes
        self.state: State = WAITING
        self.position_at_arrival = 0
        self.expected_output = 0.0
        self.work = 0.0
        self.expired = False
        self.prefix_hashes = b""
        self.holding: int | None = None
        self.num_output_tokens = 0
        self.num_finished = 0
        self.is_leaving = False
        self.leaves_at: float = math.inf
        self.dispatched_at = 0.0
        self.first_token_at: float | None = None
        self.last_token_at = 0.0


def request_bytes(request: EngineRequest) -> int:
    """Memory that a queued request holds, in bytes: an estimate that counts what can grow.

    A token id costs a pointer and an int object (36 bytes), each setting that is a collection its entries.
    """
    s = request.sampling
    size = 2048 + 36 * len(request.prompt_token_ids)
    if s.logit_bias or s.allowed_token_ids or s.stop_token_ids:
        size += 100 * len(s.logit_bias) + 36 * (len(s.allowed_token_ids) + len(s.stop_token_ids))
    if s.stop or s.bad_words:
        size += sum(64 + len(text) for text in (*s.stop, *s.bad_words))
    if s.constraint is not None:
        size += len(s.constraint.value) + sum(64 + len(c) for c in s.constraint.choices)
    return size
