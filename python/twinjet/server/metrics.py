"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from twinjet.server.deployments import Deployments
    from twinjet.server.responses import ResponseBuilder

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class _LoadCollector(Collector):
    """Reads queues and component counters when Prometheus asks."""

    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments

    def collect(self) -> Iterable[Metric]:
        waiting = GaugeMetricFamily(
            "twinjet_requests_waiting", "Requests in our queue", labels=["deployment"]
        )
        running = GaugeMetricFamily(
            "twinjet_requests_running", "Requests in the engine", labels=["deployment"]
        )
        restarts = GaugeMetricFamily("twinjet_engine_restarts", "Engine restarts", labels=["deployment"])
        parts = GaugeMetricFamily(
            "twinjet_component", "Counters of sampler and block manager",
            labels=["deployment", "component", "counter"],
        )  # fmt: skip
        for name, deployment in self._deployments.by_name.items():
            load = deployment.dispatcher.totals()
            waiting.add_metric([name], load.waiting)
            running.add_metric([name], load.running)
            restarts.add_metric([name], deployment.supervisor.num_restarts)
            for labels, value in _counters(deployment.supervisor.info):
                parts.add_metric([name, *labels], value)
        return [waiting, running, restarts, parts]


def _counters(info: object) -> Iterator[tuple[list[str], int]]:
    for component in ("sampler", "block_manager"):
        part = getattr(info, component, None)
        for counter, value in getattr(part, "counters", {}).items():
            yield [component, counter], value


class Metrics:
    """What is counted as it happens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "twinjet_calls", "Calls by method and status", ["method", "code"], registry=self.registry
        )
        self._tokens = Counter("twinjet_tokens", "Tokens by kind", ["model", "kind"], registry=self.registry)
        self._first_token = Histogram(
            "twinjet_first_token_seconds", "TTFT", ["model"], buckets=_SECONDS, registry=self.registry
        )
        self._per_token = Histogram(
            "twinjet_per_token_seconds", "TPOT", ["model"], buckets=_SECONDS, registry=self.registry
        )

    def watch(self, deployments: Deployments) -> None:
        """Report the queues and counters of the deployments, too."""
        self.registry.register(_LoadCollector(deployments))

    def listen(self, host: str, port: int) -> None:
        """Serve the metrics over HTTP, from a thread of their own."""
        start_http_server(port, host, self.registry)

    def count_call(self, method: str, code: str) -> None:
        self._calls.labels(method, code).inc()

    def observe_finished(self, model: str, request: ResponseBuilder) -> None:
        self._tokens.labels(model, "prompt").inc(request.num_prompt_tokens)
        self._tokens.labels(model, "output").inc(request.num_output_tokens)
        if request.first_token_s is not None:
            self._first_token.labels(model).observe(request.first_token_s)
        if request.per_token_s is not None:
            self._per_token.labels(model).observe(request.per_token_s)
