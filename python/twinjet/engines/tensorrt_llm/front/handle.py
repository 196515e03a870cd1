"""The package's LLM object: built off the loop, asked for its settings, shut down in bounded time."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from twinjet.engines.base import KvCache
from twinjet.engines.tensorrt_llm.front import features as feature_detection
from twinjet.engines.tensorrt_llm.front.features import Features, Package
from twinjet.engines.tensorrt_llm.front.health import background_error
from twinjet.engines.tensorrt_llm.front.processes import (
    in_daemon_thread,
    in_sessions_of_their_own,
    kill_processes,
    worker_processes,
)
from twinjet.engines.tensorrt_llm.front.settings import EngineSettings, llm_kwargs
from twinjet.engines.tensorrt_llm.front.tokenizer import is_prebuilt
from twinjet.errors import ConfigError, EngineDied

log = logging.getLogger(__name__)

CALL_SILENCE_S = 0.5
STREAM_SILENCE_S = 2.0

# One engine is built at a time: its workers are told from another's by when they appear.
_build_lock = threading.Lock()


class EngineHandle:
    """One LLM object and what is known of its package. llm is None before build() and after shut_down()."""

    def __init__(self, name: str, model: str, settings: EngineSettings) -> None:
        self.name = name
        self.model = model
        self.settings = settings
        self.llm: Any = None
        self.package: Package
        self.features: Features
        self.lost: str | None = None
        """Why the engine is known to be lost, from a worker's error; set before anyone is told."""
        self.on_lost: Callable[[str], None] = log.error
        self._building: asyncio.Future[Any] | None = None
        self._workers: frozenset[int] = frozenset()

    @property
    def is_prebuilt(self) -> bool:
        return is_prebuilt(self.model)

    async def import_package(self) -> None:
        """Import the package; takes seconds. Raises ConfigError if it cannot be used."""
        await in_daemon_thread(self._import, "tensorrt_llm import")

    async def build(self) -> None:
        """Build the engine; takes minutes. Raises ConfigError for refused settings, EngineDied otherwise."""
        # Shielded and kept, since a thread cannot be cancelled: shut_down() takes what it still gives.
        self._building = in_daemon_thread(self._build, "tensorrt_llm build")
        self.llm = await asyncio.shield(self._building)
        self._keep_joins_off(threading.get_ident())

    def submit(self, arguments: dict[str, Any], prompt: list[int], keywords: dict[str, Any]) -> Any:
        """Hand a prompt to the engine; a fresh SamplingParams each time, since the engine changes it.

        Raises EngineDied if a worker's error is waiting, which the engine would meet now and shut down for.
        """
        if (reason := background_error(self.llm, self.package.request_errors)) is not None:
            self.on_lost(reason)
            raise EngineDied(reason)
        params = self.package.sampling_params(**arguments)
        return self.llm.generate_async({"prompt_token_ids": prompt}, sampling_params=params, **keywords)

    async def kv_capacity(self, timeout_s: float) -> KvCache | None:
        """Ask for the size of the GPU's part of the KV cache, where the engine can be asked."""
        if not self.features.has_capacity_call:
            return None
        try:
            async with asyncio.timeout(timeout_s):
                found = await in_daemon_thread(self.llm.get_kv_cache_capacity, "tensorrt_llm capacity")
        except Exception as error:  # noqa: BLE001 - the statistics may say it as well
            log.warning("%s: cannot ask for the KV cache's size: %s", self.name, error)
            return None
        if not found.get("maxNumBlocks") or not found.get("tokensPerBlock"):
            return None
        return KvCache(int(found["maxNumBlocks"]), int(found["tokensPerBlock"]))

    def _keep_joins_off(self, loop_thread: int) -> None:
        """Keep the executor from being shut down in the loop's thread.

        Older versions do that in whoever meets a worker's error, and wait there for all workers without limit.
        """
        executor = getattr(self.llm, "_executor", None)
        original = getattr(executor, "shutdown", None)
        if executor is None or not callable(original):
            return

        def shutdown() -> None:
            if threading.get_ident() != loop_thread:
                original()
            elif self.lost is None:
                self.lost = "a worker of the engine failed"
                self.on_lost(self.lost)

        try:
            executor.shutdown = shutdown
        except AttributeError:
            log.warning("%s: a lost worker may hold the server up until its others end", self.name)

    def arg(self, name: str, default: Any) -> Any:
        """Read an effective setting: the engine's own arguments object knows the defaults it filled in."""
        args = getattr(self.llm, "args", None)
        return getattr(args, name, self.settings.kwargs.get(name, default))

    def kv_arg(self, name: str, default: Any) -> Any:
        """Read an effective setting of the KV cache."""
        return getattr(self.arg("kv_cache_config", None), name, default)

    @property
    def num_dp_ranks(self) -> int:
        """Ranks of attention data parallelism that a request can be sent to; 0 without it."""
        can = (
            self.package.scheduling_params is not None
            and "scheduling_params" in self.features.generate_keywords
        )
        return (
            int(self.arg("tensor_parallel_size", 1)) if can and self.arg("enable_attention_dp", False) else 0
        )

    @property
    def has_retention(self) -> bool:
        """Whether blocks of finished requests are kept by priority."""
        return (
            self.has_block_reuse
            and self.package.retention_config is not None
            and "kv_cache_retention_config" in self.features.generate_keywords
        )

    @property
    def takes_handoffs(self) -> bool:
        """Whether KV blocks can come from another engine."""
        can = self.features.has_disaggregation and self.package.disaggregated_params is not None
        return can and not self.is_prebuilt and self.arg("cache_transceiver_config", None) is not None

    @property
    def gives_handoffs(self) -> bool:
        """Whether KV blocks can go to another engine.

        Older versions refuse it while scheduling overlaps; the newer ones are known by a field.
        """
        is_newer = "ctx_dp_rank" in feature_detection.field_names(self.package.disaggregated_params)
        return self.takes_handoffs and (is_newer or bool(self.arg("disable_overlap_scheduler", False)))

    @property
    def silence_s(self) -> float:
        """How long the iterators of statistics and events should wait for more.

        Where they are filled by a call when they are opened, what they give is as old as this. Where they are not, one
        that has ended gives nothing before the next submission, so a long step must not end it.
        """
        is_filled_by_call = hasattr(getattr(self.llm, "_executor", None), "rpc_client")
        return CALL_SILENCE_S if is_filled_by_call else STREAM_SILENCE_S

    @property
    def max_lora_rank(self) -> int | None:
        """The largest rank of an adapter, None if the engine does not say."""
        return getattr(self.arg("lora_config", None), "max_lora_rank", None)

    @property
    def has_block_reuse(self) -> bool:
        return bool(self.kv_arg("enable_block_reuse", True))

    @property
    def has_kv_events(self) -> bool:
        return self.has_block_reuse and bool(self.kv_arg("event_buffer_max_size", 0))

    @property
    def has_min_p(self) -> bool:
        """Whether the engine's own sampler takes min_p; no trial can tell."""
        is_cpp = self.is_prebuilt or self.settings.kwargs.get("sampler_type") == "TRTLLMSampler"
        # The first recorded version with priority is also the first whose sampler is known to take it.
        return is_cpp or self.features.has_priority

    @property
    def queues_by_priority(self) -> bool:
        """Whether the engine's waiting queue heeds a request's priority: by default it does not look at it."""
        policy = getattr(self.arg("scheduler_config", None), "waiting_queue_policy", None)
        name = getattr(policy, "name", policy)
        return self.features.has_priority and str(name).lower() == "priority"

    @property
    def _llm_class(self) -> Any:
        return self.package.prebuilt_llm if self.is_prebuilt else self.package.llm

    def _import(self) -> None:
        # Importing it initialises MPI, which may start its daemon then.
        with in_sessions_of_their_own():
            self.package = feature_detection.load_package()
        if self.is_prebuilt and self.package.prebuilt_llm is None:
            raise ConfigError(
                f"deployments.{self.name}.model is a prebuilt engine, which tensorrt_llm "
                f"{self.package.version} cannot run; give the checkpoint's folder instead"
            )
        self.features = feature_detection.detect(self.package, self._llm_class)

    def _build(self) -> Any:
        name = "TrtLlmArgs" if self.is_prebuilt else "TorchLlmArgs"
        args_type = feature_detection.find([f"tensorrt_llm.llmapi.llm_args:{name}"])
        kwargs = llm_kwargs(self.settings, self.package, args_type)
        with _build_lock:
            before = worker_processes()
            try:
                with in_sessions_of_their_own():
                    return self._llm_class(model=self.model, **kwargs)
            except (ValueError, TypeError, FileNotFoundError) as error:
                raise ConfigError(
                    f"deployments.{self.name}: tensorrt_llm refused the settings: {error}"
                ) from error
            except Exception as error:
                raise EngineDied(f"tensorrt_llm could not be started: {error}") from error
            finally:
                self._workers = worker_processes() - before

    async def shut_down(self) -> None:
        """End the engine and its processes, in bounded time even if it hangs."""
        limit = self.settings.own.shutdown_timeout_s
        if self._building is not None and self.llm is None:
            try:
                async with asyncio.timeout(limit):
                    self.llm = await asyncio.shield(self._building)
            except TimeoutError:
                log.error("%s: the engine is still being built; its processes are left to exit", self.name)
            except Exception as error:  # noqa: BLE001 - it failed to start, and that has been told
                log.info("%s: the engine had failed to start: %s", self.name, error)
        if self.llm is None:
            return
        llm, self.llm = self.llm, None
        try:
            async with asyncio.timeout(limit):
                await in_daemon_thread(llm.shutdown, "tensorrt_llm shutdown")
        except TimeoutError:
            log.error("%s: the engine did not shut down within %g s", self.name, limit)
        except Exception as error:  # noqa: BLE001 - a dead engine may fail in any way
            log.warning("%s: the engine failed to shut down: %s", self.name, error)
        if killed := kill_processes(self._workers):
            log.warning("%s: killed %d worker processes that stayed behind", self.name, killed)
