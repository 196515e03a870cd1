"""What a vLLM engine is and can do, derived from its configuration. Imports vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm
from vllm.platforms import current_platform

from twinjet.engines.base import Capability, Component, EngineInfo, KvCache, Limits, Tokenizer
from twinjet.engines.vllm.front import config as settings
from twinjet.engines.vllm.front.parts import Parts
from twinjet.request import MAX_OUTPUTS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def engine_info(config: VllmConfig, llm: Any, tokenizer: Tokenizer, parts: Parts) -> EngineInfo:
    """Describe a started engine; parts.Components completes it."""
    model, cache = config.model_config, config.cache_config
    vocab_size = model.get_vocab_size()
    blocks = None
    if cache.num_gpu_blocks:
        # Block 0 is vLLM's null block and never handed out.
        blocks = KvCache(cache.num_gpu_blocks - 1, cache.block_size)
    capabilities: set[Capability] = set()
    if config.lora_config is not None:
        capabilities.add("adapters")
    if cache.enable_prefix_caching:
        capabilities.add("prefix_cache")
    if config.scheduler_config.policy == "priority":
        capabilities.add("priority")
    if tokenizer.has_chat_template:
        capabilities.add("chat")
    stock = Component("engine", vllm.__version__, reason=parts.reason)
    return EngineInfo(
        name="vllm",
        version=vllm.__version__,
        device=current_platform.get_device_name() or current_platform.device_type,
        source=model.model,
        limits=Limits(
            max_context_tokens=model.max_model_len,
            vocab_size=vocab_size,
            max_outputs=MAX_OUTPUTS,
            max_logprobs=vocab_size if model.max_logprobs == -1 else model.max_logprobs,
            max_num_seqs=config.scheduler_config.max_num_seqs,
        ),
        capabilities=frozenset(capabilities),
        default_sampling=settings.default_sampling(config),
        eos_token_ids=settings.eos_token_ids(config, llm.renderer.get_eos_token_id()),
        sampler=stock,
        block_manager=stock,
        kv_cache=blocks,
        settings=_settings(config),
    )


def _settings(config: VllmConfig) -> dict[str, str]:
    """What bears on speed and results, with vLLM's defaults filled in."""
    model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
    speculative = config.speculative_config
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(model.quantization or "none"),
        "kv_cache_dtype": str(cache.cache_dtype),
        "prefix_cache": str(bool(cache.enable_prefix_caching)).lower(),
        "chunked_prefill": str(bool(scheduler.enable_chunked_prefill)).lower(),
        "max_num_batched_tokens": str(scheduler.max_num_batched_tokens),
        "async_scheduling": str(bool(scheduler.async_scheduling)).lower(),
        "speculative_decoding": "none" if speculative is None else str(speculative.method),
        "tensor_parallel_size": str(config.parallel_config.tensor_parallel_size),
        "enforce_eager": str(bool(model.enforce_eager)).lower(),
    }
