"""Prometheus metrics of the endpoint picker, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from twinjet.epp.picking import EndpointPicker, Pick

_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1)


class _StateCollector(Collector):
    def __init__(self, picker: EndpointPicker) -> None:
        self._picker = picker

    def collect(self) -> Iterable[Metric]:
        """Asked in a thread of its own: reads only what one look at a dict gives."""
        up = GaugeMetricFamily("twinjet_epp_replica_up", "Whether a replica answers", labels=["replica"])
        flying = GaugeMetricFamily(
            "twinjet_epp_in_flight", "Requests sent there and not ended", labels=["replica"]
        )
        for replica in list(self._picker.replicas.values()):
            try:
                flying.add_metric([replica.address], self._picker.num_in_flight(replica))
            except KeyError:
                # It has gone meanwhile.
                continue
            up.add_metric([replica.address], float(replica.is_up))
        blocks = GaugeMetricFamily("twinjet_epp_index_blocks", "Blocks at replicas", labels=["index"])
        size = GaugeMetricFamily("twinjet_epp_index_bytes", "Memory of an index", labels=["index"])
        for name, (num_blocks, num_bytes) in self._picker.index_sizes().items():
            blocks.add_metric([name], num_blocks)
            size.add_metric([name], num_bytes)
        return [up, flying, blocks, size]


class EppMetrics:
    """What is counted as it happens, and what is read when asked."""

    def __init__(self, picker: EndpointPicker) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StateCollector(picker))
        self._picks = Counter(
            "twinjet_epp_picks", "Requests by what was known of them", ["known"], registry=self.registry
        )
        self._refusals = Counter(
            "twinjet_epp_refusals", "Requests refused, by status", ["code"], registry=self.registry
        )
        self._tokens = Counter(
            "twinjet_epp_prompt_tokens", "Prompt tokens, about; cached: thought to be at the replica",
            ["cached"], registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "twinjet_epp_pick_seconds", "Time of a decision", buckets=_SECONDS, registry=self.registry
        )
        self._gaps = Counter(
            "twinjet_epp_event_gaps", "Times that KV events had to be begun anew", ["replica"],
            registry=self.registry,
        )  # fmt: skip

    def observe_pick(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def count_pick(self, pick: Pick, *, is_read: bool) -> None:
        self._picks.labels("prompt" if is_read else "load").inc()
        if is_read:
            self._tokens.labels("yes").inc(pick.cached_tokens)
            self._tokens.labels("no").inc(pick.num_tokens - pick.cached_tokens)

    def count_refusal(self, code: str) -> None:
        self._refusals.labels(code).inc()

    def count_gap(self, address: str) -> None:
        self._gaps.labels(address).inc()
