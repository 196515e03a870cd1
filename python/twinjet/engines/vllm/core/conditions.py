"""When the native layers may be used: the checks, each with the reason it gives where it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinatorNoPrefixCache, UnitaryKVCacheCoordinator
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from twinjet.engines.vllm import compat
from twinjet.engines.vllm.status import LayerStatus, Reason

# "on" (default), "manager" (no decode path) or "off"; additional_config={"twinjet": {"native": ...}}
# of the engine comes before it.
NATIVE_ENV = "TWINJET_VLLM_NATIVE"
_SETTINGS = ("on", "manager", "off")

Objection = tuple[Reason, str]


def native_setting(vllm_config: Any) -> str:
    """The switch for this engine. Raises ValueError on an unknown value."""
    additional = vllm_config.additional_config
    options = additional.get("twinjet", {}) if isinstance(additional, dict) else {}
    setting = str(options.get("native", os.environ.get(NATIVE_ENV, "on")))
    if setting not in _SETTINGS:
        raise ValueError(f"native is {setting!r}, but must be one of {', '.join(_SETTINGS)}")
    return setting


def _first(objections: Iterator[Objection]) -> LayerStatus:
    for reason, detail in objections:
        return LayerStatus(False, reason.value, detail)
    return LayerStatus(True)


def judge_manager(scheduler: Any) -> LayerStatus:
    """Whether this scheduler's KV-cache manager can be the native one."""
    return _first(_manager_objections(scheduler))


def judge_decode_path(scheduler: Any) -> LayerStatus:
    """Whether, beyond the manager, this scheduler's decodes can be scheduled natively."""
    return _first(_decode_objections(scheduler))


def judge_prefix_hash(scheduler: Any) -> LayerStatus:
    """Whether, beyond the manager, prompts of this engine can be hashed natively."""
    return _first(_hash_objections(scheduler))


def _manager_objections(scheduler: Any) -> Iterator[Objection]:
    if native_setting(scheduler.vllm_config) == "off":
        yield Reason.OFF, "switched off"
    try:
        compat.check_manager()
    except compat.UntestedVllmError as error:
        yield Reason.UNTESTED_VLLM, str(error)
        return
    stock = scheduler.kv_cache_manager
    config = scheduler.kv_cache_config
    if len(config.kv_cache_groups) != 1:
        yield Reason.KV_GROUPS, f"{len(config.kv_cache_groups)} KV-cache groups"
        return
    group = stock.coordinator.single_type_managers[0]
    if type(group) is not FullAttentionManager:
        yield Reason.ATTENTION, type(group).__name__
    if type(stock.coordinator) not in (UnitaryKVCacheCoordinator, KVCacheCoordinatorNoPrefixCache):
        yield Reason.COORDINATOR, type(stock.coordinator).__name__
    block_size = group.block_size
    if block_size & (block_size - 1) or stock.block_pool.hash_block_size != block_size:
        yield Reason.BLOCK_SIZE, f"block size {block_size}, hashed by {stock.block_pool.hash_block_size}"
    if scheduler.connector is not None:
        yield Reason.KV_CONNECTOR, type(scheduler.connector).__name__
    if scheduler.enable_kv_cache_events:
        yield Reason.KV_EVENTS, "KV-cache events are published"
    if scheduler.kv_metrics_collector is not None:
        yield Reason.KV_METRICS, "KV-cache residency metrics are collected"
    if stock.coordinator.eagle_group_ids or stock.coordinator.num_reprefillable_tokens:
        yield Reason.EAGLE, "EAGLE or MTP drafts share the cache"
    if config.needs_kv_cache_zeroing:
        yield Reason.KV_ZEROING, "new blocks are zeroed"
    if scheduler.dcp_world_size > 1 or scheduler.pcp_world_size > 1:
        sizes = f"decode {scheduler.dcp_world_size}, prefill {scheduler.pcp_world_size}"
        yield Reason.CONTEXT_PARALLEL, sizes


def _decode_objections(scheduler: Any) -> Iterator[Objection]:
    config = scheduler.vllm_config
    if native_setting(config) == "manager":
        yield Reason.MANAGER_ONLY, "switched off"
    try:
        compat.check_decode_path()
    except compat.UntestedVllmError as error:
        yield Reason.UNTESTED_VLLM, str(error)
    if config.speculative_config is not None or scheduler.num_spec_tokens or scheduler.num_lookahead_tokens:
        yield Reason.SPECULATIVE, "speculative decoding"
    if scheduler.use_pp:
        yield Reason.PIPELINE_PARALLEL, "pipeline stages"
    if config.max_concurrent_batches > 2:
        yield Reason.BATCH_QUEUE, f"{config.max_concurrent_batches} steps in flight"
    if scheduler.num_sampled_tokens_per_step != 1:
        yield Reason.POOLING, "no token is sampled in a step"
    if scheduler.is_encoder_decoder or scheduler.is_mm_encoder_only:
        yield Reason.ENCODER_DECODER, "the model has an encoder of its own"
    if scheduler.ec_connector is not None:
        yield Reason.EC_CONNECTOR, type(scheduler.ec_connector).__name__
    if scheduler.aux_output_connector is not None:
        yield Reason.AUX_OUTPUT, "auxiliary outputs"
    if scheduler.return_sampling_mask:
        yield Reason.SAMPLING_MASK, "sampling masks are returned"
    if scheduler.perf_metrics is not None:
        yield Reason.PERF_METRICS, "step performance is estimated"
    if scheduler.defer_block_free:
        yield Reason.DEFERRED_FREE, "blocks are freed a step late, by a count of vLLM's own steps"
    if scheduler.adaptive_long_prefill_threshold:
        yield Reason.ADAPTIVE_PREFILL, "the prefill threshold follows the step's budget"


def _hash_objections(scheduler: Any) -> Iterator[Objection]:
    if not scheduler.kv_cache_manager.enable_caching:
        yield Reason.NO_PREFIX_CACHE, "prefix caching is off"
    try:
        compat.check_hasher()
    except compat.UntestedVllmError as error:
        yield Reason.UNTESTED_VLLM, str(error)
