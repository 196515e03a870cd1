"""AsyncLLM as the link to an engine core: for vLLM versions and features our own client was not tested with.

Imports vLLM, all of it, into the front end.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front.link import Adapter, Collector
from twinjet.engines.vllm.front.params import sampling_params
from twinjet.errors import ConfigError, EngineDied, InvalidRequest, RequestFailed, TwinjetError

if TYPE_CHECKING:
    from twinjet.engines.vllm.front.load import LoadReader
    from twinjet.engines.vllm.front.process import EngineContext
    from twinjet.request import EngineRequest, Sampling

# Starting AsyncLLM sets names of the whole process for a while, so one starts at a time.
_LAUNCHING = threading.Lock()


def import_vllm() -> None:
    """Load vLLM. Raises ConfigError if it is not there."""
    # The collector would walk everything imported so far again and again: a fifth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import vllm.v1.engine.async_llm
        import vllm.v1.structured_output.backend_xgrammar  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported: {error}; install twinjet[vllm]") from error
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def launch(
    model: str,
    options: dict[str, Any],
    scheduler_cls: str | None,
    worker_cls: str | None,
    context: EngineContext,
    stats: LoadReader,
) -> tuple[StockLink, Facts]:
    """Start an engine through AsyncLLM; blocks. Raises ConfigError, EngineDied."""
    import_vllm()
    import vllm.v1.engine.utils as vllm_utils
    from vllm.v1.engine.async_llm import AsyncLLM

    from twinjet.engines.vllm import config as settings

    # vLLM's own choice is fork or spawn (on CPU always spawn); this is where it makes it.
    with _LAUNCHING:
        config = settings.engine_config(model, options, scheduler_cls=scheduler_cls, worker_cls=worker_cls)
        original = vllm_utils.get_mp_context
        vllm_utils.get_mp_context = lambda: context
        try:
            llm = AsyncLLM.from_vllm_config(config)
        except Exception as error:
            raise EngineDied(f"the engine did not start: {error}") from error
        finally:
            vllm_utils.get_mp_context = original
    llm.logger_manager = stats
    return StockLink(llm), settings.facts(config, b"")


class StockLink:
    """Implements Link. llm: a running AsyncLLM."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._loop: asyncio.AbstractEventLoop | None = None

    def watch(self, loop: asyncio.AbstractEventLoop, on_death: Callable[[str], None]) -> None:
        """Leave on_death alone: AsyncLLM puts an exception into every collector when its loop has failed."""
        self._loop = loop

    async def submit(
        self, request: EngineRequest, output_index: int, adapter: Adapter | None, *, native: bool
    ) -> Collector:
        sampling = request.sampling
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_token_ids)}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        if sampling.constraint is None:
            # Without a type, vLLM processes the prompt in a thread, which a grammar's check needs.
            prompt["type"] = "token"
        try:
            collector: Collector = await self._llm.add_request(
                request.request_id if sampling.n == 1 else f"{request.request_id}-{output_index}",
                prompt,
                sampling_params(sampling, output_index, native=native),
                lora_request=_lora(adapter),
                priority=-request.priority,
            )
        except Exception as error:
            raise _translated(error, sampling) from error
        return collector

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._llm.abort(list(request_ids), internal=True)

    async def call(self, method: str, *arguments: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await self._llm.engine_core.call_utility_async(method, *arguments)
        except EngineDeadError as error:
            raise EngineDied from error

    async def add_adapter(self, adapter: Adapter) -> None:
        await self._llm.add_lora(_lora(adapter))

    async def reset_prefix_cache(self) -> bool:
        return bool(await self._llm.reset_prefix_cache())

    async def embed(
        self, request_id: str, prompt_token_ids: Sequence[int], dimensions: int | None
    ) -> Sequence[float]:
        from twinjet.engines.vllm.front.embedding import embed

        return await embed(self._llm, request_id, prompt_token_ids, dimensions)

    def shutdown(self) -> None:
        # While it reads, vLLM takes the end of its engine for a failure and logs it.
        if self._loop is not None and self._llm.output_handler is not None:
            self._loop.call_soon_threadsafe(self._llm.output_handler.cancel)
        self._llm.shutdown(timeout=5.0)


def _lora(adapter: Adapter | None) -> Any:
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.name, adapter.number, adapter.path)


def _translated(error: Exception, sampling: Sampling) -> Exception:
    """Make one of our errors of what vLLM raised on submission."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, TwinjetError):
        return error
    if isinstance(error, EngineDeadError):
        return EngineDied()
    if isinstance(error, VLLMClientError | ValueError):
        field = "sampling"
        if sampling.constraint is not None:
            field = f"sampling.constraint.{sampling.constraint.kind}"
        return InvalidRequest.of(getattr(error, "parameter", None) or field, str(error.args[0]))
    return RequestFailed("the engine did not take the request", reason="ENGINE_ERROR")
