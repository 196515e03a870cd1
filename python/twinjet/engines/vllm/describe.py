"""What a vLLM engine is and can do, derived from its configuration. Imports vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import vllm
from vllm.platforms import current_platform

from twinjet.engines.base import Capability, Component, EngineInfo, KvCache, Limits, Tokenizer
from twinjet.engines.vllm import config as settings
from twinjet.request import MAX_OUTPUTS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_GENERATION: frozenset[Capability] = frozenset(
    {
        "generate", "logprobs", "prompt_logprobs", "json_schema", "regex", "ebnf", "choice", "penalties",
        "logit_bias", "bad_words", "allowed_token_ids", "min_p", "seed", "multiple_outputs",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """Which of our components go into the engine, by the name of the class vLLM is to load."""

    scheduler_cls: str | None
    worker_cls: str | None
    sampler: Component
    block_manager: Component

    @property
    def native_sampler(self) -> bool:
        return self.worker_cls is not None


def plan_components(native_sampler: bool, native_block_manager: bool) -> Parts:
    """Choose our components as far as they were asked for and are installed."""
    return Parts(
        scheduler_cls=None,
        worker_cls=None,
        sampler=Component("engine", vllm.__version__, reason="switched off"),
        block_manager=Component("engine", vllm.__version__, reason="switched off"),
    )


def engine_info(config: VllmConfig, llm: Any, tokenizer: Tokenizer, parts: Parts) -> EngineInfo:
    """Describe a started engine; with_tasks completes its capabilities."""
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
        sampler=parts.sampler,
        block_manager=parts.block_manager,
        kv_cache=blocks,
    )


def with_tasks(info: EngineInfo, tasks: Iterable[str]) -> EngineInfo:
    """Complete the capabilities with what the loaded model turned out to do."""
    found = set(tasks)
    capabilities = set(info.capabilities)
    if "generate" in found:
        capabilities |= _GENERATION
    else:
        capabilities -= {"chat", "priority"}
    if "embed" in found:
        capabilities.add("embed")
    return replace(info, capabilities=frozenset(capabilities))
