"""TensorRT-LLM's LLM API behind the Engine protocol.

Requests go in as token ids and come out as deltas; n outputs are n engine requests, since the engine's own
n > 1 loses finish reasons and ends all outputs at one's stop string. Tokens are drawn by our sampler as a
logits processor where start-up has shown that the engine honours it, else by the engine's.

Not run on hardware yet: tested against a stand-in that enforces the recorded interface of versions 1.2 and 1.3.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from twinjet.engines.base import EngineEvent, EngineInfo, EngineLoad, KvEvent, LoadProgress
from twinjet.engines.tensorrt_llm.front import features
from twinjet.engines.tensorrt_llm.front.adapters import AdapterTable
from twinjet.engines.tensorrt_llm.front.channel import ReportChannel
from twinjet.engines.tensorrt_llm.front.describe import describe, has_adapters
from twinjet.engines.tensorrt_llm.front.drawing import Drawing
from twinjet.engines.tensorrt_llm.front.handle import EngineHandle
from twinjet.engines.tensorrt_llm.front.health import Watchdog, own_verdict
from twinjet.engines.tensorrt_llm.front.model import ModelFacts, learn_model
from twinjet.engines.tensorrt_llm.front.outputs import LogprobFormatter
from twinjet.engines.tensorrt_llm.front.params import engine_priority
from twinjet.engines.tensorrt_llm.front.run import RequestRun, ResultError, RunContext
from twinjet.engines.tensorrt_llm.front.selftest import SelfTest
from twinjet.engines.tensorrt_llm.front.settings import parse_options
from twinjet.engines.tensorrt_llm.front.stats import SILENCE_S, DestructiveReader, EngineStats, KvEventFan
from twinjet.engines.tensorrt_llm.front.tokenizer import HfTokenizer
from twinjet.errors import (
    AlreadyExists,
    ConfigError,
    EngineDied,
    InvalidRequest,
    RequestAborted,
    RequestFailed,
    TwinjetError,
    Unsupported,
)
from twinjet.grammar.vocabulary import Vocabulary, write_vocabulary
from twinjet.request import EngineRequest

log = logging.getLogger(__name__)

_FIRST_STATS_S = 5.0
_DEFAULT_MAX_NUM_TOKENS = 8192
_GUIDED_ERROR = "Guided decoding error:"


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
        settings = parse_options(name, options or {})
        self._name = name
        self._own = settings.own
        self._handle = EngineHandle(name, model, settings)
        self._channel = ReportChannel()
        reason = "" if native_sampler else "native_sampler is off"
        self._drawing = Drawing(self._handle, self._channel, reason=reason)
        self._runs: dict[str, RequestRun] = {}
        self._stats = EngineStats()
        self._kv_events = KvEventFan()
        self._readers: list[DestructiveReader] = []
        self._adapters = AdapterTable()
        self._salt_epoch = 0
        self._death: asyncio.Future[str] | None = None
        self._is_stopped = False
        self._watchdog: Watchdog | None = None
        self._model: ModelFacts
        self._context: RunContext

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
        await self._drawing.choose(test, self._model)
        await self._await_first_stats()
        # Once now, so that what cannot be described fails the start and not a caller.
        self.describe()
        assert self._watchdog is not None
        self._watchdog.start()
        report(LoadProgress("ready", 1.0))

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """See Engine.generate."""
        self._check_alive()
        if request.request_id in self._runs:
            raise AlreadyExists("request", request.request_id)
        self._check_request(request)
        run = RequestRun(self._context, request, self._drawing.plan)
        self._runs[request.request_id] = run
        try:
            async with aclosing(run.events()) as events:
                async for event in events:
                    yield event
        finally:
            del self._runs[request.request_id]

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
        if self._watchdog is not None:
            await self._watchdog.stop()
        for reader in self._readers:
            await reader.stop()
        self._kv_events.close()
        await self._handle.shut_down()
        await self._channel.stop()

    async def load_adapter(self, name: str, path: str) -> bool:
        """See AdapterEngine.load_adapter; the engine reads the weights with the first request."""
        self._check_adapters()
        return self._adapters.load(name, path)

    async def unload_adapter(self, name: str) -> None:
        """See AdapterEngine.unload_adapter; its weights leave the engine's cache when room is needed."""
        self._check_adapters()
        self._adapters.unload(name)

    def adapters(self) -> Mapping[str, str]:
        return self._adapters.paths()

    async def reset_prefix_cache(self) -> bool:
        """Let no later request find what is cached now.

        The engine cannot forget; later requests get another salt, and the old blocks age out.
        """
        self._salt_epoch += 1
        return True

    def kv_events(self) -> AsyncIterator[Sequence[KvEvent]]:
        return self._kv_events.subscribe()

    def _begin_service(self) -> SelfTest:
        own = self._own
        tokens = self._model.tokens
        bos = self.tokenizer.bos_token_id
        test = SelfTest(
            submit=self._submit_test,
            channel=self._channel,
            tokens=tokens,
            prompt=[tokens.first_eos_token_id if bos is None else bos],
            timeout_s=own.probe_timeout_s,
        )
        self._watchdog = Watchdog(
            probe=test.probe,
            verdict=lambda: own_verdict(self._handle.llm),
            in_flight=lambda: len(self._runs),
            on_death=self._on_death,
            no_progress_s=own.no_progress_s,
            idle_probe_s=own.idle_probe_s,
            probe_timeout_s=own.probe_timeout_s,
        )
        self._context = RunContext(
            submit=self._submit,
            explain=self._explain,
            progressed=self._watchdog.progressed,
            channel=self._channel,
            formatter=LogprobFormatter(self.tokenizer),
            tokenizer=self.tokenizer,
            eos_token_ids=frozenset(tokens.eos_token_ids),
            counters=self._drawing.counters,
            report_timeout_s=own.report_timeout_s,
        )
        self._start_readers()
        return test

    def _start_readers(self) -> None:
        def is_busy() -> bool:
            return bool(self._runs)

        self._readers = [
            DestructiveReader(
                "statistics",
                lambda: self._handle.llm.get_stats_async(timeout=SILENCE_S),
                self._stats.take,
                is_busy,
            )
        ]
        if self._handle.has_kv_events:
            self._readers.append(
                DestructiveReader(
                    "KV events",
                    lambda: self._handle.llm.get_kv_cache_events_async(timeout=SILENCE_S),
                    self._kv_events.take,
                    is_busy,
                )
            )
        for reader in self._readers:
            reader.start()

    async def _await_first_stats(self) -> None:
        """The cache's size comes with the first statistics, a moment after the first token."""
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

    def _check_adapters(self) -> None:
        if not has_adapters(self._handle):
            raise Unsupported("adapters", "set enable_lora = true in the deployment's options")

    def _check_request(self, request: EngineRequest) -> None:
        if request.adapter:
            self._check_adapters()
            self._adapters.check(request.adapter)
        if request.cache_salt and self._handle.has_block_reuse and not self._handle.features.has_cache_salt:
            raise Unsupported("prefix_cache", "this version of TensorRT-LLM has no cache salt")
        if self._handle.arg("enable_chunked_prefill", False):
            return
        most = self._handle.arg("max_num_tokens", None) or _DEFAULT_MAX_NUM_TOKENS
        if len(request.prompt_token_ids) > most:
            raise InvalidRequest.of(
                "prompt",
                f"{len(request.prompt_token_ids)} tokens; at most {most} are possible without chunked prefill",
            )

    def _submit(self, request: EngineRequest, arguments: dict[str, Any]) -> Any:
        """Hand one output to the engine."""
        has = self._handle.features
        keywords: dict[str, Any] = {"streaming": True}
        if request.adapter:
            kind = self._handle.package.lora_request
            keywords["lora_request"] = self._adapters.request(request.adapter, kind)
        if has.has_priority:
            keywords["priority"] = engine_priority(request.priority)
        if (salt := self._salt(request)) is not None and has.has_cache_salt:
            keywords["cache_salt"] = salt
        return self._submit_raw(arguments, list(request.prompt_token_ids), keywords)

    def _submit_test(self, arguments: dict[str, Any], prompt: list[int]) -> Any:
        return self._submit_raw(arguments, prompt, {"streaming": False})

    def _submit_raw(self, arguments: dict[str, Any], prompt: list[int], keywords: dict[str, Any]) -> Any:
        result = self._handle.submit(arguments, prompt, keywords)
        for reader in self._readers:
            reader.poke()
        return result

    def _salt(self, request: EngineRequest) -> str | None:
        """Salt the prefix cache: the caller's, our epoch, and none shared where every logit is needed."""
        parts = []
        if self._salt_epoch:
            parts.append(f"epoch-{self._salt_epoch}")
        if request.sampling.prompt_logprobs is not None:
            parts.append(f"alone-{request.request_id}")
        if request.cache_salt:
            parts.append(f"salt-{request.cache_salt}")
        return "/".join(parts) or None

    async def _explain(self, error: Exception) -> TwinjetError:
        """Turn what the engine raised into our error; finds out whether the engine still lives."""
        assert self._watchdog is not None
        log.warning("%s: the engine raised %s: %s", self._name, type(error).__name__, error)
        if str(error).startswith(_GUIDED_ERROR):
            return InvalidRequest.of("sampling.constraint", str(error))
        if isinstance(error, self._handle.package.fatal_errors):
            self._watchdog.died(f"fatal error: {error}")
            return EngineDied(f"fatal error: {error}")
        if isinstance(error, (*self._handle.package.request_errors, ResultError, ValueError, TypeError)):
            return RequestFailed("the engine could not do this request", reason="ENGINE_REFUSED")
        reason = await self._watchdog.check()
        if reason is not None:
            return EngineDied(reason)
        return RequestFailed("the engine could not finish this request", reason="ENGINE_ERROR")

    def _on_death(self, reason: str) -> None:
        assert self._death is not None
        if not self._death.done():
            self._death.set_result(reason)
        for run in list(self._runs.values()):
            run.fail(EngineDied(reason))
