"""Which vLLM our layers were tested with, and how a different one is told.

Fingerprints of vLLM's own source text, each over what one layer relies on. A version outside
TESTED_VERSIONS or a fingerprint that differs turns that layer off; nothing is guessed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Public versions, without a local part: 0.32.0 covers 0.32.0+cpu.
TESTED_VERSIONS = ("0.32.0",)

# What the block manager stands in for.
_MANAGER_PARTS = (
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinatorNoPrefixCache",
    "vllm.v1.core.kv_cache_coordinator:UnitaryKVCacheCoordinator",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
    "vllm.v1.core.block_pool:BlockPool",
    "vllm.v1.core.block_pool:BlockHashToBlockMap",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock",
)

# What the batched decode path stands in for.
_DECODE_PARTS = (
    "vllm.v1.core.sched.scheduler:Scheduler",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
    "vllm.v1.core.sched.output:CachedRequestData",
    "vllm.v1.core.sched.output:SchedulerOutput",
    "vllm.v1.core.sched.utils:check_stop",
    "vllm.v1.core.sched.utils:remove_all",
    "vllm.v1.request:Request",
    "vllm.v1.request:RequestStatus",
    "vllm.v1.engine:EngineCoreOutput",
    "vllm.v1.engine:EngineCoreOutputs",
    "vllm.v1.outputs:ModelRunnerOutput",
    "vllm.v1.structured_output:StructuredOutputManager.accept_tokens",
)

# What the prompt hasher stands in for.
_HASHER_PARTS = (
    "vllm.v1.engine.core:EngineCore.__init__",
    "vllm.v1.core.kv_cache_utils:get_request_block_hasher",
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
    "vllm.v1.core.kv_cache_utils:_gen_mm_extra_hash_keys",
    "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
    "vllm.v1.core.kv_cache_utils:_gen_prompt_embeds_extra_hash_keys",
    "vllm.v1.core.kv_cache_utils:hash_block_tokens",
)

# What our own client of the engine core speaks, and what it does in AsyncLLM's place. Whole files: reading
# them takes a millisecond at every start, finding as many classes in them a second and a half.
_CLIENT_MODULES = (
    "vllm.lora.request",
    "vllm.sampling_params",
    "vllm.v1.engine",
    "vllm.v1.engine.core",
    "vllm.v1.engine.core_client",
    "vllm.v1.engine.input_processor",
    "vllm.v1.engine.logprobs",
    "vllm.v1.engine.output_processor",
    "vllm.v1.engine.utils",
    "vllm.v1.metrics.stats",
    "vllm.v1.outputs",
    "vllm.v1.serial_utils",
)

# What a step of the V2 model runner leaves out of vLLM's sampler and does otherwise.
_RUNNER_MODULES = (
    "vllm.v1.worker.gpu.buffer_utils",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu.sample.bad_words",
    "vllm.v1.worker.gpu.sample.logit_bias",
    "vllm.v1.worker.gpu.sample.logprob",
    "vllm.v1.worker.gpu.sample.penalties",
    "vllm.v1.worker.gpu.sample.sampler",
    "vllm.v1.worker.gpu.sample.states",
    "vllm.v1.worker.gpu.sample.thinking_budget",
    "vllm.v1.worker.gpu.sample.trace_replay",
)

# Made by `python -m twinjet.engines.vllm.compat`; to be renewed only with the differential tests.
MANAGER_FINGERPRINT = "3478fe4ce7b88b73be2fa52ed4fbd665"
DECODE_FINGERPRINT = "08c973f2a0f594cd431f281655d17079"
HASHER_FINGERPRINT = "e4c2750c45b4137118bfcafd6fc01753"
CLIENT_FINGERPRINT = "41e7e2019e48290d20f3c2c01082dfb6"
RUNNER_FINGERPRINT = "06e96c7a9b7e3ce005be01e1cc6cab49"


class UntestedVllmError(Exception):
    """This vLLM, or the named layer of it, is not one that was tested."""


def _resolve(part: str) -> Any:
    module_name, _, qualified = part.partition(":")
    value: Any = import_module(module_name)
    for name in qualified.split("."):
        value = getattr(value, name)
    return value


def _fingerprint(parts: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        try:
            source = inspect.getsource(_resolve(part))
        except (ImportError, AttributeError, OSError, TypeError) as error:
            raise UntestedVllmError(f"{part} cannot be read: {error}") from error
        digest.update(f"{part}\0{source}\0".encode())
    return digest.hexdigest()[:32]


@cache
def manager_fingerprint() -> str:
    """Fingerprint of the KV-cache manager's sources. Raises UntestedVllmError where they cannot be read."""
    return _fingerprint(_MANAGER_PARTS)


@cache
def decode_fingerprint() -> str:
    """Fingerprint of the scheduler's sources. Raises UntestedVllmError where they cannot be read."""
    return _fingerprint(_DECODE_PARTS)


@cache
def hasher_fingerprint() -> str:
    """Fingerprint of the prompt hasher's sources. Raises UntestedVllmError where they cannot be read."""
    return _fingerprint(_HASHER_PARTS)


@cache
def client_fingerprint() -> str:
    """Fingerprint of what our client relies on. Raises UntestedVllmError where it cannot be read."""
    return _files_fingerprint(_CLIENT_MODULES)


@cache
def runner_fingerprint() -> str:
    """Fingerprint of the V2 runner's and its sampler's files. Raises UntestedVllmError where they cannot be read."""
    return _files_fingerprint(_RUNNER_MODULES)


def _files_fingerprint(modules: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in modules:
        try:
            spec = find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            source = Path(spec.origin).read_bytes()
        except (ImportError, AssertionError, OSError) as error:
            raise UntestedVllmError(f"{name} cannot be read: {error}") from error
        digest.update(f"{name}\0{len(source)}\0".encode() + source)
    return digest.hexdigest()[:32]


def _version() -> str:
    from vllm.version import __version__

    return str(__version__)


def vllm_version() -> str:
    """The version of the vLLM that is imported, with its local part."""
    return _version()


def check_manager() -> None:
    """Raise UntestedVllmError unless the KV-cache manager may be replaced."""
    _check_version()
    _check("KV-cache manager", manager_fingerprint, MANAGER_FINGERPRINT)


def _check_version() -> None:
    version = vllm_version()
    if version.partition("+")[0] not in TESTED_VERSIONS:
        raise UntestedVllmError(f"vllm {version} is not one of {', '.join(TESTED_VERSIONS)}")


def check_client() -> None:
    """Raise UntestedVllmError unless our own client may speak to the engine core."""
    _check_version()
    _check("engine core's protocol", client_fingerprint, CLIENT_FINGERPRINT)


def check_decode_path() -> None:
    """Raise UntestedVllmError unless schedule() and update_from_output() may be replaced."""
    _check("scheduler", decode_fingerprint, DECODE_FINGERPRINT)


def check_hasher() -> None:
    """Raise UntestedVllmError unless the prompt hasher may be replaced."""
    _check("prompt hasher", hasher_fingerprint, HASHER_FINGERPRINT)


def check_runner() -> None:
    """Raise UntestedVllmError unless the V2 runner's steps may be shortened."""
    _check_version()
    _check("V2 model runner", runner_fingerprint, RUNNER_FINGERPRINT)


def _check(what: str, fingerprint: Callable[[], str], expected: str) -> None:
    found = fingerprint()
    if found != expected:
        raise UntestedVllmError(f"vllm's {what} differs from the tested one (fingerprint {found})")


if __name__ == "__main__":
    print(f'MANAGER_FINGERPRINT = "{manager_fingerprint()}"')
    print(f'DECODE_FINGERPRINT = "{decode_fingerprint()}"')
    print(f'HASHER_FINGERPRINT = "{hasher_fingerprint()}"')
    print(f'CLIENT_FINGERPRINT = "{client_fingerprint()}"')
    print(f'RUNNER_FINGERPRINT = "{runner_fingerprint()}"')
