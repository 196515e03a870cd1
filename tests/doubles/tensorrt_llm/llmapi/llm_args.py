"""The arguments' models, with the recorded fields."""

from __future__ import annotations

import enum

from pydantic import BaseModel

from tensorrt_llm import _contract

_ENUMS = _contract.CONTRACT["enums"]
CapacitySchedulerPolicy = enum.Enum(  # type: ignore[misc]
    "CapacitySchedulerPolicy", _ENUMS["CapacitySchedulerPolicy"]["members"]
)
ContextChunkingPolicy = enum.Enum(  # type: ignore[misc]
    "ContextChunkingPolicy", _ENUMS["ContextChunkingPolicy"]["members"]
)
WaitingQueuePolicy = enum.Enum(  # type: ignore[misc]
    "WaitingQueuePolicy", _ENUMS["WaitingQueuePolicy"]["members"]
)


class CudaGraphConfig(BaseModel, extra="allow"):
    """Its fields are not recorded."""


class MoeConfig(BaseModel, extra="allow"):
    """Its fields are not recorded."""


class LoraConfig(BaseModel, extra="allow"):
    """Its fields are not recorded."""


class CacheTransceiverConfig(BaseModel, extra="allow"):
    """Its fields are not recorded."""


KvCacheConfig = _contract.make_model("KvCacheConfig", {})
SchedulerConfig = _contract.make_model(
    "SchedulerConfig",
    {},
    {
        "GUARANTEED_NO_EVICT": CapacitySchedulerPolicy["GUARANTEED_NO_EVICT"],
        "FCFS": WaitingQueuePolicy["FCFS"],
    },
)
TorchLlmArgs = _contract.make_model(
    "TorchLlmArgs",
    {
        "KvCacheConfig": KvCacheConfig,
        "SchedulerConfig": SchedulerConfig,
        "CudaGraphConfig": CudaGraphConfig,
        "MoeConfig": MoeConfig,
        "LoraConfig": LoraConfig,
        "CacheTransceiverConfig": CacheTransceiverConfig,
    },
)
