"""The vLLM engine behind the Engine protocol.

vLLM lives in the engine's process, which comes from a forkserver that has imported it (see prestart); this one
speaks to it through a Link and imports vLLM only where AsyncLLM must be that link.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinjet.engines import pushed
from twinjet.engines.base import EngineEvent, EngineInfo, EngineLoad, LoadProgress, Run, Tokenizer
from twinjet.engines.vllm.front import startup
from twinjet.engines.vllm.front.adapters import Adapters
from twinjet.engines.vllm.front.kv_events import KvEventReceiver
from twinjet.errors import (
    AlreadyExists,
    EngineDied,
    RequestAborted,
    Unsupported,
)
from twinjet.grammar.vocabulary import write_vocabulary_apart

if TYPE_CHECKING:
    from twinjet.engines.kv_journal import KvJournal
    from twinjet.engines.vllm.front import parts
    from twinjet.grammar.vocabulary import Vocabulary
    from twinjet.request import EngineRequest

logger = logging.getLogger(__name__)


class VllmEngine:
    """A model on vLLM; implements PushEngine, EmbeddingEngine, AdapterEngine, PrefixCacheEngine and GrammarEngine.

    name: the deployment's, for logs. model: a folder or a name that vLLM accepts. options: fields of vLLM's AsyncEngineArgs, passed through
    verbatim. native_sampler, native_block_manager: use ours where they apply; describe() says whether they do.
    kv_events: tell what the prefix cache holds, where the block manager is ours.
    """

    def __init__(
        self,
        name: str,
        model: str,
        options: Mapping[str, Any],
        *,
        native_sampler: bool = True,
        native_block_manager: bool = True,
        kv_events: bool = False,
    ) -> None:
        self._kv_events = KvEventReceiver() if kv_events else None
        address = "" if self._kv_events is None else self._kv_events.address
        self._plan = startup.Plan(name, model, dict(options), native_sampler, native_block_manager, address)
        self._running: startup.Running | None = None
        self._runs: dict[str, Run] = {}
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
        if self._kv_events is not None:
            await self._kv_events.listen()
        running = await startup.launch(self._plan, report)
        if self._stopping:
            await asyncio.to_thread(running.shutdown)
            raise EngineDied("the engine was stopped while it started")
        self._running = running
        running.watch(loop, self._on_death)
        await running.components.complete()
        self._check_kv_events(running.components.info())
        logger.info("the engine of %s started in %.1f s", self._plan.name, time.monotonic() - began)

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """Run one request; see Engine.generate."""
        return pushed.read(self, request)

    def submit(self, request: EngineRequest, run: Run) -> None:
        """Begin a request; see PushEngine.submit."""
        running = self._engine()
        if request.request_id in self._runs:
            raise AlreadyExists("request", request.request_id)
        adapter = running.adapters.find(request.adapter)
        sampling, native = request.sampling, running.components.has_native_sampler
        bad_text = None
        if sampling.bad_words and native:
            bad_text = running.token_texts.settings(
                sampling.bad_words, skips_special=sampling.skip_special_tokens
            )
        running.link.submit(request, run, adapter, native=native, bad_text=bad_text)
        self._runs[request.request_id] = run

    def flush(self) -> None:
        """See PushEngine.flush."""
        if self._running is not None:
            self._running.link.flush()

    def cancel(self, request_id: str, output_index: int | None = None) -> None:
        """Stop an output or a request and forget it; see PushEngine.cancel."""
        if output_index is None:
            self._runs.pop(request_id, None)
        if self._running is not None:
            self._running.link.cancel(request_id, output_index)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def vocabulary(self, folder: Path) -> Vocabulary:
        """Write the model's vocabulary; see GrammarEngine.vocabulary."""
        info = self._engine().components.info()
        wanted = self._plan.options.get("structured_outputs_config") or {}
        return await write_vocabulary_apart(
            self._engine().tokenizer_name,
            vocab_size=info.limits.vocab_size,
            end_token_ids=info.eos_token_ids,
            folder=folder,
            is_compact=bool(wanted.get("disable_any_whitespace")),
        )

    async def abort(self, request_id: str) -> None:
        """Stop a request within one step; see Engine.abort."""
        run = self._runs.get(request_id)
        if run is None:
            return
        if self._running is not None:
            # Its id stays taken until its reader has let go of it.
            self._running.link.cancel(request_id)
        run.fail(RequestAborted("an operator ended the request"))

    async def load(self) -> EngineLoad:
        running = self._engine()
        self._refresh(running)
        return running.stats.read()

    def describe(self) -> EngineInfo:
        running = self._engine()
        self._refresh(running)
        info = running.components.info()
        if self._kv_events is None or not _tells_kv_events(info):
            return info
        return replace(info, capabilities=info.capabilities | {"kv_events"})

    @property
    def kv_journal(self) -> KvJournal:
        """See KvEventEngine; for an engine with kv_events."""
        assert self._kv_events is not None, "the capability tells of it"
        return self._kv_events.journal

    def _check_kv_events(self, info: EngineInfo) -> None:
        if self._kv_events is not None and not _tells_kv_events(info):
            reason = info.block_manager.reason or "prefix caching is off"
            logger.warning("%s tells no KV events: %s", self._plan.name, reason)

    def _refresh(self, running: startup.Running) -> None:
        """Have the components' counters read again, at most once a second, for the next caller."""
        if running.components.claim():
            self._spawn(_read_again(running.components))

    async def wait_dead(self) -> str:
        assert self._died is not None, "start() comes first"
        return await asyncio.shield(self._died)

    def _on_death(self, reason: str) -> None:
        if self._stopping or self._died is None or self._died.done():
            return
        logger.error("the engine died: %s", reason)
        self._died.set_result(reason)
        for run in list(self._runs.values()):
            run.fail(EngineDied(f"the engine died: {reason}"))

    async def stop(self) -> None:
        """End the engine and its processes; see Engine.stop."""
        self._stopping = True
        running, self._running = self._running, None
        if self._kv_events is not None:
            self._kv_events.close()
        for run in list(self._runs.values()):
            run.fail(EngineDied("the engine was stopped"))
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
        return await running.link.embed(request_id, prompt_token_ids, dimensions)

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
        return await self._engine().link.reset_prefix_cache()


async def _read_again(components: parts.Components) -> None:
    # An engine that is stopped or dies meanwhile is told of by others.
    with contextlib.suppress(EngineDied):
        await components.refresh()


def _tells_kv_events(info: EngineInfo) -> bool:
    return info.block_manager.implementation == "twinjet" and "prefix_cache" in info.capabilities
