"""Runs in an interpreter that has guidellm: its own models read a report and write it again.

    python guidellm_check.py REPORT [COPY]

Prints what they made of it as JSON. guidellm's modules import packages that its report models have no use for (torch,
datasets, web servers); where they are not installed, empty modules stand in.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

UNUSED = ("datasets", "torch", "transformers", "pandas", "pyarrow", "PIL", "faker", "sanic", "websockets")


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what no other finder has found, if it is one of UNUSED: any name in it is an empty class."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> Any:
        if name.partition(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__class_getitem__": classmethod(lambda cls, _: cls)})

        module = types.ModuleType(spec.name)
        vars(module)["__getattr__"] = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main() -> None:
    """Read, tell, write."""
    sys.meta_path.append(Absent())
    from guidellm.benchmark.schemas import GenerativeBenchmarksReport  # type: ignore[import-not-found]

    report = GenerativeBenchmarksReport.load_file(sys.argv[1])
    told = []
    for benchmark in report.benchmarks:
        requests = benchmark.requests.successful
        told.append(
            {
                "strategy": benchmark.config.strategy.type_,
                "duration": benchmark.duration,
                "num_successful": len(requests),
                "num_errored": len(benchmark.requests.errored),
                "ttft_ms": [r.time_to_first_token_ms for r in requests],
                "itl_ms": [r.inter_token_latency_ms for r in requests],
                "latency_s": [r.request_latency for r in requests],
                "output_tokens": [r.output_tokens for r in requests],
                "mean_ttft_ms": benchmark.metrics.time_to_first_token_ms.successful.mean,
                "tokens_per_s": benchmark.metrics.output_tokens_per_second.successful.mean,
            }
        )
    print(json.dumps(told))
    if len(sys.argv) > 2:
        report.save_file(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
