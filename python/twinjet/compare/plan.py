"""What a comparison is to do, fixed before it begins: requests, load, precision, phases. The CLI and the server make one."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twinjet.compare.analysis import Metric, Settings
from twinjet.compare.driver import Driver, Target
from twinjet.compare.recorded import RecordedSide
from twinjet.compare.records import Journal, RunData
from twinjet.compare.statistics import Precision
from twinjet.compare.workload import Load, Workload
from twinjet.errors import ConfigError

SELF_TEST_BLOCKS = 10
LADDER_BLOCKS = 2
NUM_RIVALS = 5
"""Rivals asked for a token when answers are compared."""
UNTOLD = frozenset({"started_at", "flags", "recorded_at"})
"""Entries of a header by which runs may differ and yet be one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """See Driver for what is not told here. ladder: offered rates; json_schema: "" for none."""

    workload: Workload
    load: Load
    requests_per_leg: int
    precision: Precision
    metric: Metric
    seed: int = 0
    num_same: int = 16
    ladder: tuple[float, ...] = ()
    allowed: tuple[str, ...] = ()
    json_schema: str = ""

    def __post_init__(self) -> None:
        if self.requests_per_leg < 1:
            raise ConfigError(f"{self.requests_per_leg} requests a leg; at least 1 is needed")
        if self.num_same < 0:
            raise ConfigError(f"{self.num_same} answers to compare; 0 or more are needed")
        if not all(0 < rate < float("inf") for rate in self.ladder):
            raise ConfigError("each rate of a ladder must be above 0")

    def header(self, names: Sequence[str], settings: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """Give what is written of a run before it begins; equal headers, but for UNTOLD, mean that runs can be one."""
        return {
            "names": list(names),
            "digest": self.workload.digest,
            "metric": self.metric,
            "load": asdict(self.load),
            "requests_per_leg": self.requests_per_leg,
            "precision": 100 * self.precision.half_width,
            "max_blocks": self.precision.max_blocks,
            "seed": self.seed,
            "answers": self.num_same,
            "json_schema": self.json_schema,
            "settings": [dict(side) for side in settings],
            "allowed": sorted(self.allowed),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def driver(
        self,
        a: Target,
        b: Target,
        data: RunData,
        journal: Journal,
        *,
        has_logprobs: bool,
        recorded: RecordedSide | None = None,
    ) -> Driver:
        """Make what runs it."""
        return Driver(
            a,
            b,
            self.workload,
            self.load,
            self.requests_per_leg,
            self.precision,
            Settings(metric=self.metric),
            journal,
            data,
            # Not seen before by the servers' prefix caches, so that a second run starts as the first did.
            salt=f"compare-{time.time_ns():x}",
            seed=self.seed,
            num_same=self.num_same,
            num_logprobs=NUM_RIVALS if has_logprobs else None,
            recorded=recorded,
        )

    async def run(self, running: Driver) -> None:
        """Run all phases."""
        await running.run()
        for rate in self.ladder:
            await running.run_phase("ladder", LADDER_BLOCKS, rate)


def is_one_run(header: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Give the entries by which a header, as written, is of another run; empty if it is of the same."""
    return [
        name
        for name in sorted({*header, *other} - UNTOLD)
        if _plain(header.get(name)) != _plain(other.get(name))
    ]


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def default_metric(load: Load) -> Metric:
    """Throughput in a closed loop, latency in an open one."""
    return "e2e" if load.is_open else "token_time"
