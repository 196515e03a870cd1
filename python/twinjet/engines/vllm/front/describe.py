"""What a vLLM engine is and can do, derived from the facts of its configuration."""

from __future__ import annotations

from twinjet.engines.base import Capability, Component, EngineInfo, KvCache, Limits, Tokenizer
from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front.parts import Parts
from twinjet.request import MAX_OUTPUTS, SamplingOverrides


def engine_info(facts: Facts, tokenizer: Tokenizer, parts: Parts) -> EngineInfo:
    """Describe a started engine; parts.Components completes it."""
    capabilities: set[Capability] = set()
    if facts.has_adapters:
        capabilities.add("adapters")
    if facts.has_prefix_cache:
        capabilities.add("prefix_cache")
    if facts.has_priority:
        capabilities.add("priority")
    if tokenizer.has_chat_template:
        capabilities.add("chat")
    stock = Component("engine", facts.version, reason=parts.reason)
    return EngineInfo(
        name="vllm",
        version=facts.version,
        device=facts.device,
        source=facts.source,
        limits=Limits(
            max_context_tokens=facts.max_model_len,
            vocab_size=facts.vocab_size,
            max_outputs=MAX_OUTPUTS,
            max_logprobs=facts.max_logprobs,
            max_num_seqs=facts.max_num_seqs,
        ),
        capabilities=frozenset(capabilities),
        default_sampling=SamplingOverrides(**facts.default_sampling),
        eos_token_ids=facts.eos_token_ids,
        sampler=stock,
        block_manager=stock,
        kv_cache=None if facts.num_blocks is None else KvCache(facts.num_blocks, facts.block_size),
        settings=facts.settings,
    )
