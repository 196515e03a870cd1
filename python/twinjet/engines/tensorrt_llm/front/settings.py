"""A deployment's options: the engine's own keyword arguments, passed through, and ours under "twinjet".

[deployments.llama.options]
tensor_parallel_size = 4
[deployments.llama.options.kv_cache_config]
free_gpu_memory_fraction = 0.9
[deployments.llama.options.twinjet]
probe_timeout_s = 60
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twinjet.engines.tensorrt_llm.front.features import Package, field_names
from twinjet.errors import ConfigError

log = logging.getLogger(__name__)

CapacityPolicy = Literal["guaranteed_no_evict", "max_utilization", "static_batch"]
_POLICIES: tuple[CapacityPolicy, ...] = ("guaranteed_no_evict", "max_utilization", "static_batch")

_REFUSED = {
    "model": "set it as the deployment's model",
    "skip_tokenizer_init": "the tokenizer is needed for text, chat and end tokens",
    "batched_logits_processor": "the PyTorch backend does not call it",
    "backend": "the PyTorch backend is the default; a prebuilt engine is recognised by its folder",
}


class AdapterOptions(BaseModel):
    """Our own settings for this engine. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe_timeout_s: float = Field(60.0, gt=0, description="time a one-token probe may take")
    no_progress_s: float = Field(30.0, gt=0, description="silence, while requests run, that asks for a probe")
    idle_probe_s: float = Field(60.0, ge=0, description="time between probes of an idle engine; 0 is never")
    report_timeout_s: float = Field(
        10.0, gt=0, description="time to wait for our sampler's report of a token"
    )
    shutdown_timeout_s: float = Field(60.0, gt=0, description="time the engine may take to shut down")
    max_logprobs: int = Field(20, ge=0, le=100, description="most logprobs a request may ask for")
    eos_token_ids: list[int] | None = Field(None, description="instead of the model's own end tokens")
    handoff_key_file: Path | None = Field(
        None, description="a secret of at least 32 bytes that servers share which take each other's handoffs"
    )
    handoff_lifetime_s: float = Field(300.0, gt=0, description="time within which a handoff must be taken up")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """kwargs: for LLM(), without the model and still plain; own: ours."""

    kwargs: dict[str, Any]
    own: AdapterOptions

    @property
    def policy(self) -> CapacityPolicy:
        scheduler = self.kwargs.get("scheduler_config") or {}
        name = str(scheduler.get("capacity_scheduler_policy", _POLICIES[0])).rpartition(".")[2].lower()
        return next((policy for policy in _POLICIES if policy == name), _POLICIES[0])

    @property
    def speculates(self) -> bool:
        return self.kwargs.get("speculative_config") is not None


def parse_options(name: str, options: Mapping[str, Any], *, native_sampler: bool = True) -> EngineSettings:
    """Check what can be checked without the package. native_sampler: our sampler is to draw.

    Raises ConfigError naming the setting.
    """
    kwargs = dict(options)
    path = f"deployments.{name}.options"
    for key, why in _REFUSED.items():
        if key in kwargs:
            raise ConfigError(f"{path}.{key} cannot be set: {why}")
    if (kwargs.get("max_beam_width") or 1) != 1:
        raise ConfigError(f"{path}.max_beam_width is {kwargs['max_beam_width']}; allowed: 1 (no beam search)")
    if native_sampler and kwargs.get("enable_chunked_prefill"):
        raise ConfigError(
            f"{path}.enable_chunked_prefill and native_sampler exclude each other: the engine calls a logits processor "
            "for each chunk and does not say which is the last; set enable_chunked_prefill = false and max_num_tokens "
            f"to the longest prompt, or deployments.{name}.native_sampler = false"
        )
    scheduler = kwargs.get("scheduler_config") or {}
    if not isinstance(scheduler, Mapping):
        raise ConfigError(f"{path}.scheduler_config must be a table")
    policy = str(scheduler.get("capacity_scheduler_policy", "guaranteed_no_evict")).lower()
    if policy not in _POLICIES:
        raise ConfigError(
            f"{path}.scheduler_config.capacity_scheduler_policy is {policy!r}; allowed: {', '.join(_POLICIES)}"
        )
    try:
        own = AdapterOptions.model_validate(kwargs.pop("twinjet", {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}.twinjet.{where}: {first['msg']}") from None
    return EngineSettings(kwargs, own)


def llm_kwargs(settings: EngineSettings, package: Package, args_type: Any | None) -> dict[str, Any]:
    """Make the keyword arguments of LLM(): the user's, typed where the package has types, and our defaults.

    args_type: the package's class of arguments, whose fields say which defaults apply; None is not known. Raises
    ConfigError for an argument or a nested field that the package does not have.
    """
    known = field_names(args_type) if args_type is not None else frozenset()
    unknown = sorted(set(settings.kwargs) - known - set(inspect.signature(package.llm.__init__).parameters))
    if known and unknown:
        raise ConfigError(
            f"options.{unknown[0]}: tensorrt_llm {package.version} has no such argument"
            + "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(unknown[0], known, n=1))
        )
    kwargs = {key: _typed(key, value, package) for key, value in settings.kwargs.items()}
    defaults: dict[str, Any] = {
        # The source of load, of the ledger's size and of progress.
        "enable_iter_perf_stats": True,
        # With workers only the first output is filled, and results are not ours to copy in time.
        "num_postprocess_workers": 0,
    }
    for key, value in defaults.items():
        if key in known or not known:
            kwargs.setdefault(key, value)
    return kwargs


def _typed(key: str, value: Any, package: Package) -> Any:
    """Make a nested table the package's own type; what has none goes as it is and is checked by the package."""
    cls = package.config_types.get(key)
    if cls is None or not isinstance(value, Mapping):
        return value
    fields = dict(value)
    for enum_key in ("capacity_scheduler_policy", "context_chunking_policy", "waiting_queue_policy"):
        enum = package.config_types.get(enum_key)
        if enum is not None and isinstance(fields.get(enum_key), str):
            fields[enum_key] = _member(enum, enum_key, fields[enum_key])
    try:
        return cls(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"options.{key}: {error}") from error


def _member(enum: Any, key: str, name: str) -> Any:
    found = getattr(enum, name.upper(), None)
    if found is None:
        raise ConfigError(f"options.scheduler_config.{key}: tensorrt_llm knows no {name!r}")
    return found
