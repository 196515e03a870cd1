"""The vLLM engine: AsyncLLM behind the Engine protocol.

Importing this module does not import vLLM; `VllmEngine.start` does, in a thread, while the forkserver does
the same in parallel (see prestart). AsyncLLM lives in this process, vLLM's engine core in its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinjet.engines.base import EngineEvent, EngineInfo, EngineLoad, LoadProgress, Tokenizer
from twinjet.engines.text import make_output
from twinjet.engines.vllm.front import startup
from twinjet.engines.vllm.front.adapters import Adapters
from twinjet.engines.vllm.front.live import LiveRequest
from twinjet.engines.vllm.front.outputs import failure, output_event, prompt_event
from twinjet.errors import (
    AlreadyExists,
    EngineDied,
    InvalidRequest,
    RequestAborted,
    RequestFailed,
    TwinjetError,
    Unsupported,
)

if TYPE_CHECKING:
    from twinjet.grammar.vocabulary import Vocabulary
    from twinjet.request import EngineRequest

logger = logging.getLogger(__name__)


class VllmEngine:
    """A model on vLLM; implements Engine, EmbeddingEngine, AdapterEngine, PrefixCacheEngine and GrammarEngine.

    name: the deployment's, for logs. model: a folder or a name that vLLM accepts. options: fields of vLLM's AsyncEngineArgs, passed through
    verbatim. native_sampler, native_block_manager: use ours where they apply; describe() says whether they do.
    """

    def __init__(
        self,
        name: str,
        model: str,
        options: Mapping[str, Any],
        *,
        native_sampler: bool = True,
        native_block_manager: bool = True,
    ) -> None:
        self._plan = startup.Plan(name, model, dict(options), native_sampler, native_block_manager)
        self._running: startup.Running | None = None
        self._live: dict[str, LiveRequest] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._died: asyncio.Future[str] | None = None
        self._stopping = False

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine().tokenizer

    async def start(self, report: Callable[[LoadProgress], None]) -> None:
        """Load the model; see Engine.start. Raises ConfigError, EngineDied."""
        loop = asyncio.get_running_loop()
        self._died = loop.create_future()
        began = time.monotonic()
        running = await startup.launch(self._plan, report)
        if self._stopping:
            await asyncio.to_thread(running.shutdown)
            raise EngineDied("the engine was stopped while it started")
        self._running = running
        running.watch(loop, self._on_death)
        await running.components.complete()
        logger.info("the engine of %s started in %.1f s", self._plan.name, time.monotonic() - began)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """Run one request; see Engine.generate."""
        running = self._engine()
        if request.request_id in self._live:
            raise AlreadyExists("request", request.request_id)
        live = LiveRequest(request.request_id)
        self._live[request.request_id] = live
        try:
            async with contextlib.aclosing(self._events(running, live, request)) as events:
                async for event in events:
                    yield event
        finally:
            del self._live[request.request_id]
            await self._settle(running, live)

    async def _events(
        self, running: startup.Running, live: LiveRequest, request: EngineRequest
    ) -> AsyncGenerator[EngineEvent, None]:
        sampling = request.sampling
        await self._submit(running, live, request)
        has_prompt = False
        eos = running.components.info().eos_token_ids
        vocabulary = running.tokenizer.vocabulary
        token_text = vocabulary.token_text
        outputs = [make_output(vocabulary, sampling, eos) for _ in range(sampling.n)]
        while live.is_open:
            await live.wait()
            try:
                fetched = live.fetch(first_only=not has_prompt)
            except Exception as error:
                # vLLM puts an exception into every collector when its output loop has failed.
                reason = f"its output loop ended: {error!r}"
                self._on_death(reason)
                raise EngineDied(f"the engine died: {reason}") from error
            for index, output in fetched:
                completion = output.outputs[0]
                failed = failure(completion, is_constrained=sampling.constraint is not None)
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
                    self._spawn(running.llm.abort([live.engine_id(index)], internal=True))
                    live.finish(index)
                yield event
                if live.failure is not None:
                    raise live.failure

    async def _submit(self, running: startup.Running, live: LiveRequest, request: EngineRequest) -> None:
        """Hand each output to vLLM as a request of its own.

        vLLM's own n > 1 refuses greedy requests and seeds output i with seed + i, so that two requests with
        neighbouring seeds would share outputs.
        """
        from twinjet.engines.vllm.front.params import sampling_params

        adapter = running.adapters.request_for(request.adapter)
        # Without a type, vLLM would process the prompt in a thread.
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": list(request.prompt_token_ids)}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        for index in range(request.sampling.n):
            add = running.llm.add_request(
                request.request_id if request.sampling.n == 1 else f"{request.request_id}-{index}",
                prompt,
                sampling_params(
                    request.sampling,
                    index,
                    native=running.components.has_native_sampler,
                    grammar=request.grammar,
                ),
                lora_request=adapter,
                priority=-request.priority,
            )
            try:
                await live.submit(index, asyncio.ensure_future(add))
            except Exception as error:
                raise self._translated(error) from error
            if live.failure is not None:
                raise live.failure

    def _translated(self, error: Exception) -> Exception:
        """Make one of our errors of what vLLM raised on submission."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, TwinjetError):
            return error
        if isinstance(error, EngineDeadError):
            return EngineDied()
        if isinstance(error, VLLMClientError | ValueError):
            return InvalidRequest.of(getattr(error, "parameter", None) or "sampling", str(error.args[0]))
        return RequestFailed("the engine did not take the request", reason="ENGINE_ERROR")

    async def _settle(self, running: startup.Running, live: LiveRequest) -> None:
        """Abort what still runs of a request, also if we are cancelled meanwhile."""
        if self._running is not running or (self._died is not None and self._died.done()):
            return
        await asyncio.shield(self._spawn(self._abort_unfinished(running, live)))

    async def _abort_unfinished(self, running: startup.Running, live: LiveRequest) -> None:
        ids = await live.unfinished_ids()
        if ids:
            await running.llm.abort(ids, internal=True)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def vocabulary(self, folder: Path) -> Vocabulary:
        """Write the model's vocabulary; see GrammarEngine.vocabulary."""
        from twinjet.engines.vllm.front.vocabulary import write

        running = self._engine()
        ends = running.components.info().eos_token_ids
        return await asyncio.to_thread(write, running.config, ends, folder)

    async def abort(self, request_id: str) -> None:
        """Stop a request within one step; see Engine.abort."""
        live = self._live.get(request_id)
        if live is None:
            return
        live.fail(RequestAborted("an operator ended the request"))
        await self._settle(self._engine(), live)

    async def load(self) -> EngineLoad:
        running = self._engine()
        self._refresh(running)
        return running.stats.read()

    def describe(self) -> EngineInfo:
        running = self._engine()
        self._refresh(running)
        return running.components.info()

    def _refresh(self, running: startup.Running) -> None:
        """Have the components' counters read again, at most once a second, for the next caller."""
        if running.components.is_due():
            self._spawn(running.components.refresh())

    async def wait_dead(self) -> str:
        assert self._died is not None, "start() comes first"
        return await asyncio.shield(self._died)

    def _on_death(self, reason: str) -> None:
        if self._stopping or self._died is None or self._died.done():
            return
        logger.error("the engine died: %s", reason)
        self._died.set_result(reason)
        for live in self._live.values():
            live.fail(EngineDied(f"the engine died: {reason}"))

    async def stop(self) -> None:
        """End the engine and its processes; see Engine.stop."""
        self._stopping = True
        running, self._running = self._running, None
        for live in self._live.values():
            live.fail(EngineDied("the engine was stopped"))
        if running is not None:
            await asyncio.to_thread(running.shutdown)

    def _engine(self) -> startup.Running:
        if self._running is None or (self._died is not None and self._died.done()):
            raise EngineDied("the engine is not running")
        return self._running

    async def embed(
        self, request_id: str, prompt_token_ids: Sequence[int], dimensions: int | None
    ) -> Sequence[float]:
        """Give the vector of one input; see EmbeddingEngine.embed."""
        running = self._engine()
        if "embed" not in running.components.info().capabilities:
            raise Unsupported("embed")
        from twinjet.engines.vllm.front.embedding import embed

        return await embed(running.llm, request_id, prompt_token_ids, dimensions)

    async def load_adapter(self, name: str, path: str) -> bool:
        """Load a LoRA adapter; see AdapterEngine.load_adapter."""
        return await self._adapters().load(name, path)

    async def unload_adapter(self, name: str) -> None:
        """Remove a LoRA adapter; see AdapterEngine.unload_adapter."""
        await self._adapters().unload(name)

    def adapters(self) -> Mapping[str, str]:
        return self._adapters().paths()

    def _adapters(self) -> Adapters:
        running = self._engine()
        if "adapters" not in running.components.info().capabilities:
            raise Unsupported("adapters", "start the engine with enable_lora = true")
        return running.adapters

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False if running requests hold some."""
        done: bool = await self._engine().llm.reset_prefix_cache()
        return done
