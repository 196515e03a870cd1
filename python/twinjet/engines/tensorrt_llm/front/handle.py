"""The package's LLM object: built off the loop, asked for its settings, shut down in bounded time."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

from twinjet.engines.tensorrt_llm.front import features as feature_detection
from twinjet.engines.tensorrt_llm.front.features import Features, Package
from twinjet.engines.tensorrt_llm.front.params import EngineSampler
from twinjet.engines.tensorrt_llm.front.processes import in_daemon_thread, kill_processes, worker_processes
from twinjet.engines.tensorrt_llm.front.settings import EngineSettings, llm_kwargs
from twinjet.engines.tensorrt_llm.front.tokenizer import is_prebuilt
from twinjet.errors import ConfigError, EngineDied

log = logging.getLogger(__name__)

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

    def submit(self, arguments: dict[str, Any], prompt: list[int], keywords: dict[str, Any]) -> Any:
        """Hand a prompt to the engine; a fresh SamplingParams each time, since the engine changes it."""
        params = self.package.sampling_params(**arguments)
        return self.llm.generate_async({"prompt_token_ids": prompt}, sampling_params=params, **keywords)

    def arg(self, name: str, default: Any) -> Any:
        """Read an effective setting: the engine's own arguments object knows the defaults it filled in."""
        args = getattr(self.llm, "args", None)
        return getattr(args, name, self.settings.kwargs.get(name, default))

    def kv_arg(self, name: str, default: Any) -> Any:
        """Read an effective setting of the KV cache."""
        return getattr(self.arg("kv_cache_config", None), name, default)

    @property
    def has_block_reuse(self) -> bool:
        return bool(self.kv_arg("enable_block_reuse", True))

    @property
    def has_kv_events(self) -> bool:
        return self.has_block_reuse and bool(self.kv_arg("event_buffer_max_size", 0))

    @property
    def engine_sampler(self) -> EngineSampler:
        """What the engine's own sampler can do here."""
        is_cpp = self.is_prebuilt or self.settings.kwargs.get("sampler_type") == "TRTLLMSampler"
        return EngineSampler(
            penalties=is_cpp,
            # The first recorded version with priority is also the first whose sampler is known to take it.
            min_p=is_cpp or self.features.has_priority,
            guided_backend=self.settings.kwargs.get("guided_decoding_backend"),
            guided_decoding=self.package.guided_decoding,
        )

    @property
    def _llm_class(self) -> Any:
        return self.package.prebuilt_llm if self.is_prebuilt else self.package.llm

    def _import(self) -> None:
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
