"""Load reports for load balancers: what they say, over times they are given, and their wire form.

Open Request Cost Aggregation, message xds.data.orca.v3.OrcaLoadReport. A weighted round robin, gRPC's or Envoy's,
gives an endpoint the weight rps / (utilization + penalty * eps / rps), and passes over a report in which rps or
utilization is 0. So both are averages over the same seconds, those in which there was work: an idle server keeps
the weight it has earned, and one that refuses everything at once, which is quick, does not look fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from twinjet.protobuf_bytes import double_field, field
from twinjet.scheduler.events import SchedulerLoad

TRAILER: Final = "endpoint-load-metrics-bin"

MIN_UTILIZATION: Final = 0.01
"""What an idle server reports, since balancers pass over 0."""

MEMORY_S: Final = 2.0
MIN_MEMORY_S: Final = 0.5
"""Time constant of the averages, at most and at least: a server that slows down is found out within a second or two."""

MEMORY_REQUESTS: Final = 40
"""Requests that the averages are over: of fewer they are no steadier than the answers are alike, of more they are late."""

_MIN_RPS: Final = 0.01

ENVOY_SCALE: Final = 0.001
"""Envoy's weights are whole numbers, and long answers mean fewer than one request a second: without this, all get 1."""


@dataclass(frozen=True, slots=True)
class OrcaReport:
    """One load report.

    application_utilization: see utilization_of; above 1 under overload. rps: requests served a second. eps: those
    failed or refused a second. utilization: shares from 0 to 1. named_metrics: anything.
    """

    application_utilization: float
    rps: float
    eps: float
    utilization: Mapping[str, float]
    named_metrics: Mapping[str, float]

    def encode(self) -> bytes:
        """Protobuf wire form."""
        parts = [
            double_field(number, value)
            for number, value in ((6, self.rps), (7, self.eps), (9, self.application_utilization))
            if value
        ]
        for number, values in ((5, self.utilization), (8, self.named_metrics)):
            for key, value in values.items():
                name = key.encode()
                parts.append(field(number, field(1, name) + double_field(2, value)))
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class DeploymentLoad:
    """A reading of one deployment. max_running: sequences that may run at once; 0 while it has no engine."""

    name: str
    load: SchedulerLoad
    max_running: int


class ServedLoad:
    """Averages of what a server does, for its reports. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._utilization = 0.0
        self._rps = 0.0
        self._eps = 0.0
        self._sampled_at: float | None = None
        self._num_served = 0
        self._num_failed = 0

    def count(self, *, failed: bool) -> None:
        """A request came to its end. failed: refused for overload, or failed by our fault."""
        if failed:
            self._num_failed += 1
        else:
            self._num_served += 1

    def sample(self, now: float, deployments: Iterable[DeploymentLoad]) -> None:
        """Take a reading, several times a second."""
        since_s = 0.0 if self._sampled_at is None else max(0.0, now - self._sampled_at)
        self._sampled_at = now
        memory_s = min(max(MEMORY_REQUESTS / (self._rps + self._eps or 1.0), MIN_MEMORY_S), MEMORY_S)
        share = -math.expm1(-since_s / memory_s)
        # What a request adds, so that a steady rate is told as it is however seldom the readings are.
        gain = share / since_s if since_s else 1.0 / memory_s
        self._eps += gain * self._num_failed - share * self._eps
        self._num_failed = 0
        readings = list(deployments)
        served = gain * self._num_served
        self._num_served = 0
        if any(d.load.running or d.load.waiting for d in readings):
            self._rps -= share * self._rps
            self._utilization += share * (utilization_of(readings) - self._utilization)
        self._rps += served

    def report(self, deployments: Iterable[DeploymentLoad], *, details: bool) -> OrcaReport:
        """Report the averages, and the state as read. details: by deployment, too."""
        readings = list(deployments)
        named = {
            "waiting": float(sum(d.load.waiting for d in readings)),
            "running": float(sum(d.load.running for d in readings)),
            "waiting_tokens": float(sum(d.load.waiting_tokens for d in readings)),
            "output_tokens_per_second": sum(d.load.output_tokens_per_s for d in readings),
            "utilization": utilization_of(readings),
        }
        waits = [d.load.expected_wait_s for d in readings if d.load.expected_wait_s is not None]
        if waits:
            named["expected_wait_s"] = max(waits)
        if details:
            for d in readings:
                named[f"{d.name}.kv_cache_utilization"] = _kv_share(d.load)
                named[f"{d.name}.waiting"] = float(d.load.waiting)
                named[f"{d.name}.running"] = float(d.load.running)
                named[f"{d.name}.serving"] = float(d.max_running > 0)
        kv = max((_kv_share(d.load) for d in readings), default=0.0)
        named["kv_cache_utilization"] = kv
        utilization = max(self._utilization, MIN_UTILIZATION)
        named["scaled_utilization"] = utilization * ENVOY_SCALE
        has_begun = self._rps > 0 or self._eps > 0
        return OrcaReport(
            application_utilization=utilization,
            rps=max(self._rps, _MIN_RPS) if has_begun else 0.0,
            eps=self._eps if self._eps > _MIN_RPS else 0.0,
            utilization={"kv_cache": min(kv, 1.0)},
            named_metrics=named,
        )


def utilization_of(deployments: Iterable[DeploymentLoad]) -> float:
    """How full the fullest deployment is: running slots or KV blocks, plus the queue in units of the slots."""
    return max(
        (
            max(d.load.running / d.max_running, _kv_share(d.load)) + d.load.waiting / d.max_running
            for d in deployments
            if d.max_running
        ),
        default=0.0,
    )


def _kv_share(load: SchedulerLoad) -> float:
    return (load.kv_blocks_used or 0) / load.kv_blocks_total if load.kv_blocks_total else 0.0
