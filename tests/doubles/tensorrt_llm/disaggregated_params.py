"""Stand-in for tensorrt_llm.disaggregated_params."""

from __future__ import annotations

import enum
from typing import Any

from tensorrt_llm import _contract

REQUEST_TYPES = ("context_only", "generation_only", "context_and_generation")
DisaggScheduleStyle = enum.IntEnum("DisaggScheduleStyle", {"CONTEXT_FIRST": 0, "GENERATION_FIRST": 1})


def _check(self: Any) -> None:
    if self.request_type is not None and self.request_type.lower() not in REQUEST_TYPES:
        raise ValueError(f"unknown request type {self.request_type}")


DisaggregatedParams = _contract.make_dataclass("DisaggregatedParams", after_init=_check)
