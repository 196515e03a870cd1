"""Makes the engine that a deployment's settings name; loads the code of that engine only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from twinjet.engines.base import Engine

if TYPE_CHECKING:
    from twinjet.config import DeploymentSettings


KV_EVENT_BUFFER = 1 << 16
"""Events that TensorRT-LLM keeps for us where kv_events asks for them and its own setting does not say."""


@contextmanager
def prepared(names: Iterable[str]) -> Iterator[None]:
    """Do what must come before threads and gRPC exist, and undo it after everything else has ended.

    names: the engines that will be made.
    """
    if "vllm" not in names:
        yield
        return
    from twinjet.engines.vllm.front import prestart

    prestart.prestart()
    try:
        yield
    finally:
        prestart.stop()


def make_engine(name: str, settings: DeploymentSettings) -> Engine:
    """Make an engine, not started. Raises ConfigError if its package is missing or its options are wrong."""
    match settings.engine:
        case "fake":
            from twinjet.engines.fake import FakeEngine

            return FakeEngine(name, settings.options)
        case "vllm":
            from twinjet.engines.vllm.front.engine import VllmEngine

            return VllmEngine(
                name,
                settings.model,
                settings.options,
                native_sampler=settings.native_sampler,
                native_block_manager=settings.native_block_manager,
                kv_events=settings.kv_events,
            )
        case "tensorrt_llm":
            from twinjet.engines.tensorrt_llm.front.engine import TrtLlmEngine

            options = settings.options
            if settings.kv_events:
                cache = {"event_buffer_max_size": KV_EVENT_BUFFER} | options.get("kv_cache_config", {})
                options = options | {"kv_cache_config": cache}
            return TrtLlmEngine(name, settings.model, options, native_sampler=settings.native_sampler)
