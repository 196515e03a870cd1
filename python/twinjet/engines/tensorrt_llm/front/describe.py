"""The engine's description, from its settings, its statistics and its model."""

from __future__ import annotations

from twinjet.engines.base import Capability, Component, EngineInfo, KvCache, Limits
from twinjet.engines.tensorrt_llm.front.drawing import Drawing
from twinjet.engines.tensorrt_llm.front.handle import EngineHandle
from twinjet.engines.tensorrt_llm.front.model import ModelFacts
from twinjet.engines.tensorrt_llm.front.stats import EngineStats
from twinjet.errors import ConfigError
from twinjet.request import MAX_OUTPUTS

_DEFAULT_MAX_NUM_SEQS = 2048
DEFAULT_BLOCK_SIZE = 32


def describe(handle: EngineHandle, model: ModelFacts, drawing: Drawing, stats: EngineStats) -> EngineInfo:
    """Describe the running engine. Raises ConfigError if its context's length cannot be known."""
    kv_cache = _kv_cache(handle, stats)
    return EngineInfo(
        name="tensorrt_llm",
        version=handle.package.version,
        device=model.device,
        source=handle.model,
        limits=Limits(
            max_context_tokens=_max_context_tokens(handle, model, kv_cache),
            vocab_size=model.tokens.vocab_size,
            max_outputs=MAX_OUTPUTS,
            max_logprobs=handle.settings.own.max_logprobs,
            max_num_seqs=handle.arg("max_batch_size", None)
            or model.files.max_batch_size
            or _DEFAULT_MAX_NUM_SEQS,
        ),
        capabilities=_capabilities(handle, model, drawing),
        default_sampling=model.files.default_sampling,
        eos_token_ids=model.tokens.eos_token_ids,
        sampler=drawing.component(),
        block_manager=Component(
            "engine",
            handle.package.version,
            reason="TensorRT-LLM has no public place for another one; the service's ledger follows its "
            f"statistics under the {handle.settings.policy} policy",
        ),
        kv_cache=kv_cache,
    )


def _kv_cache(handle: EngineHandle, stats: EngineStats) -> KvCache | None:
    known = stats.kv_cache
    if known is None and handle.kv_arg("max_tokens", None):
        size = int(handle.kv_arg("tokens_per_block", DEFAULT_BLOCK_SIZE))
        known = KvCache(int(handle.kv_arg("max_tokens", 0)) // size, size)
    if known is None:
        return None
    reserves = handle.settings.policy != "max_utilization"
    return KvCache(known.num_blocks, known.block_size, reserves_output=reserves)


def _max_context_tokens(handle: EngineHandle, model: ModelFacts, kv_cache: KvCache | None) -> int:
    known = [handle.arg("max_seq_len", None), model.files.max_context_tokens]
    if kv_cache is not None:
        # A longer request would wait for ever.
        known.append(kv_cache.num_blocks * kv_cache.block_size)
    limits = [int(value) for value in known if value]
    if not limits:
        raise ConfigError(f"deployments.{handle.name}: set options.max_seq_len; the model does not say it")
    return min(limits)


def _capabilities(handle: EngineHandle, model: ModelFacts, drawing: Drawing) -> frozenset[Capability]:
    can = drawing.can
    found: set[Capability] = {"generate", "multiple_outputs", "priority"}
    if model.tokenizer.has_chat_template:
        found.add("chat")
    if drawing.is_ours:
        found |= {
            "penalties", "allowed_token_ids", "min_p", "seed", "logprobs", "logit_bias", "bad_words", "min_tokens",
        }  # fmt: skip
    else:
        honoured: dict[Capability, bool] = {
            "penalties": can.penalties, "min_p": can.min_p, "seed": drawing.has_seed, "logprobs": can.logprobs,
            "logit_bias": can.logit_bias, "min_tokens": can.min_tokens,
            "prompt_logprobs": can.prompt_logprobs,
        }  # fmt: skip
        found |= {capability for capability, is_honoured in honoured.items() if is_honoured}
    if drawing.has_grammars:
        found |= {"json_schema", "regex", "ebnf", "choice"}
    if drawing.has_structural_tags:
        found.add("structural_tag")
    if handle.num_dp_ranks:
        found.add("data_parallel_rank")
    if handle.has_retention:
        found.add("kv_retention")
    if handle.takes_handoffs:
        found.add("handoff")
    if handle.gives_handoffs:
        found.add("prefill_only")
    if handle.features.has_trace_headers:
        found.add("trace_context")
    if has_adapters(handle):
        found.add("adapters")
    if drawing.has_salt:
        found.add("prefix_cache")
    if handle.has_kv_events:
        found.add("kv_events")
    return frozenset(found)


def has_adapters(handle: EngineHandle) -> bool:
    """Whether this engine was started with LoRA."""
    is_on = handle.arg("enable_lora", False) or handle.arg("lora_config", None) is not None
    return handle.features.has_lora and bool(is_on)
