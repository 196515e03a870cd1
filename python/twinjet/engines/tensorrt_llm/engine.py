"""TensorRT-LLM's LLM API behind the Engine protocol.

Requests go in as token ids and come out as deltas; n outputs are n engine requests, since the engine's own
n > 1 loses finish reasons and ends all outputs at one's stop string. Tokens are drawn by our sampler as a
logits processor where start-up has shown that the engine honours it, else by the engine's.

Not run on hardware yet: tested against a stand-in that enforces the recorded interface of versions 1.2 and 1.3.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

from twinjet.engines.base import (
    Capability,
    Component,
    EngineEvent,
    EngineInfo,
    EngineLoad,
    KvCache,
    KvEvent,
    Limits,
    LoadProgress,
)
from twinjet.engines.tensorrt_llm import features as feature_detection
from twinjet.engines.tensorrt_llm.adapters import AdapterTable
from twinjet.engines.tensorrt_llm.channel import ReportChannel
from twinjet.engines.tensorrt_llm.features import Features, Package
from twinjet.engines.tensorrt_llm.grammar import GrammarCompiler, GrammarHandle, GrammarUnavailable
from twinjet.engines.tensorrt_llm.health import Watchdog, own_verdict
from twinjet.engines.tensorrt_llm.outputs import LogprobFormatter
from twinjet.engines.tensorrt_llm.params import (
    EngineSampler,
    TokenFacts,
    bad_word_ids,
    drawn_by_engine,
    drawn_by_us,
    engine_priority,
    refuse_unsupported,
)
from twinjet.engines.tensorrt_llm.processes import in_daemon_thread, kill_processes, worker_processes
from twinjet.engines.tensorrt_llm.run import MakeParams, RequestRun, RunContext
from twinjet.engines.tensorrt_llm.selftest import SelfTest
from twinjet.engines.tensorrt_llm.settings import llm_kwargs, parse_options
from twinjet.engines.tensorrt_llm.stats import SILENCE_S, DestructiveReader, EngineStats, KvEventFan
from twinjet.engines.tensorrt_llm.tokenizer import (
    HfTokenizer,
    ModelFiles,
    is_prebuilt,
    model_folder,
    unwrap_tokenizer,
)
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
from twinjet.request import EngineRequest

log = logging.getLogger(__name__)

_FIRST_STATS_S = 5.0
_DEFAULT_MAX_NUM_SEQS = 2048
_DEFAULT_MAX_NUM_TOKENS = 8192
_GUIDED_ERROR = "Guided decoding error:"

# One engine is built at a time: its workers are told from another's by when they appear.
_build_lock = threading.Lock()


class TrtLlmEngine:
    """One model on TensorRT-LLM.

    name: the deployment's, for messages. model: a folder or a name for the package, or a folder with a
    prebuilt engine. options: see twinjet.engines.tensorrt_llm.settings. native_sampler: let our sampler draw
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
        if not feature_detection.is_installed():
            raise ConfigError(f"deployments.{name}: {feature_detection.MISSING}")
        self._name = name
        self._model = model
        self._settings = parse_options(name, options or {})
        self._wants_our_sampler = native_sampler
        self._runs: dict[str, RequestRun] = {}
        self._counters: Counter[str] = Counter()
        self._stats = EngineStats()
        self._kv_events = KvEventFan()
        self._channel = ReportChannel()
        self._readers: list[DestructiveReader] = []
        self._adapters = AdapterTable()
        self._salt_epoch = 0
        self._death: asyncio.Future[str] | None = None
        self._building: asyncio.Future[Any] | None = None
        self._llm: Any = None
        self._workers: frozenset[int] = frozenset()
        self._is_stopped = False
        self._watchdog: Watchdog | None = None
        self._grammars: GrammarCompiler | None = None
        self._fallback_reason = "native_sampler is off" if not native_sampler else ""
        self._grammar_reason = ""
        self._package: Package
        self._features: Features
        self._tokens: TokenFacts
        self._context: RunContext
        self._tokenizer: HfTokenizer
        self._files: ModelFiles
        self._device: str

    @property
    def tokenizer(self) -> HfTokenizer:
        return self._tokenizer

    async def start(self, report: Callable[[LoadProgress], None]) -> None:
        """See Engine.start. Importing and building block for minutes and run in a thread of their own."""
        self._death = asyncio.get_running_loop().create_future()
        await self._channel.start()
        report(LoadProgress("importing tensorrt_llm", 0.02))
        await in_daemon_thread(self._import, "tensorrt_llm import")
        report(LoadProgress("loading weights and building the engine", 0.1))
        # Shielded and kept, since a thread cannot be cancelled: stop() takes what it still gives.
        self._building = in_daemon_thread(self._build, "tensorrt_llm build")
        self._llm = await asyncio.shield(self._building)
        report(LoadProgress("reading the model's files", 0.8))
        await asyncio.to_thread(self._learn_model)
        report(LoadProgress("drawing a first token", 0.85))
        test = self._begin_service()
        try:
            await test.probe()
        except Exception as error:
            raise EngineDied(f"the engine gave no first token: {error}") from error
        report(LoadProgress("trying the sampler", 0.92))
        await self._choose_sampler(test)
        await self._await_first_stats()
        self._device = await asyncio.to_thread(_device_name)
        assert self._watchdog is not None
        self._watchdog.start()
        report(LoadProgress("ready", 1.0))

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        return self._generate(request)

    async def abort(self, request_id: str) -> None:
        run = self._runs.get(request_id)
        if run is not None:
            run.fail(RequestAborted(f"request {request_id!r} was aborted"))

    async def load(self) -> EngineLoad:
        return self._stats.load(in_flight=len(self._runs))

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
        await self._shut_down()
        await self._channel.stop()

    async def load_adapter(self, name: str, path: str) -> bool:
        """See AdapterEngine.load_adapter; the engine reads the weights with the first request."""
        return self._adapters.load(name, path)

    async def unload_adapter(self, name: str) -> None:
        """See AdapterEngine.unload_adapter; its weights leave the engine's cache when room is needed."""
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

    # ---- start-up ----

    def _import(self) -> None:
        self._package = feature_detection.load_package()
        if is_prebuilt(self._model) and self._package.prebuilt_llm is None:
            raise ConfigError(
                f"deployments.{self._name}.model is a prebuilt engine, which tensorrt_llm "
                f"{self._package.version} cannot run; give the checkpoint's folder instead"
            )
        self._features = feature_detection.detect(self._package, self._llm_class)

    @property
    def _llm_class(self) -> Any:
        return self._package.prebuilt_llm if is_prebuilt(self._model) else self._package.llm

    def _build(self) -> Any:
        name = "TrtLlmArgs" if is_prebuilt(self._model) else "TorchLlmArgs"
        args_type = feature_detection.find([f"tensorrt_llm.llmapi.llm_args:{name}"])
        kwargs = llm_kwargs(self._settings, self._package, args_type)
        with _build_lock:
            before = worker_processes()
            try:
                return self._llm_class(model=self._model, **kwargs)
            except (ValueError, TypeError, FileNotFoundError) as error:
                raise ConfigError(
                    f"deployments.{self._name}: tensorrt_llm refused the settings: {error}"
                ) from error
            except Exception as error:
                raise EngineDied(f"tensorrt_llm could not be started: {error}") from error
            finally:
                self._workers = worker_processes() - before

    def _learn_model(self) -> None:
        files = ModelFiles(model_folder(self._model, self._llm))
        wrapped = getattr(self._llm, "tokenizer", None)
        if wrapped is None:
            raise ConfigError(
                f"deployments.{self._name}: the model has no tokenizer; set options.tokenizer to its folder"
            )
        hf = unwrap_tokenizer(wrapped)
        vocab_size = files.vocab_size or len(hf)
        self._files = files
        self._tokenizer = HfTokenizer(hf, vocab_size)
        own_eos = self._tokenizer.eos_token_id
        eos = tuple(dict.fromkeys(self._settings.own.eos_token_ids or files.eos_token_ids))
        first = own_eos if own_eos is not None else eos[0] if eos else None
        if first is None:
            raise ConfigError(
                f"deployments.{self._name}: the model names no end token; set options.twinjet.eos_token_ids"
            )
        # The engine ends at the tokenizer's end token whatever the model's files say, so it is one.
        self._tokens = TokenFacts(
            vocab_size=vocab_size, eos_token_ids=tuple(dict.fromkeys((*eos, first))), first_eos_token_id=first
        )

    def _begin_service(self) -> SelfTest:
        own = self._settings.own
        tokens = self._tokens
        bos = self._tokenizer.bos_token_id
        test = SelfTest(
            submit=self._submit_test,
            channel=self._channel,
            tokens=tokens,
            prompt=[tokens.first_eos_token_id if bos is None else bos],
            timeout_s=own.probe_timeout_s,
        )
        self._watchdog = Watchdog(
            probe=test.probe,
            verdict=lambda: own_verdict(self._llm),
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
            formatter=LogprobFormatter(self._tokenizer),
            tokenizer=self._tokenizer,
            eos_token_ids=frozenset(tokens.eos_token_ids),
            counters=self._counters,
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
                lambda: self._llm.get_stats_async(timeout=SILENCE_S),
                self._stats.take,
                is_busy,
            )
        ]
        if self._has_kv_events:
            self._readers.append(
                DestructiveReader(
                    "KV events",
                    lambda: self._llm.get_kv_cache_events_async(timeout=SILENCE_S),
                    self._kv_events.take,
                    is_busy,
                )
            )
        for reader in self._readers:
            reader.start()

    async def _choose_sampler(self, test: SelfTest) -> None:
        if not self._fallback_reason and is_prebuilt(self._model):
            self._fallback_reason = "prebuilt engines call logits processors in another way"
        if not self._fallback_reason and self._settings.speculates:
            self._fallback_reason = "speculative decoding and logits processors do not go together"
        if not self._fallback_reason:
            self._fallback_reason = await test.sampler()
        if self._fallback_reason:
            log.warning("%s: the engine's own sampler draws: %s", self._name, self._fallback_reason)
            self._grammar_reason = self._fallback_reason
            return
        try:
            self._grammars = await asyncio.to_thread(
                GrammarCompiler,
                self._tokenizer.hf,
                vocab_size=self._tokens.vocab_size,
                stop_token_ids=self._tokens.eos_token_ids,
                folder=self._channel.folder,
            )
            self._grammar_reason = await test.grammar(self._grammars)
        except GrammarUnavailable as error:
            self._grammar_reason = str(error)
        if self._grammar_reason:
            self._grammars = None
            log.warning("%s: the engine's own guided decoding is used: %s", self._name, self._grammar_reason)

    async def _await_first_stats(self) -> None:
        """The cache's size comes with the first statistics, a moment after the first token."""
        try:
            async with asyncio.timeout(_FIRST_STATS_S):
                await self._stats.wait_for_row()
        except TimeoutError:
            log.warning("%s: the engine gives no statistics; its KV cache's size is not known", self._name)

    # ---- requests ----

    async def _generate(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        self._check_alive()
        if request.request_id in self._runs:
            raise AlreadyExists("request", request.request_id)
        self._check_prompt(request)
        is_ours, make_params = await self._plan(request)
        self._check_alive()
        run = RequestRun(self._context, request, is_ours=is_ours, make_params=make_params)
        self._runs[request.request_id] = run
        try:
            async with aclosing(run.events()) as events:
                async for event in events:
                    yield event
        finally:
            del self._runs[request.request_id]

    def _check_alive(self) -> None:
        if self._death is None or self._is_stopped:
            raise EngineDied("the engine is not running")
        if self._death.done():
            raise EngineDied(self._death.result())

    def _check_prompt(self, request: EngineRequest) -> None:
        if request.adapter:
            self._adapters.check(request.adapter)
        if request.cache_salt and not self._features.has_cache_salt and self._has_block_reuse:
            raise Unsupported("prefix_cache", "this version of TensorRT-LLM has no cache salt")
        if self._arg("enable_chunked_prefill", False):
            return
        most = self._arg("max_num_tokens", None) or _DEFAULT_MAX_NUM_TOKENS
        if len(request.prompt_token_ids) > most:
            raise InvalidRequest.of(
                "prompt",
                f"{len(request.prompt_token_ids)} tokens; at most {most} are possible without chunked prefill",
            )

    async def _plan(self, request: EngineRequest) -> tuple[bool, MakeParams]:
        """Decide who draws and how; compile the grammar."""
        constraint = request.sampling.constraint
        reason = self._fallback_reason or (self._grammar_reason if constraint is not None else "")
        if reason:
            refuse_unsupported(request.sampling, self._engine_sampler)
            self._counters["requests_engine"] += 1
            return False, lambda index, _: drawn_by_engine(request, index, self._tokens, self._engine_sampler)
        grammar: GrammarHandle | None = None
        if constraint is not None:
            assert self._grammars is not None, "no reason not to, so there is one"
            grammar = await asyncio.to_thread(self._grammars.compile, constraint)
        bad_words = bad_word_ids(request.sampling.bad_words, self._tokenizer)
        self._counters["requests_twinjet"] += 1
        return True, lambda index, key: drawn_by_us(
            request,
            index,
            self._tokens,
            key=key,
            report_path=self._channel.path,
            bad_words=bad_words,
            grammar=grammar,
        )

    @property
    def _engine_sampler(self) -> EngineSampler:
        """What the engine's own sampler can do here."""
        is_cpp = is_prebuilt(self._model) or self._settings.kwargs.get("sampler_type") == "TRTLLMSampler"
        return EngineSampler(
            penalties=is_cpp,
            min_p=is_cpp or self._features.has_priority,
            guided_backend=self._settings.kwargs.get("guided_decoding_backend"),
            guided_decoding=self._package.guided_decoding,
        )

    def _submit(self, request: EngineRequest, arguments: dict[str, Any]) -> Any:
        """Hand one output to the engine; a fresh SamplingParams each time, since the engine changes it."""
        keywords: dict[str, Any] = {"streaming": True}
        if request.adapter:
            keywords["lora_request"] = self._adapters.request(request.adapter, self._package.lora_request)
        if self._features.has_priority:
            keywords["priority"] = engine_priority(request.priority)
        if (salt := self._salt(request)) is not None and self._features.has_cache_salt:
            keywords["cache_salt"] = salt
        return self._submit_raw(arguments, list(request.prompt_token_ids), keywords)

    def _submit_test(self, arguments: dict[str, Any], prompt: list[int]) -> Any:
        return self._submit_raw(arguments, prompt, {"streaming": False})

    def _submit_raw(self, arguments: dict[str, Any], prompt: list[int], keywords: dict[str, Any]) -> Any:
        params = self._package.sampling_params(**arguments)
        result = self._llm.generate_async({"prompt_token_ids": prompt}, sampling_params=params, **keywords)
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
        if isinstance(error, self._package.fatal_errors):
            self._watchdog.died(f"fatal error: {error}")
            return EngineDied(f"fatal error: {error}")
        if isinstance(error, (*self._package.request_errors, ValueError, TypeError)):
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

    async def _shut_down(self) -> None:
        """End the engine and its processes, in bounded time even if it hangs."""
        limit = self._settings.own.shutdown_timeout_s
        if self._building is not None and self._llm is None:
            try:
                async with asyncio.timeout(limit):
                    self._llm = await asyncio.shield(self._building)
            except TimeoutError:
                log.error("%s: the engine is still being built; its processes are left to exit", self._name)
            except Exception as error:  # noqa: BLE001 - it failed to start, and that has been told
                log.info("%s: the engine had failed to start: %s", self._name, error)
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        try:
            async with asyncio.timeout(limit):
                await in_daemon_thread(llm.shutdown, "tensorrt_llm shutdown")
        except TimeoutError:
            log.error("%s: the engine did not shut down within %g s", self._name, limit)
        except Exception as error:  # noqa: BLE001 - a dead engine may fail in any way
            log.warning("%s: the engine failed to shut down: %s", self._name, error)
        if killed := kill_processes(self._workers):
            log.warning("%s: killed %d worker processes that stayed behind", self._name, killed)

    # ---- description ----

    def _arg(self, name: str, default: Any) -> Any:
        """Read an effective setting: the engine's own arguments object knows the defaults it filled in."""
        args = getattr(self._llm, "args", None)
        return getattr(args, name, self._settings.kwargs.get(name, default))

    def _kv_arg(self, name: str, default: Any) -> Any:
        return getattr(self._arg("kv_cache_config", None), name, default)

    @property
    def _has_block_reuse(self) -> bool:
        return bool(self._kv_arg("enable_block_reuse", True))

    @property
    def _has_kv_events(self) -> bool:
        return self._has_block_reuse and bool(self._kv_arg("event_buffer_max_size", 0))

    @property
    def _kv_cache(self) -> KvCache | None:
        known = self._stats.kv_cache
        if known is None and self._kv_arg("max_tokens", None):
            size = int(self._kv_arg("tokens_per_block", 32))
            known = KvCache(int(self._kv_arg("max_tokens", 0)) // size, size)
        if known is None:
            return None
        return KvCache(
            known.num_blocks, known.block_size, reserves_output=self._settings.policy != "max_utilization"
        )

    @property
    def _max_context_tokens(self) -> int:
        known = [self._arg("max_seq_len", None), self._files.max_context_tokens]
        if (kv := self._kv_cache) is not None:
            known.append(kv.num_blocks * kv.block_size)
        limits = [int(value) for value in known if value]
        if not limits:
            raise ConfigError(f"deployments.{self._name}: set options.max_seq_len; the model does not say it")
        return min(limits)

    @property
    def _capabilities(self) -> frozenset[Capability]:
        found: set[Capability] = {"generate", "logprobs", "prompt_logprobs", "logit_bias", "bad_words"}
        found |= {"multiple_outputs", "priority"}
        can = self._engine_sampler
        is_ours = not self._fallback_reason
        if self._tokenizer.has_chat_template:
            found.add("chat")
        if is_ours:
            found |= {"penalties", "allowed_token_ids", "min_p", "seed"}
        if can.penalties:
            found |= {"penalties", "seed"}
        if can.min_p:
            found.add("min_p")
        if self._grammars is not None or (can.guided_backend and can.guided_decoding is not None):
            found |= {"json_schema", "regex", "ebnf", "choice"}
        if self._features.has_lora and (self._arg("enable_lora", False) or self._arg("lora_config", None)):
            found.add("adapters")
        if self._has_block_reuse and self._features.has_cache_salt:
            found.add("prefix_cache")
        if self._has_kv_events:
            found.add("kv_events")
        return frozenset(found)

    def describe(self) -> EngineInfo:
        return EngineInfo(
            name="tensorrt_llm",
            version=self._package.version,
            device=self._device,
            source=self._model,
            limits=Limits(
                max_context_tokens=self._max_context_tokens,
                vocab_size=self._tokens.vocab_size,
                max_outputs=64,
                max_logprobs=self._settings.own.max_logprobs,
                max_num_seqs=self._arg("max_batch_size", None)
                or self._files.max_batch_size
                or _DEFAULT_MAX_NUM_SEQS,
            ),
            capabilities=self._capabilities,
            default_sampling=self._files.default_sampling,
            eos_token_ids=self._tokens.eos_token_ids,
            sampler=self._sampler_component(),
            block_manager=Component(
                "engine",
                self._package.version,
                reason="TensorRT-LLM has no public place for another one; the service's ledger follows its "
                f"statistics under the {self._settings.policy} policy",
            ),
            kv_cache=self._kv_cache,
        )

    def _sampler_component(self) -> Component:
        counters = MappingProxyType(dict(self._counters))
        if self._fallback_reason:
            return Component("engine", self._package.version, "cuda", self._fallback_reason, counters)
        from twinjet.sampling import SPEC_VERSION, cpu_target

        reason = (
            f"constraints use the engine's sampler: {self._grammar_reason}" if self._grammar_reason else ""
        )
        return Component("twinjet", str(SPEC_VERSION), cpu_target(), reason, counters)


def _device_name() -> str:
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"
