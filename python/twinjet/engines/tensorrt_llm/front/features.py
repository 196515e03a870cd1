"""What the installed tensorrt_llm package has, found out at start-up by signatures, fields and attributes.

Versions differ in ways that no version number tells reliably, so nothing here compares versions. The package
is imported by `load_package` alone; importing this module needs nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from twinjet.errors import ConfigError

_NEEDS = (
    "it needs Linux with an NVIDIA GPU of compute capability 8.0 or later (A100, L40S, H100, H200, B200) and a "
    "driver for CUDA 12.9 or later; there, run `pip install 'twinjet[tensorrt-llm]'` or use NVIDIA's container "
    "nvcr.io/nvidia/tensorrt-llm/release; see docs/tensorrt-llm.md"
)
MISSING = f"the tensorrt_llm package is not installed; {_NEEDS}"
_BROKEN = "the tensorrt_llm package cannot be imported"

NEEDED_KEYWORDS = frozenset({"inputs", "sampling_params", "streaming"})
NEEDED_FIELDS = frozenset(
    {
        "n", "best_of", "max_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos",
        "include_stop_str_in_output", "detokenize", "logprobs", "prompt_logprobs", "logits_processor",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Package:
    """The classes of tensorrt_llm that the engine uses; None where the package lacks one."""

    version: str
    llm: Any
    prebuilt_llm: Any | None
    sampling_params: Any
    guided_decoding: Any | None
    lora_request: Any | None
    scheduling_params: Any | None
    retention_config: Any | None
    disaggregated_params: Any | None
    config_types: dict[str, Any]
    request_errors: tuple[type[BaseException], ...]
    fatal_errors: tuple[type[BaseException], ...]


@dataclass(frozen=True, slots=True)
class Features:
    """Which optional parts this version has."""

    generate_keywords: frozenset[str]
    sampling_fields: frozenset[str]
    has_check_health: bool
    has_capacity_call: bool

    @property
    def has_cache_salt(self) -> bool:
        return "cache_salt" in self.generate_keywords

    @property
    def has_priority(self) -> bool:
        return "priority" in self.generate_keywords

    @property
    def has_trace_headers(self) -> bool:
        return "trace_headers" in self.generate_keywords

    @property
    def has_disaggregation(self) -> bool:
        return "disaggregated_params" in self.generate_keywords

    @property
    def has_lora(self) -> bool:
        return "lora_request" in self.generate_keywords


def is_installed() -> bool:
    """Say whether tensorrt_llm could be imported, without importing it."""
    return importlib.util.find_spec("tensorrt_llm") is not None


def load_package() -> Package:
    """Import tensorrt_llm; takes seconds.

    Raises ConfigError if it is missing, cannot be imported or lacks what the engine cannot do without.
    """
    try:
        module = importlib.import_module("tensorrt_llm")
    except ModuleNotFoundError as error:
        if error.name != "tensorrt_llm":
            raise ConfigError(f"{_BROKEN}: {error}; {_NEEDS}") from error
        raise ConfigError(MISSING) from error
    except (ImportError, OSError, RuntimeError) as error:
        # A missing libcuda or libmpi shows as ImportError or OSError, an unfit GPU as RuntimeError.
        raise ConfigError(f"{_BROKEN}: {error}; {_NEEDS}") from error
    return Package(
        version=str(getattr(module, "__version__", "unknown")),
        llm=_needed(["tensorrt_llm:LLM", "tensorrt_llm.llmapi:LLM"]),
        prebuilt_llm=find(["tensorrt_llm._tensorrt_engine:LLM"]),
        sampling_params=_needed(["tensorrt_llm:SamplingParams", "tensorrt_llm.llmapi:SamplingParams"]),
        guided_decoding=find(
            [
                "tensorrt_llm.llmapi:GuidedDecodingParams",
                "tensorrt_llm.sampling_params:GuidedDecodingParams",
            ]
        ),
        lora_request=find(["tensorrt_llm.executor:LoRARequest", "tensorrt_llm.executor.request:LoRARequest"]),
        scheduling_params=find(["tensorrt_llm.scheduling_params:SchedulingParams"]),
        retention_config=find(["tensorrt_llm.llmapi:KvCacheRetentionConfig"]),
        disaggregated_params=find(
            [
                "tensorrt_llm.llmapi:DisaggregatedParams",
                "tensorrt_llm.disaggregated_params:DisaggregatedParams",
            ]
        ),
        config_types={
            name: cls
            for name, cls in (
                ("kv_cache_config", find(["tensorrt_llm.llmapi:KvCacheConfig"])),
                ("scheduler_config", find(["tensorrt_llm.llmapi:SchedulerConfig"])),
                (
                    "cache_transceiver_config",
                    find(
                        [
                            "tensorrt_llm.llmapi:CacheTransceiverConfig",
                            "tensorrt_llm.llmapi.llm_args:CacheTransceiverConfig",
                        ]
                    ),
                ),
                ("cuda_graph_config", find(["tensorrt_llm.llmapi:CudaGraphConfig"])),
                (
                    "lora_config",
                    find(["tensorrt_llm.lora_helper:LoraConfig", "tensorrt_llm.llmapi:LoraConfig"]),
                ),
                ("capacity_scheduler_policy", find(["tensorrt_llm.llmapi:CapacitySchedulerPolicy"])),
                ("context_chunking_policy", find(["tensorrt_llm.llmapi:ContextChunkingPolicy"])),
                ("waiting_queue_policy", find(["tensorrt_llm.llmapi.llm_args:WaitingQueuePolicy"])),
            )
            if cls is not None
        },
        request_errors=_errors(["tensorrt_llm.executor.utils:RequestError"]),
        fatal_errors=(
            *_errors(["tensorrt_llm.executor.utils:EngineDeadError"]),
            *_errors(["tensorrt_llm.executor.executor:CppExecutorError"]),
        ),
    )


def detect(package: Package, llm_class: Any) -> Features:
    """Read signatures and fields. Raises ConfigError if the version is too different to be used."""
    keywords = frozenset(inspect.signature(llm_class.generate_async).parameters) - {"self"}
    sampling_fields = field_names(package.sampling_params)
    missing = sorted(NEEDED_KEYWORDS - keywords) + sorted(NEEDED_FIELDS - sampling_fields)
    if missing:
        raise ConfigError(
            f"tensorrt_llm {package.version} lacks {', '.join(missing)}; tested against the contract of "
            "versions 1.2 and 1.3; run `twinjet doctor` for all differences"
        )
    return Features(
        generate_keywords=keywords,
        sampling_fields=sampling_fields,
        has_check_health=callable(getattr(llm_class, "_check_health", None)),
        has_capacity_call=callable(getattr(llm_class, "get_kv_cache_capacity", None)),
    )


def field_names(cls: Any) -> frozenset[str]:
    """Name the fields of a dataclass or a pydantic model."""
    if dataclasses.is_dataclass(cls):
        return frozenset(f.name for f in dataclasses.fields(cls))
    return frozenset(getattr(cls, "model_fields", {}))


def find(paths: Iterable[str]) -> Any | None:
    """Give the first of "module:attribute" that exists, or None."""
    for path in paths:
        module_name, _, attribute = path.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        if hasattr(module, attribute):
            return getattr(module, attribute)
    return None


def _needed(paths: list[str]) -> Any:
    found = find(paths)
    if found is None:
        raise ConfigError(f"tensorrt_llm lacks {paths[0]}; run `twinjet doctor` for all differences")
    return found


def _errors(paths: list[str]) -> tuple[type[BaseException], ...]:
    found = find(paths)
    return (found,) if isinstance(found, type) else ()
