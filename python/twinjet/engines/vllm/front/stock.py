"""AsyncLLM as the link to an engine core: for vLLM versions and features our own client was not tested with.

Imports vLLM, all of it, into the front end.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from twinjet.engines.base import OutputEvent, PromptEvent
from twinjet.engines.pushed import logprob_row
from twinjet.engines.text import make_output
from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front.link import Adapter
from twinjet.engines.vllm.front.live import LiveRequest
from twinjet.engines.vllm.front.outputs import failure_of, output_event, prompt_event
from twinjet.engines.vllm.front.params import sampling_params
from twinjet.errors import ConfigError, EngineDied, InvalidRequest, RequestFailed, TwinjetError
from twinjet.models.tokenizer import HfTokenizer
from twinjet.sampling.bad_text import BadTextSettings

if TYPE_CHECKING:
    from twinjet._core import Vocabulary
    from twinjet.engines.base import Run
    from twinjet.engines.vllm.front.load import LoadReader
    from twinjet.engines.vllm.front.process import EngineContext
    from twinjet.request import EngineRequest

logger = logging.getLogger(__name__)

# Starting AsyncLLM sets names of the whole process for a while, so one starts at a time.
_LAUNCHING = threading.Lock()


def import_vllm() -> None:
    """Load vLLM. Raises ConfigError if it is not there."""
    # The collector would walk everything imported so far again and again: a fifth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import vllm.v1.engine.async_llm  # noqa: F401
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
) -> tuple[StockLink, Facts, HfTokenizer]:
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
    facts = settings.facts(config)
    tokenizer = HfTokenizer(facts.tokenizer)
    return StockLink(llm, tokenizer.vocabulary, facts.eos_token_ids), facts, tokenizer


class StockLink:
    """Implements Link. llm: a running AsyncLLM."""

    def __init__(self, llm: Any, vocabulary: Vocabulary, eos_token_ids: Sequence[int]) -> None:
        self._llm = llm
        self._vocabulary = vocabulary
        self._eos = eos_token_ids
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_death: Callable[[str], None] | None = None
        self._feeders: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, loop: asyncio.AbstractEventLoop, on_death: Callable[[str], None]) -> None:
        """AsyncLLM reads by itself, and puts an exception into every collector when that has failed."""
        self._loop, self._on_death = loop, on_death

    def submit(
        self,
        request: EngineRequest,
        run: Run,
        adapter: Adapter | None,
        *,
        native: bool,
        bad_text: BadTextSettings | None,
    ) -> None:
        assert self._loop is not None, "watch() comes first"
        feeder = self._loop.create_task(self._feed(request, run, adapter, native=native, bad_text=bad_text))
        self._feeders[request.request_id] = feeder
        # Kept until it has aborted what runs, also if it was cancelled meanwhile.
        self._tasks.add(feeder)
        feeder.add_done_callback(self._tasks.discard)

    def flush(self) -> None:
        """Nothing is held back."""

    def cancel(self, request_id: str, output_index: int | None = None) -> None:
        """Stop a request. Single outputs end here before the pump hears of it."""
        feeder = self._feeders.pop(request_id, None) if output_index is None else None
        if feeder is not None:
            feeder.cancel()

    async def _feed(
        self,
        request: EngineRequest,
        run: Run,
        adapter: Adapter | None,
        *,
        native: bool,
        bad_text: BadTextSettings | None,
    ) -> None:
        """Put a request's events into its pump, made here: deltas of AsyncLLM come request by request."""
        live = LiveRequest(request.request_id)
        pump = run.outlet.pump
        try:
            await self._submit(live, request, adapter, native=native, bad_text=bad_text)
            async for event in self._events(live, request):
                if isinstance(event, PromptEvent):
                    rows = None if event.logprobs is None else [logprob_row(e) for e in event.logprobs]
                    pump.put_prompt(run.key, event.num_cached_tokens, rows, time.monotonic())
                else:
                    finish = event.finish
                    pump.put_made(
                        run.key, event.output_index, event.text, event.token_ids,
                        [logprob_row(e) for e in event.logprobs] or None,
                        None if finish is None else (finish.reason, finish.stopped_by, finish.is_eos),
                        time.monotonic(),
                    )  # fmt: skip
                run.outlet.collect()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's outcome
            run.fail(error if isinstance(error, TwinjetError) else _translated(error))
        finally:
            if ids := await live.unfinished_ids():
                await self._llm.abort(ids, internal=True)

    async def _submit(
        self,
        live: LiveRequest,
        request: EngineRequest,
        adapter: Adapter | None,
        *,
        native: bool,
        bad_text: BadTextSettings | None,
    ) -> None:
        sampling = request.sampling
        # Without a type, vLLM would process the prompt in a thread.
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": list(request.prompt_token_ids)}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        for index in range(sampling.n):
            add = self._llm.add_request(
                request.request_id if sampling.n == 1 else f"{request.request_id}-{index}",
                prompt,
                sampling_params(sampling, index, native=native, grammar=request.grammar, bad_text=bad_text),
                lora_request=_lora(adapter),
                priority=-request.priority,
            )
            await live.submit(index, asyncio.ensure_future(add))

    async def _events(
        self, live: LiveRequest, request: EngineRequest
    ) -> AsyncGenerator[PromptEvent | OutputEvent, None]:
        sampling = request.sampling
        has_prompt = False
        token_text = self._vocabulary.token_text
        outputs = [make_output(self._vocabulary, sampling, self._eos) for _ in range(sampling.n)]
        while live.is_open:
            await live.wait()
            try:
                fetched = live.fetch(first_only=not has_prompt)
            except Exception as error:
                # vLLM puts an exception into every collector when its output loop has failed.
                reason = f"its output loop ended: {error!r}"
                assert self._on_death is not None
                self._on_death(reason)
                raise EngineDied(f"the engine died: {reason}") from error
            for index, output in fetched:
                completion = output.outputs[0]
                failed = failure_of(completion, is_constrained=sampling.constraint is not None)
                if completion.finish_reason is not None:
                    live.finish(index)
                if failed is not None:
                    raise failed
                if not has_prompt:
                    has_prompt = True
                    yield prompt_event(output, request.prompt_token_ids, sampling.prompt_logprobs, token_text)
                event = output_event(completion, outputs[index], index, sampling.logprobs, token_text)
                if event.finish is not None and completion.finish_reason is None:
                    # A stop string, of which vLLM knows nothing.
                    await self._llm.abort([live.engine_id(index)], internal=True)
                    live.finish(index)
                yield event

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


def _translated(error: Exception) -> Exception:
    """Make one of our errors of what vLLM raised on submission."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, TwinjetError):
        return error
    if isinstance(error, EngineDeadError):
        return EngineDied()
    if isinstance(error, VLLMClientError | ValueError):
        return InvalidRequest.of(getattr(error, "parameter", None) or "sampling", str(error.args[0]))
    logger.error("AsyncLLM failed a request", exc_info=error)
    return RequestFailed("the engine did not take the request", reason="ENGINE_ERROR")
