"""What the forkserver imports before any engine process exists: vLLM and torch, and nothing that runs.

Forking is sound only while this process has one thread and no device context; `process.probe` checks
that from a child before the first engine is forked, and the engine is spawned instead if it does not hold.
"""

from __future__ import annotations

import gc
import importlib

MODULES = (
    "vllm.engine.arg_utils",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.models.llama",
    "vllm.v1.structured_output.backend_xgrammar",
)


def import_engine() -> None:
    """Import what an engine process needs.

    The collector is off meanwhile: it would walk a million live objects again and again, a fifth of the
    time. Frozen objects are not walked after the fork either, so their pages stay shared.
    """
    gc.disable()
    try:
        for name in MODULES:
            importlib.import_module(name)
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            importlib.import_module("vllm.v1.worker.cpu_worker")
    finally:
        gc.freeze()
        gc.enable()
