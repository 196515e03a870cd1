"""Stand-in for tensorrt_llm.scheduling_params."""

from tensorrt_llm import _contract

SchedulingParams = _contract.make_dataclass("SchedulingParams")
