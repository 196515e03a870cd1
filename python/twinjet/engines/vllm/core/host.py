"""The engine's process from its first line: vLLM's configuration, what to tell the front end, the engine core.

The target of the process that front/startup.py starts; loads vLLM when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from twinjet.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FACTS = "facts"
STOCK = "stock"
CONFIG_ERROR = "config_error"
"""First words of what run() sends to the front end."""


def run(
    *,
    model: str,
    options: dict[str, Any],
    scheduler_cls: str | None,
    worker_cls: str | None,
    answer: Connection,
    handshake_address: str,
    report: Callable[[str], None] | None = None,
    core: Callable[..., None] | None = None,
) -> None:
    """Send one answer, then be the engine core until it ends.

    answer: (FACTS, Facts); (STOCK, reason) if only AsyncLLM may speak to this engine; or (CONFIG_ERROR,
    message). Only after the first does it go on. report: is told the phases of the start. core: runs in the
    place of vLLM's run_engine_core.
    """
    from twinjet.engines.vllm import config as settings

    try:
        config = settings.engine_config(model, options, scheduler_cls=scheduler_cls, worker_cls=worker_cls)
    except ConfigError as error:
        answer.send((CONFIG_ERROR, str(error)))
        return
    if reason := _reason_for_stock(config):
        answer.send((STOCK, reason))
        return
    answer.send((FACTS, settings.facts(config)))
    answer.close()
    _run_core(config, handshake_address, report, core)


def _run_core(
    config: VllmConfig,
    handshake_address: str,
    report: Callable[[str], None] | None,
    core: Callable[..., None] | None,
) -> None:
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.utils import _configure_uniproc_startup_threads
    from vllm.v1.executor.abstract import Executor

    executor_class = Executor.get_class(config)
    with _configure_uniproc_startup_threads(executor_class, 1):
        (core or EngineCoreProc.run_engine_core)(
            vllm_config=config,
            local_client=True,
            handshake_address=handshake_address,
            executor_class=executor_class if report is None else _reporting(executor_class, report),
            log_stats=True,
        )


def _reason_for_stock(config: VllmConfig) -> str:
    """Say why only AsyncLLM may speak to an engine of this configuration, "" if our own client may."""
    from twinjet.engines.vllm import compat

    try:
        compat.check_client()
    except compat.UntestedVllmError as error:
        return str(error)
    model, parallel = config.model_config, config.parallel_config
    multimodal = model.multimodal_config
    reasons = {
        "data parallelism": parallel.data_parallel_size > 1,
        "binding to NUMA nodes": parallel.numa_bind,
        "fault tolerance": parallel.enable_fault_tolerance,
        "a pooling model": model.runner_type == "pooling",
        "a diffusion model": model.is_diffusion,
        "tensors shared with the front end": multimodal is not None
        and multimodal.mm_tensor_ipc == "torch_shm",
        "speculative decoding": config.speculative_config is not None,
        "logits processors of its own": bool(model.logits_processors),
        "watermarking": config.watermark_config is not None,
        "sampling masks in outputs": model.return_sampling_mask,
        "tracing": config.observability_config.otlp_traces_endpoint is not None,
    }
    return ", ".join(name for name, holds in reasons.items() if holds)


def _reporting(executor_class: type[Any], report: Callable[[str], None]) -> type[Any]:
    """Make an executor class that says which phase of its start it enters."""

    class Reporting(executor_class):  # type: ignore[misc]
        def _init_executor(self) -> None:
            report("weights")
            super()._init_executor()

        def determine_available_memory(self) -> Any:
            report("memory")
            return super().determine_available_memory()

        def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
            report("kv_cache")
            return super().initialize_from_config(*args, **kwargs)

        def compile_or_warm_up_model(self) -> Any:
            report("warm_up")
            return super().compile_or_warm_up_model()

    Reporting.__name__ = executor_class.__name__
    Reporting.__qualname__ = executor_class.__qualname__
    return Reporting
