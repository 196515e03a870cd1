"""From a model, verbatim options and hot-path switches to vLLM's configuration, and what to know of it.

Imports vLLM: it runs in the engine's process, or in the front end where that holds AsyncLLM.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from twinjet.engines.vllm.environment import environment
from twinjet.engines.vllm.facts import Facts
from twinjet.errors import ConfigError
from twinjet.models.eos import named_eos
from twinjet.request import SamplingOverrides

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MAX_ENGINE_SEED = 2**32 - 1
"""What NumPy, the narrowest of the generators that vLLM seeds with it, takes."""

_CPU_MIN_KV_CACHE_BYTES = 512 << 20
_CPU_CONTEXTS_IN_KV_CACHE = 4


def engine_config(
    model: str, options: Mapping[str, Any], *, scheduler_cls: str | None, worker_cls: str | None
) -> VllmConfig:
    """Make vLLM's configuration.

    options: fields of AsyncEngineArgs; they win over every default of ours.
    Raises ConfigError for an unknown option or one that vLLM refuses.
    """
    known = {f.name for f in dataclasses.fields(AsyncEngineArgs)}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise ConfigError(f"vLLM has no engine option named {name}{hint}")
    is_cpu = current_platform.is_cpu()
    settings: dict[str, Any] = {
        "model": model,
        "scheduling_policy": "priority",
        "enable_log_requests": False,
        "disable_log_stats": False,
    }
    if scheduler_cls is not None:
        settings["scheduler_cls"] = scheduler_cls
    if worker_cls is not None:
        settings["worker_cls"] = worker_cls
    if is_cpu:
        settings |= {"enforce_eager": True, "block_size": 32, "distributed_executor_backend": "uni"}
        if options.get("tensor_parallel_size", 1) > 1 or options.get("pipeline_parallel_size", 1) > 1:
            settings["distributed_executor_backend"] = "mp"
    settings |= options
    seed = settings.get("seed", 0)
    if not isinstance(seed, int) or not 0 <= seed <= MAX_ENGINE_SEED:
        raise ConfigError(f"options.seed is {seed!r}; allowed: 0 to {MAX_ENGINE_SEED}")
    multiprocessing = "1"
    if is_cpu and settings["distributed_executor_backend"] == "uni":
        # vLLM's CPU platform turns "uni" into "mp" (one more process, one more import) to set OpenMP's
        # variables for the worker. Our forkserver has set them already.
        multiprocessing = "0"
    try:
        with environment({"VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing}):
            # Steps and batches as large as those of vLLM's own server: without its context an H100 would get a
            # quarter of the tokens a step and an eighth of the streams.
            config = AsyncEngineArgs(**settings).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"vLLM refuses the settings for {model}: {error}") from error
    backend = config.structured_outputs_config.backend
    if backend not in ("auto", "xgrammar"):
        raise ConfigError(
            f"structured_outputs_config.backend is {backend!r}; the server compiles grammars with xgrammar alone"
        )
    if is_cpu and config.cache_config.kv_cache_memory_bytes is None:
        config.cache_config.kv_cache_memory_bytes = _cpu_kv_cache_bytes(config)
    return config


def _cpu_kv_cache_bytes(config: VllmConfig) -> int:
    """Size the KV cache to a few full contexts: a size that is given skips vLLM's warm-up."""
    model, parallel = config.model_config, config.parallel_config
    per_token: int = (
        2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size()
        * model.dtype.itemsize
    )
    context: int = model.max_model_len
    return max(_CPU_MIN_KV_CACHE_BYTES, _CPU_CONTEXTS_IN_KV_CACHE * per_token * context)


def default_sampling(config: VllmConfig) -> dict[str, Any]:
    """Read the model's own sampling defaults from its generation_config: fields of SamplingOverrides."""
    found = config.model_config.get_diff_sampling_param()
    names = {f.name for f in dataclasses.fields(SamplingOverrides)}
    return {k: v for k, v in found.items() if k in names}


def generation_eos(config: VllmConfig) -> tuple[int, ...]:
    """List the end tokens that the model's generation_config names."""
    found = config.model_config.try_get_generation_config().get("eos_token_id")
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def facts(config: VllmConfig) -> Facts:
    """Read what the front end must know."""
    model, cache = config.model_config, config.cache_config
    vocab_size = model.get_vocab_size()
    return Facts(
        version=vllm.__version__,
        device=current_platform.get_device_name() or current_platform.device_type,
        source=model.model,
        tokenizer=model.tokenizer,
        max_model_len=model.max_model_len,
        vocab_size=vocab_size,
        max_logprobs=vocab_size if model.max_logprobs == -1 else model.max_logprobs,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        has_adapters=config.lora_config is not None,
        has_prefix_cache=bool(cache.enable_prefix_caching),
        has_priority=config.scheduler_config.policy == "priority",
        default_sampling=default_sampling(config),
        generation_eos=generation_eos(config),
        eos=tokenizer_eos(config),
        settings=_settings(config),
        # Block 0 is vLLM's null block and never handed out.
        num_blocks=cache.num_gpu_blocks - 1 if cache.num_gpu_blocks else None,
        block_size=cache.block_size or 0,
    )


def tokenizer_eos(config: VllmConfig) -> int | None:
    """Give the end token of the model's tokenizer."""
    named = named_eos(Path(config.model_config.tokenizer))
    if named is not None:
        return named
    from vllm.tokenizers import cached_tokenizer_from_config

    found: int | None = cached_tokenizer_from_config(config.model_config).eos_token_id
    return found


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
