"""TensorRT-LLM's LLM API behind the Engine protocol.

Requests go in as token ids and come out as deltas; n outputs are n engine requests, since the engine's own
n > 1 loses finish reasons and ends all outputs at one's stop string. Tokens are drawn by our sampler as a
logits processor where start-up has shown that the engine honours it, else by the engine's.

Not run on hardware yet: tested against a stand-in that enforces the recorded interface of versions 1.2 and 1.3.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinjet.engines import pushed
from twinjet.engines.base import EngineEvent, EngineInfo, EngineLoad, KvCache, LoadProgress, Run
from twinjet.engines.kv_journal import KvJournal
from twinjet.engines.tensorrt_llm.front import features
from twinjet.engines.tensorrt_llm.front.adapters import AdapterTable
from twinjet.engines.tensorrt_llm.front.channel import ReportChannel
from twinjet.engines.tensorrt_llm.front.describe import DEFAULT_BLOCK_SIZE, describe
from twinjet.engines.tensorrt_llm.front.drawing import Drawing
from twinjet.engines.tensorrt_llm.front.handle import EngineHandle
from twinjet.engines.tensorrt_llm.front.handoff import Handoff, Handoffs, read_key
from twinjet.engines.tensorrt_llm.front.health import Watchdog, own_verdict
from twinjet.engines.tensorrt_llm.front.model import ModelFacts, learn_model
from twinjet.engines.tensorrt_llm.front.run import RequestRun, ResultError, RunContext, StepBatch
from twinjet.engines.tensorrt_llm.front.selftest import SelfTest
from twinjet.engines.tensorrt_llm.front.settings import parse_options
from twinjet.engines.tensorrt_llm.front.stats import DestructiveReader, EngineStats, KvEventFan
from twinjet.engines.tensorrt_llm.front.submission import Submission
from twinjet.engines.tensorrt_llm.front.tokenizer import HfTokenizer, check_prebuilt
from twinjet.engines.tensorrt_llm.front.trials import EngineTrials, Submit
from twinjet.errors import (
    AlreadyExists,
    ConfigError,
    EngineDied,
    InvalidRequest,
    RequestAborted,
    RequestFailed,
    TwinjetError,
)
from twinjet.grammar.vocabulary import Vocabulary, write_vocabulary
from twinjet.request import EngineRequest

log = logging.getLogger(__name__)

_FIRST_STATS_S = 5.0
_SUSPICIOUS_FAILURES = 3
"""Failures without a step between them after which the engine has to show that it lives: on a dead device each
request fails as if it were that request's own fault."""
_GUIDED_ERROR = "Guided decoding error:"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """A started engine's parts. submit: SamplingParams arguments, prompt and keywords to a result object.

    timeout_s: the time that a short request may take.
    """

    handle: EngineHandle
    model: ModelFacts
    drawing: Drawing
    stats: EngineStats
    kv_events: KvEventFan
    self_test: SelfTest
    submit: Submit
    timeout_s: float


class TrtLlmEngine:
    """One model on TensorRT-LLM.

    name: the deployment's, for messages. model: a folder or a name for the package, or a folder with a
    prebuilt engine. options: see twinjet.engines.tensorrt_llm.front.settings. native_sampler: let our sampler draw
    where it can.
    Raises ConfigError if the package is missing or an option cannot work.
    """

    def __init__(
        self,
        name: str,
        model: str,
        options: Mapping[str, Any] | None = None,
        *,
        native_sampler: bool = True,
    ) -> None:
        if not features.is_installed():
            raise ConfigError(f"deployments.{name}: {features.MISSING}")
        settings = parse_options(name, options or {}, native_sampler=native_sampler)
        check_prebuilt(name, model)
        self._name = name
        self._own = settings.own
        self._handle = EngineHandle(name, model, settings)
        self._channel = ReportChannel()
        reason = "" if native_sampler else "native_sampler is off"
        self._drawing = Drawing(self._handle, self._channel, reason=reason)
        self._runs: dict[str, RequestRun] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._stats = EngineStats()
        self._kv_events = KvEventFan()
        self._readers: list[DestructiveReader] = []
        self._adapters = AdapterTable()
        self._handoffs = Handoffs(read_key(self._own.handoff_key_file), self._own.handoff_lifetime_s)
        self._submission = Submission(self._handle, self._drawing, self._adapters, self._handoffs)
        self._failures_in_a_row = 0
        self._death: asyncio.Future[str] | None = None
        self._is_stopped = False
        self._watchdog: Watchdog | None = None
        self._model: ModelFacts
        self._context: RunContext
        self._self_test: SelfTest

    @property
    def tokenizer(self) -> HfTokenizer:
        return self._model.tokenizer

    async def start(self, report: Callable[[LoadProgress], None]) -> None:
        """See Engine.start."""
        self._death = asyncio.get_running_loop().create_future()
        await self._channel.start()
        report(LoadProgress("importing tensorrt_llm", 0.02))
        await self._handle.import_package()
        report(LoadProgress("loading weights and building the engine", 0.1))
        await self._handle.build()
        report(LoadProgress("reading the model's files", 0.8))
        self._model = await asyncio.to_thread(learn_model, self._handle)
        report(LoadProgress("drawing a first token", 0.85))
        test = self._begin_service()
        try:
            await test.probe()
        except Exception as error:
            raise EngineDied(f"the engine gave no first token: {error}") from error
        report(LoadProgress("trying the sampler", 0.92))
        await self._drawing.choose(test, self.make_trials(), self._model)
        await self._learn_capacity()
        # Once now, so that what cannot be described fails the start and not a caller.
        self.describe()
        assert self._watchdog is not None
        self._watchdog.start()
        report(LoadProgress("ready", 1.0))

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """See Engine.generate."""
        try:
            async with aclosing(pushed.read(self, request)) as events:
                async for event in events:
                    yield event
        finally:
            await asyncio.gather(*self._closing)

    def submit(self, request: EngineRequest, run: Run) -> None:
        """See PushEngine.submit."""
        self._check_alive()
        if request.request_id in self._runs:
            raise AlreadyExists("request", request.request_id)
        self._submission.check(request)
        handoff = self._submission.open_handoff(request)
        drawn = () if handoff is None else handoff.first_tokens
        made = self._runs[request.request_id] = RequestRun(
            self._context, request, lambda each: self._drawing.plan(each, drawn), run, handoff
        )
        made.start()

    def flush(self) -> None:
        """See PushEngine.flush; nothing is held back."""

    def cancel(self, request_id: str, output_index: int | None = None) -> None:
        """See PushEngine.cancel."""
        if request_id not in self._runs:
            return
        if output_index is not None:
            self._runs[request_id].stop_output(output_index)
            return
        closing = asyncio.create_task(self._runs.pop(request_id).close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def vocabulary(self, folder: Path) -> Vocabulary:
        """See GrammarEngine.vocabulary."""
        tokens = self._model.tokens
        return await asyncio.to_thread(
            write_vocabulary,
            self._model.tokenizer.hf,
            vocab_size=tokens.vocab_size,
            end_token_ids=tuple(tokens.eos_token_ids),
            folder=folder,
        )

    async def abort(self, request_id: str) -> None:
        run = self._runs.get(request_id)
        if run is not None:
            run.fail(RequestAborted(f"request {request_id!r} was aborted"))

    async def load(self) -> EngineLoad:
        return self._stats.load(in_flight=len(self._runs))

    def describe(self) -> EngineInfo:
        return describe(self._handle, self._model, self._drawing, self._stats)

    async def wait_dead(self) -> str:
        assert self._death is not None, "start() was not called"
        return await asyncio.shield(self._death)

    async def stop(self) -> None:
        if self._is_stopped:
            return
        self._is_stopped = True
        for run in list(self._runs.values()):
            run.fail(EngineDied("the engine was stopped"))
        await asyncio.gather(*self._closing)
        if self._watchdog is not None:
            await self._watchdog.stop()
        for reader in self._readers:
            await reader.stop()
        self._kv_events.journal.close()
        await self._handle.shut_down()
        await self._channel.stop()
        await asyncio.to_thread(self._drawing.close)

    async def load_adapter(self, name: str, path: str) -> bool:
        """See AdapterEngine.load_adapter; the engine reads the weights with the first request."""
        self._submission.check_adapters()
        return self._adapters.load(name, path, max_rank=self._handle.max_lora_rank)

    async def unload_adapter(self, name: str) -> None:
        """See AdapterEngine.unload_adapter; its weights leave the engine's cache when room is needed."""
        self._submission.check_adapters()
        self._adapters.unload(name)

    def adapters(self) -> Mapping[str, str]:
        return self._adapters.paths()

    async def reset_prefix_cache(self) -> bool:
        """Let no later request find what is cached now.

        The engine cannot forget; later requests get another salt, and the old blocks age out.
        """
        self._submission.forget_prefixes()
        return True

    @property
    def kv_journal(self) -> KvJournal:
        return self._kv_events.journal

    def _begin_service(self) -> SelfTest:
        own = self._own
        tokens = self._model.tokens
        # An offload to host memory is counted in by versions that cannot be told from the others.
        self._stats.counts_host_blocks = bool(self._handle.kv_arg("host_cache_size", 0))
        self._kv_events.on_created = self._learn_blocks
        self._handle.on_lost = self._on_lost
        test = self._self_test = SelfTest(
            submit=self._submit_test,
            channel=self._channel,
            tokens=tokens,
            prompt=self._trial_prompt,
            timeout_s=own.probe_timeout_s,
        )
        self._watchdog = Watchdog(
            probe=test.probe,
            verdict=lambda: own_verdict(self._handle.llm, self._handle.package.request_errors),
            in_flight=lambda: len(self._runs),
            on_death=self._on_death,
            no_progress_s=own.no_progress_s,
            idle_probe_s=own.idle_probe_s,
            probe_timeout_s=own.probe_timeout_s,
        )
        self._context = RunContext(
            submit=self._submit,
            seal=self._handoffs.seal,
            explain=self._explain,
            progressed=self._progressed,
            channel=self._channel,
            eos_token_ids=frozenset(tokens.eos_token_ids),
            batch=StepBatch(),
            counters=self._drawing.counters,
            report_timeout_s=own.report_timeout_s,
        )
        self._start_readers()
        return test

    @property
    def _trial_prompt(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [self._model.tokens.first_eos_token_id if bos is None else bos]

    def _progressed(self) -> None:
        assert self._watchdog is not None
        self._failures_in_a_row = 0
        self._watchdog.progressed()

    def _learn_blocks(self, num_blocks: int) -> None:
        """Take the GPU's number of blocks from the KV events, which tell the cache's levels apart."""
        if self._stats.capacity is None:
            size = int(self._handle.kv_arg("tokens_per_block", DEFAULT_BLOCK_SIZE))
            self._stats.set_capacity(KvCache(num_blocks, size))

    def _start_readers(self) -> None:
        def is_busy() -> bool:
            return bool(self._runs)

        self._readers = [
            DestructiveReader(
                "statistics",
                lambda: self._handle.llm.get_stats_async(timeout=self._handle.silence_s),
                self._stats.take,
                is_busy,
                self._handle.silence_s,
            )
        ]
        if self._handle.has_kv_events:
            self._readers.append(
                DestructiveReader(
                    "KV events",
                    lambda: self._handle.llm.get_kv_cache_events_async(timeout=self._handle.silence_s),
                    self._kv_events.take,
                    is_busy,
                    self._handle.silence_s,
                )
            )
        for reader in self._readers:
            reader.start()

    @property
    def parts(self) -> EngineParts:
        """What the engine is made of, once it has started; for the doctor."""
        return EngineParts(
            handle=self._handle,
            model=self._model,
            drawing=self._drawing,
            stats=self._stats,
            kv_events=self._kv_events,
            self_test=self._self_test,
            submit=self._submit_raw,
            timeout_s=self._own.probe_timeout_s,
        )

    def make_trials(self) -> EngineTrials:
        """Make the trials of what the engine's own sampler and cache honour."""
        return EngineTrials(
            submit=self._submit_raw,
            tokens=self._model.tokens,
            prompt=self._trial_prompt,
            block_size=int(self._handle.kv_arg("tokens_per_block", DEFAULT_BLOCK_SIZE)),
            timeout_s=self._own.probe_timeout_s,
            sampling_fields=self._handle.features.sampling_fields,
        )

    async def _learn_capacity(self) -> None:
        """Learn the cache's size: from the engine where it can be asked, else from its first statistics."""
        self._stats.set_capacity(await self._handle.kv_capacity(self._own.probe_timeout_s))
        try:
            async with asyncio.timeout(_FIRST_STATS_S):
                await self._stats.wait_for_row()
        except TimeoutError:
            log.warning("%s: the engine gives no statistics; its KV cache's size is not known", self._name)

    def _check_alive(self) -> None:
        if self._death is None or self._is_stopped:
            raise EngineDied("the engine is not running")
        if self._death.done():
            raise EngineDied(self._death.result())

    def _submit(self, request: EngineRequest, arguments: dict[str, Any], handoff: Handoff | None) -> Any:
        """Hand one output to the engine."""
        keywords = self._submission.keywords(request, handoff)
        return self._submit_raw(arguments, list(request.prompt_token_ids), keywords)

    def _submit_test(self, arguments: dict[str, Any], prompt: list[int]) -> Any:
        ends = {
            "end_id": self._model.tokens.first_eos_token_id,
            "pad_id": self._model.tokens.first_eos_token_id,
        }
        return self._submit_raw(ends | arguments, prompt, {"streaming": False})

    def _submit_raw(self, arguments: dict[str, Any], prompt: list[int], keywords: dict[str, Any]) -> Any:
        result = self._handle.submit(arguments, prompt, keywords)
        for reader in self._readers:
            reader.poke()
        return result

    async def _explain(self, error: Exception) -> TwinjetError:
        """Turn what the engine raised into our error; finds out whether the engine still lives."""
        assert self._watchdog is not None
        log.warning("%s: the engine raised %s: %s", self._name, type(error).__name__, error)
        if self._handle.lost is not None:
            self._watchdog.died(f"{self._handle.lost}: {error}")
            return EngineDied(f"{self._handle.lost}: {error}")
        if str(error).startswith(_GUIDED_ERROR):
            return InvalidRequest.of("sampling.constraint", str(error))
        if isinstance(error, self._handle.package.fatal_errors):
            self._watchdog.died(f"fatal error: {error}")
            return EngineDied(f"fatal error: {error}")
        self._failures_in_a_row += 1
        if isinstance(error, (*self._handle.package.request_errors, ResultError, ValueError, TypeError)) and (
            self._failures_in_a_row < _SUSPICIOUS_FAILURES
        ):
            return RequestFailed("the engine could not do this request", reason="ENGINE_REFUSED")
        self._failures_in_a_row = 0
        reason = await self._watchdog.check()
        if reason is not None:
            return EngineDied(reason)
        return RequestFailed("the engine could not finish this request", reason="ENGINE_ERROR")

    def _on_lost(self, reason: str) -> None:
        # A turn of the loop later, so that whoever met the worker's error can say which it was.
        assert self._watchdog is not None
        asyncio.get_running_loop().call_soon(self._watchdog.died, reason)

    def _on_death(self, reason: str) -> None:
        assert self._death is not None
        if not self._death.done():
            self._death.set_result(reason)
        for run in list(self._runs.values()):
            run.fail(EngineDied(reason))
