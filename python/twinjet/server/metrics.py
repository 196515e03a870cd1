"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from twinjet._core import Stream
    from twinjet.server.deployments import Deployments

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_READ_S = 5.0
"""How long a reading may wait for the server's loop; then Prometheus gets an error."""


class _LoadCollector(Collector):
    """Reads queues, engines and component counters when Prometheus asks.

    It is asked in a thread of its own, so the reading is done on the server's loop; collect() must not be
    called there.
    """

    def __init__(self, deployments: Deployments, loop: asyncio.AbstractEventLoop) -> None:
        self._deployments = deployments
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        reading = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        try:
            return reading.result(_READ_S)
        except TimeoutError:
            reading.cancel()
            raise

    async def _read(self) -> list[Metric]:
        label = ["deployment"]
        waiting = GaugeMetricFamily("twinjet_requests_waiting", "Requests in our queue", labels=label)
        running = GaugeMetricFamily("twinjet_requests_running", "Requests in the engine", labels=label)
        refused = CounterMetricFamily(
            "twinjet_requests_refused", "Requests the queue did not take", labels=[*label, "reason"]
        )
        expired = CounterMetricFamily(
            "twinjet_requests_expired", "Requests ended by their deadline, waiting or running", labels=label
        )
        held = GaugeMetricFamily(
            "twinjet_admission_kv_blocks_used", "KV blocks in use as admission counts them", labels=label
        )
        overflows = CounterMetricFamily(
            "twinjet_admission_overflow_tokens",
            "Tokens for which admission had left no KV block",
            labels=label,
        )
        blocks = GaugeMetricFamily("twinjet_engine_kv_blocks", "KV blocks of the engine", labels=label)
        used = GaugeMetricFamily(
            "twinjet_engine_kv_blocks_used", "KV blocks in use in the engine", labels=label
        )
        share = GaugeMetricFamily(
            "twinjet_kv_cache_utilization", "Share of the KV blocks in use, 0 to 1", labels=label
        )
        cache = GaugeMetricFamily(
            "twinjet_kv_cache_info",
            "1, with the KV cache's sizes",
            labels=[*label, "block_size", "num_gpu_blocks"],
        )
        preemptions = CounterMetricFamily(
            "twinjet_engine_preemptions", "Requests that the engine preempted", labels=label
        )
        restarts = GaugeMetricFamily("twinjet_engine_restarts", "Engine restarts", labels=label)
        parts = GaugeMetricFamily(
            "twinjet_component", "Counters of sampler and block manager",
            labels=[*label, "component", "counter"],
        )  # fmt: skip
        for name, deployment in list(self._deployments.by_name.items()):
            load = deployment.dispatcher.totals()
            waiting.add_metric([name], load.waiting)
            running.add_metric([name], load.running)
            for reason, count in load.refused_by_reason.items():
                refused.add_metric([name, reason], count)
            expired.add_metric([name], load.expired)
            overflows.add_metric([name], load.kv_overflows)
            engine = await deployment.supervisor.engine_load()
            for family, value in (
                (held, load.kv_blocks_used),
                (blocks, engine.kv_blocks_total),
                (used, engine.kv_blocks_used),
                (preemptions, engine.preemptions),
            ):
                if value is not None:
                    family.add_metric([name], value)
            for held_blocks, all_blocks in (
                (engine.kv_blocks_used, engine.kv_blocks_total),
                (load.kv_blocks_used, load.kv_blocks_total),
            ):
                if held_blocks is not None and all_blocks:
                    share.add_metric([name], held_blocks / all_blocks)
                    break
            info = deployment.supervisor.info
            if info is not None and info.kv_cache is not None:
                sizes = (info.kv_cache.block_size, info.kv_cache.num_blocks)
                cache.add_metric([name, *map(str, sizes)], 1)
            restarts.add_metric([name], deployment.supervisor.num_restarts)
            for labels, value in _counters(deployment.supervisor.info):
                parts.add_metric([name, *labels], value)
        return [
            waiting, running, refused, expired, held, overflows, blocks, used, share, cache, preemptions, restarts,
            parts,
        ]  # fmt: skip


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
        self._moved = Counter(
            "twinjet_requests_moved",
            "Requests that went on at another deployment, waiting or running where the first was lost",
            ["model", "source", "target", "state"],
            registry=self.registry,
        )
        self._first_token = Histogram(
            "twinjet_first_token_seconds",
            "TTFT",
            ["model", "deployment"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "twinjet_per_token_seconds",
            "TPOT",
            ["model", "deployment"],
            buckets=_SECONDS,
            registry=self.registry,
        )

        # labels() costs more than the counting.
        self._calls_of = cache(self._calls.labels)
        self._tokens_of = cache(self._tokens.labels)
        self._first_token_of = cache(self._first_token.labels)
        self._per_token_of = cache(self._per_token.labels)

    def watch(self, deployments: Deployments) -> None:
        """Report queues, engines and counters of the deployments, too. Called on the loop that runs them."""
        self.registry.register(_LoadCollector(deployments, asyncio.get_running_loop()))

    def count_call(self, method: str, code: str, num_calls: int = 1) -> None:
        self._calls_of(method, code).inc(num_calls)

    def count_moved(self, model: str, source: str, target: str, *, was_running: bool) -> None:
        self._moved.labels(model, source, target, "running" if was_running else "waiting").inc()

    def observe_finished(self, model: str, deployment: str, request: Stream) -> None:
        self._tokens_of(model, "prompt").inc(request.num_prompt_tokens)
        self._tokens_of(model, "output").inc(request.num_output_tokens)
        if (first_token_s := request.first_token_s) is not None:
            self._first_token_of(model, deployment).observe(first_token_s)
        if (per_token_s := request.per_token_s) is not None:
            self._per_token_of(model, deployment).observe(per_token_s)
