"""Read vLLM's load from the statistics that come with every step's outputs."""

from __future__ import annotations

from typing import Any

from twinjet.engines.base import EngineLoad


class LoadReader:
    """Takes the place of AsyncLLM's logger manager: keeps the last reading, prints and exports nothing."""

    def __init__(self, num_blocks: int | None) -> None:
        self.num_blocks = num_blocks
        self._waiting = 0
        self._running = 0
        self._usage = 0.0
        self._preemptions = 0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        """Take one step's statistics; called by AsyncLLM's output loop."""
        if scheduler_stats is not None:
            self.update(
                scheduler_stats.num_running_reqs,
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                scheduler_stats.kv_cache_usage,
            )
        if iteration_stats is not None:
            self.add_preemptions(iteration_stats.num_preempted_reqs)

    def update(self, num_running: int, num_waiting: int, kv_usage: float) -> None:
        """Take one step's reading. kv_usage: share of the KV blocks in use."""
        self._running, self._waiting, self._usage = num_running, num_waiting, kv_usage

    def add_preemptions(self, count: int) -> None:
        """Count preemptions of one step."""
        self._preemptions += count

    def log(self) -> None:
        """Print nothing."""

    def log_engine_initialized(self) -> None:
        """Print nothing."""

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """Keep nothing."""

    def record_admission_rejection(self, reason: str) -> None:
        """Keep nothing: admission is decided before the engine."""

    def read(self) -> EngineLoad:
        total = self.num_blocks
        return EngineLoad(
            waiting=self._waiting,
            running=self._running,
            kv_blocks_total=total,
            kv_blocks_used=None if total is None else round(self._usage * total),
            preemptions=self._preemptions,
        )
