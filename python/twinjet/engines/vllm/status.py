"""What of the native scheduling path a vLLM engine uses, and if not, why. Plain data; no vLLM import."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

# The utility method by which the front end asks an engine core (see scheduler.publish_status).
STATUS_METHOD = "twinjet_scheduler_status"


class Reason(StrEnum):
    """Why a layer is vLLM's own."""

    OFF = "off"
    MANAGER_ONLY = "manager_only"
    UNTESTED_VLLM = "untested_vllm"
    KV_GROUPS = "kv_groups"
    ATTENTION = "attention"
    COORDINATOR = "coordinator"
    BLOCK_SIZE = "block_size"
    KV_CONNECTOR = "kv_connector"
    EC_CONNECTOR = "ec_connector"
    KV_EVENTS = "kv_events"
    KV_METRICS = "kv_metrics"
    EAGLE = "eagle"
    KV_ZEROING = "kv_zeroing"
    CONTEXT_PARALLEL = "context_parallel"
    SPECULATIVE = "speculative"
    PIPELINE_PARALLEL = "pipeline_parallel"
    POOLING = "pooling"
    ENCODER_DECODER = "encoder_decoder"
    AUX_OUTPUT = "aux_output"
    PERF_METRICS = "perf_metrics"
    ADAPTIVE_PREFILL = "adaptive_prefill"
    NO_PREFIX_CACHE = "no_prefix_cache"
    BATCH_QUEUE = "batch_queue"
    SAMPLING_MASK = "sampling_mask"
    DEFERRED_FREE = "deferred_free"


@dataclass
class LayerStatus:
    """One layer: native, or vLLM's own for a reason."""

    is_native: bool = False
    reason: str = ""
    detail: str = ""


@dataclass
class SchedulerStatus:
    """The state of an engine core's scheduler.

    block_manager, decode_path, prefix_hash: the three layers; each needs the one before it.
    counters: steps and rows since start, by the path they took.
    """

    vllm_version: str
    block_manager: LayerStatus = field(default_factory=LayerStatus)
    decode_path: LayerStatus = field(default_factory=LayerStatus)
    prefix_hash: LayerStatus = field(default_factory=LayerStatus)
    counters: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings, booleans and ints, as they cross the process boundary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SchedulerStatus:
        """Inverse of to_dict(). Raises TypeError on unknown or missing keys."""
        layers = {name: LayerStatus(**data[name]) for name in ("block_manager", "decode_path", "prefix_hash")}
        return cls(**{**data, **layers})
