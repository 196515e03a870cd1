"""Who draws the tokens, our sampler or the engine's, and with which arguments."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import replace
from types import MappingProxyType

from twinjet.engines.base import Component
from twinjet.engines.tensorrt_llm.front.channel import ReportChannel
from twinjet.engines.tensorrt_llm.front.grammar import GrammarCompiler
from twinjet.engines.tensorrt_llm.front.handle import EngineHandle
from twinjet.engines.tensorrt_llm.front.model import ModelFacts
from twinjet.engines.tensorrt_llm.front.params import (
    EngineSampler,
    drawn_by_engine,
    drawn_by_us,
    refuse_unsupported,
)
from twinjet.engines.tensorrt_llm.front.run import Plan
from twinjet.engines.tensorrt_llm.front.selftest import SelfTest
from twinjet.engines.tensorrt_llm.front.trials import SETTINGS, EngineTrials, Setting
from twinjet.engines.tensorrt_llm.worker.device_draw import TARGET
from twinjet.engines.tensorrt_llm.worker.grammar import GrammarHandle
from twinjet.errors import Unsupported
from twinjet.grammar.compilation import written
from twinjet.grammar.handle import grammar_text
from twinjet.grammar.vocabulary import GrammarUnavailable
from twinjet.models.token_texts import TokenTextsFile
from twinjet.request import Constraint, EngineRequest
from twinjet.sampling.cuda import has_cuda

log = logging.getLogger(__name__)

PROMPT_LOGPROBS_AND_HOOK = "in a step with them TensorRT-LLM gives logits processors the rows of other requests; set native_sampler = false"


class Drawing:
    """The choice made at start-up, and each request's plan. reason: why ours may not draw, "" if it may."""

    def __init__(self, handle: EngineHandle, channel: ReportChannel, *, reason: str) -> None:
        self.counters: Counter[str] = Counter()
        self.can = EngineSampler()
        """What the engine's own sampler honours, known after choose()."""
        self.has_salt = False
        """Whether cached prefixes can be kept apart, known after choose()."""
        self.has_seed = False
        self._handle = handle
        self._channel = channel
        self._reason = reason
        self._grammar_reason = ""
        self._target = ""
        self._compiler: GrammarCompiler | None = None
        self._keeps_grammars = False
        self._unhonoured: list[Setting] = []
        self._model: ModelFacts
        self._token_texts: TokenTextsFile | None = None

    @property
    def is_ours(self) -> bool:
        return not self._reason

    @property
    def has_grammars(self) -> bool:
        """Whether constraints can be kept, by our sampler or by the engine's."""
        return self._keeps_grammars or self.can.has_guides

    @property
    def has_structural_tags(self) -> bool:
        """Whether structural tags can be kept; of the engine's backends xgrammar alone knows them."""
        return self._keeps_grammars or (self.can.has_guides and self.can.guided_backend == "xgrammar")

    async def choose(self, test: SelfTest, trials: EngineTrials, model: ModelFacts) -> None:
        """Find out what works here."""
        self._model = model
        self._token_texts = TokenTextsFile(model.tokenizer.vocabulary)
        await self._choose_sampler(test)
        await self._try_cache(trials)
        await self._try_engine(trials)

    def close(self) -> None:
        """Remove what was made for the engine's processes; idempotent."""
        if self._token_texts is not None:
            self._token_texts.remove()

    async def _choose_sampler(self, test: SelfTest) -> None:
        if not self._reason and self._handle.is_prebuilt:
            self._reason = "prebuilt engines call logits processors in another way"
        if not self._reason and self._handle.settings.speculates:
            self._reason = "speculative decoding and logits processors do not go together"
        if not self._reason and self._handle.arg("enable_chunked_prefill", False):
            # Not asked for, so this version's own default.
            self._reason = "with chunked prefill the engine calls a logits processor for each chunk"
        if not self._reason and self._handle.settings.policy == "max_utilization":
            self._reason = (
                "a request that max_utilization pauses goes on with a token that no logits processor has seen; "
                'set capacity_scheduler_policy = "guaranteed_no_evict"'
            )
        if not self._reason:
            self._reason = await test.sampler()
            self._target = test.target
        if self._reason:
            log.warning("%s: the engine's own sampler draws: %s", self._handle.name, self._reason)
            self._grammar_reason = self._reason
            return
        self._grammar_reason = await self._try_grammars(test)
        self._keeps_grammars = not self._grammar_reason
        if self._grammar_reason:
            log.warning("%s: constraints are not ours to keep: %s", self._handle.name, self._grammar_reason)

    async def _try_grammars(self, test: SelfTest) -> str:
        try:
            compiler = await self._make_compiler()
        except GrammarUnavailable as error:
            return str(error)
        return await test.grammar(compiler)

    async def _make_compiler(self) -> GrammarCompiler:
        if self._compiler is None:
            self._compiler = await asyncio.to_thread(
                GrammarCompiler,
                self._model.tokenizer.hf,
                vocab_size=self._model.tokens.vocab_size,
                stop_token_ids=self._model.tokens.eos_token_ids,
                folder=self._channel.folder,
            )
        return self._compiler

    async def _try_cache(self, trials: EngineTrials) -> None:
        """Find out whether salts keep cached prefixes apart."""
        if not self._handle.has_block_reuse or not self._handle.features.has_cache_salt:
            return
        finding = await trials.cache_salt()
        self.has_salt = finding.is_honoured
        if not finding.is_honoured:
            log.warning("%s: cache_salt is refused: %s", self._handle.name, finding.seen)

    async def _try_engine(self, trials: EngineTrials) -> None:
        """Find out what the engine's own sampler honours, if it can ever be asked to draw."""
        if self.is_ours and not self._grammar_reason:
            return
        found = await trials.sampler(has_logprobs=not self._handle.is_prebuilt)
        honoured = {setting for setting, finding in found.items() if finding.is_honoured}
        self._unhonoured = sorted(set(SETTINGS) - honoured)
        for finding in found.values():
            if not finding.is_honoured:
                log.info("%s: the engine's sampler: %s: %s", self._handle.name, finding.setting, finding.seen)
        # A cached prompt has no logits; and a step with all rows of a prompt confuses logits processors.
        can_see_prompts = not self.is_ours and (self.has_salt or not self._handle.has_block_reuse)
        self.has_seed = "seed" in honoured
        self.can = EngineSampler(
            penalties="penalties" in honoured,
            min_p=self._handle.has_min_p,
            logit_bias="logit_bias" in honoured,
            min_tokens="min_tokens" in honoured,
            logprobs="logprobs" in honoured,
            prompt_logprobs="prompt_logprobs" in honoured and can_see_prompts,
            guided_backend=self._handle.settings.kwargs.get("guided_decoding_backend"),
            guided_decoding=self._handle.package.guided_decoding,
        )
        if self.can.has_guides:
            try:
                await self._make_compiler()
            except GrammarUnavailable as error:
                log.warning("%s: grammars reach the engine unchecked: %s", self._handle.name, error)

    async def plan(self, request: EngineRequest, drawn_token_ids: tuple[int, ...] = ()) -> Plan:
        """Decide who draws this request and compile its grammar. drawn_token_ids: drawn elsewhere already.

        Raises InvalidRequest for a wrong grammar, Unsupported for what nobody here can honour.
        """
        if request.prefill_only:
            request = _first_token_of(request)
        constraint, tokens = request.sampling.constraint, self._model.tokens
        if self._reason or (self._grammar_reason and constraint is not None):
            refuse_unsupported(request.sampling, tokens, self.can)
            if request.sampling.logprobs is not None and (request.prefill_only or request.handoff):
                raise Unsupported("logprobs", "some TensorRT-LLM lose those of the token that is handed over")
            guide = None if constraint is None else await self._guide(request, constraint)
            self.counters["requests_engine"] += 1
            return Plan(False, lambda index, _: drawn_by_engine(request, index, tokens, self.can, guide))
        if request.sampling.prompt_logprobs is not None:
            raise Unsupported("prompt_logprobs", PROMPT_LOGPROBS_AND_HOOK)
        grammar: GrammarHandle | None = None
        if request.grammar is not None and request.grammar.vocabulary is not None:
            vocabulary = request.grammar.vocabulary
            grammar = GrammarHandle(
                vocabulary.path,
                path=request.grammar.path,
                end_token_ids=vocabulary.end_token_ids,
                stop_token_ids=request.sampling.stop_token_ids,
            )
        elif constraint is not None:
            assert self._compiler is not None, "no reason not to, so there is one"
            grammar = await asyncio.to_thread(self._compiler.compile, constraint)
        sampling = request.sampling
        bad_text = None
        if sampling.bad_words:
            assert self._token_texts is not None, "made when the engine started"
            bad_text = self._token_texts.settings(
                sampling.bad_words, skips_special=sampling.skip_special_tokens
            )
        self.counters["requests_twinjet"] += 1
        return Plan(
            True,
            lambda index, key: drawn_by_us(
                request,
                index,
                tokens,
                key=key,
                report_path=self._channel.path,
                bad_text=bad_text,
                grammar=grammar,
                drawn_token_ids=drawn_token_ids,
            ),
        )

    async def _guide(self, request: EngineRequest, constraint: Constraint) -> tuple[str, str]:
        """Give a constraint as compilation.written() has it, known to compile: some versions end with one that does not.

        Raises InvalidRequest.
        """
        if request.grammar is not None and request.grammar.path:
            return grammar_text(request.grammar.path)
        if self._compiler is not None:
            await asyncio.to_thread(self._compiler.compile, constraint)
        return await asyncio.to_thread(written, constraint.kind, constraint.value, constraint.choices)

    def component(self) -> Component:
        """Describe the sampler in use."""
        counters = MappingProxyType(dict(self.counters))
        if self._reason:
            lacks = f"; it does not honour {', '.join(self._unhonoured)} here" if self._unhonoured else ""
            reason = f"{self._reason}{lacks}"
            return Component("engine", self._handle.package.version, "cuda", reason, counters)
        from twinjet.sampling import SPEC_VERSION

        reasons = []
        if self._target != TARGET and self._model.device != "cpu":
            lack = "" if has_cuda() else ": this build has no CUDA side"
            reasons.append(f"rows are copied from the GPU to the CPU{lack}")
        if self._grammar_reason:
            reasons.append(f"constraints use the engine's sampler: {self._grammar_reason}")
        return Component("twinjet", str(SPEC_VERSION), self._target, "; ".join(reasons), counters)


def _first_token_of(request: EngineRequest) -> EngineRequest:
    """The request cut to its first token, which is the last one that its sampler draws here."""
    sampling = request.sampling
    return replace(request, sampling=replace(sampling, max_tokens=1, min_tokens=min(1, sampling.min_tokens)))
