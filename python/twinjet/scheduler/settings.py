"""Settings of one deployment's scheduler: plain types, checked when they are made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**53)]
Weight = Annotated[float, Field(ge=1e-9, le=1e9)]
Share = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0, le=1e9)]
Duration = Annotated[float, Field(ge=0.001, le=1e6)]


class TenantSettings(BaseModel):
    """What one tenant may use. 0 is no limit of its own; the limits of the whole queue hold besides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Weight = 1.0
    """Share of the service relative to other tenants with waiting requests."""
    max_waiting: Count = 0
    """Most requests in the queue."""
    max_waiting_tokens: Count = 0
    """Most prompt tokens in the queue."""
    max_waiting_bytes: Count = 0
    """Most bytes of memory held by its queued requests (an estimate, see queue.request_bytes)."""
    max_streams: Count = 0
    """Quota: most requests waiting and running at once. Of the anonymous tenant's one address leaves a ninth free."""
    tokens_per_minute: Count = 0
    """Quota: prompt and output tokens a minute, as a token bucket that holds one minute's worth."""


class SchedulerSettings(BaseModel):
    """How requests of one deployment queue, in which order they go, and when they are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["fair", "fcfs"] = "fair"
    """fcfs hands every request to the engine at once, whose own queue is first come first served: no limits,
    no quotas, no prediction. It exists to compare with; deadlines are still enforced."""

    max_running: Count = 0
    """Most sequences in the engine (a request with n outputs counts n). 0: the engine's max_num_seqs."""

    early_tokens: Count = 2
    """The next request is handed over when one with a single output is known to end within so many tokens, so
    that its slot is not empty for a step; the engine's own queue holds it until then. 0 waits for the end."""

    max_waiting: Count = 4096
    """Most requests in the queue; 0 is no limit, here and in the next two. Of each one address without a tenant
    leaves a ninth free."""
    max_waiting_tokens: Count = 16_000_000
    """Most prompt tokens in the queue."""
    max_waiting_bytes: Count = 1 << 30
    """Most bytes of memory held by queued requests (an estimate)."""

    default_tenant: TenantSettings = TenantSettings()
    """For each tenant not named in tenants, the anonymous one ("") included."""
    tenants: dict[str, TenantSettings] = Field(default_factory=dict)
    """By tenant name."""
    address_tokens_per_minute: Count = 0
    """Quota: tokens_per_minute for each address that requests without a tenant come from; 0 is no limit. That of all of
    them together holds besides."""

    input_token_weight: Amount = 1.0
    """What one prompt token that the engine must compute counts in fair sharing."""
    cached_token_weight: Amount = 0.1
    """What one prompt token found in the prefix cache counts."""
    output_token_weight: Amount = 2.0
    """What one output token counts."""

    tenant_order: Literal["fifo", "shortest"] = "fifo"
    """Order of one tenant's requests of one priority: by arrival or by prompt length."""
    prefix_window: Count = 4
    """How many of a tenant's next requests are looked at for the longest cached prefix; 0 or 1 is off."""
    max_overtakes: Count = 16
    """How often a tenant's oldest request may be overtaken by others of its tenant and priority."""
    max_bypass: Count = 16
    """How many requests may go before the one whose turn it is while that one does not fit the KV cache."""
    priority_patience: Count = 64
    """After so many dispatches from higher classes a waiting lower class gets one; 0 is never."""
    max_priority: Annotated[int, Field(ge=0, le=100)] = 100
    """Highest priority that clients may ask for; whoever may ask for more than others goes before them."""

    output_reserve: Literal["estimate", "max"] = "estimate"
    """KV blocks kept for outputs to come: by the learnt distribution of output lengths, or max_tokens of
    every request, which rules out preemption and costs concurrency."""
    reserve_sigmas: Amount = 3.0
    """estimate: standard deviations added to the predicted use of the KV cache."""
    default_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = 256
    """estimate: mean output length assumed until enough requests have finished."""
    kv_headroom: Share = 0.02
    """Share of the KV blocks that admission leaves free."""
    lookahead_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 2
    """Slots a sequence may hold in the engine ahead of the tokens seen here."""

    predict_deadlines: bool = True
    """Refuse at once what is predicted to miss its deadline."""
    deadline_confidence: Annotated[float, Field(gt=0, le=1)] = 0.8
    """The predicted time is multiplied by this before it is held against the deadline; lower refuses less."""

    report_interval_s: Duration = 0.5
    """Least time between two queued events of one request, in seconds."""
    min_retry_s: Duration = 0.1
    """Least retry delay told to a refused client, in seconds."""
    max_retry_s: Duration = 60.0
    """Greatest retry delay told to a refused client, in seconds."""
    loading_retry_s: Duration = 5.0
    """Retry delay told while no engine is ready, in seconds."""

    def tenant(self, name: str) -> TenantSettings:
        return self.tenants.get(name, self.default_tenant)
