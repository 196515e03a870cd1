"""Makes the engine that a deployment's settings name; loads the code of that engine only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from twinjet.engines.base import Engine

if TYPE_CHECKING:
    from twinjet.config import DeploymentSettings


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
            )
        case "tensorrt_llm":
            from twinjet.engines.tensorrt_llm.front.engine import TrtLlmEngine

            return TrtLlmEngine(
                name, settings.model, settings.options, native_sampler=settings.native_sampler
            )
