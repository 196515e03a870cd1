"""A deterministic engine without a model, for tests of the service and for load tests.

It batches like a real one: each step gives every running sequence one token, sequences beyond max_num_seqs or
beyond the KV cache wait, and a sequence that finds no block is preempted. What it says is a function of prompt,
seed and position. A prompt that contains one of the words below makes it misbehave:

    !fail    the request fails               !stall   the request never gets a token
    !die     the engine dies                 !fail:N, !die:N   the same, after N tokens
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twinjet._core import Vocabulary
from twinjet.engines import pushed
from twinjet.engines.base import (
    Capability,
    ChatTurn,
    Component,
    EngineEvent,
    EngineInfo,
    EngineLoad,
    KvCache,
    Limits,
    LoadProgress,
    LogprobRow,
    Outlet,
    RenderedChat,
    Run,
    StepRow,
)
from twinjet.engines.fixed_logits import fixed_logits
from twinjet.errors import ConfigError, EngineDied, InvalidRequest, RequestAborted, RequestFailed
from twinjet.request import EngineRequest, Sampling, SamplingOverrides

if TYPE_CHECKING:
    from twinjet._core import SamplerRequest
    from twinjet.sampling import Sampler

EOS = 256
BOS = 257
VOCAB_SIZE = 258
EMBEDDING_SIZE = 8

_CAPABILITIES: frozenset[Capability] = frozenset(
    {
        "generate", "chat", "embed", "logprobs", "prompt_logprobs", "choice", "penalties", "logit_bias",
        "bad_words", "min_p", "min_tokens", "seed", "multiple_outputs", "prefix_cache", "priority",
    }
)  # fmt: skip


class FakeOptions(BaseModel):
    """What the fake engine is like. Times in seconds, sizes in tokens or blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_s: float = Field(0.0, ge=0, description="time that start() takes")
    step_s: float = Field(0.0, ge=0, description="time of one step")
    prefill_token_s: float = Field(0.0, ge=0, description="added to a step for each prompt token to compute")
    max_context_tokens: int = Field(4096, ge=2)
    max_num_seqs: int = Field(64, ge=1)
    num_blocks: int = Field(4096, ge=1)
    block_size: int = Field(16, ge=1)
    output: Literal["letters", "echo", "logits"] = Field(
        "letters",
        description="echo repeats the prompt; logits draws from a fixed model by the native sampler",
    )
    output_tokens: int | None = Field(None, ge=1, description="tokens before the end token; unset: never")
    capabilities: list[str] | None = Field(None, description="instead of all that it has")
    fail_start: str = Field("", description="start() raises ConfigError with this text")
    die_at_start: int = Field(0, ge=0, description="so many starts in this process die first")


def _spell(byte: int) -> str:
    """Spell a byte as byte-level BPE does: itself if printable, else a character from U+0100 on, in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte if byte in plain else 256 + byte - sum(p < byte for p in plain))


class FakeTokenizer:
    """Bytes as tokens, BOS in front; a chat is role and content a line."""

    vocab_size = VOCAB_SIZE
    has_chat_template = True
    vocabulary = Vocabulary("byte_level", [*map(_spell, range(256)), "<eos>", "<bos>"], special=[EOS, BOS])

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        special = {EOS: "<eos>", BOS: "<bos>"}
        if skip_special_tokens:
            return bytes(t for t in token_ids if t < 256).decode(errors="replace")
        return b"".join(special[t].encode() if t in special else bytes([t]) for t in token_ids).decode(
            errors="replace"
        )

    def render_chat(self, messages: Sequence[ChatTurn], *, continue_final: bool) -> str:
        lines = [f"{turn.role}: {turn.content}" for turn in messages]
        return "\n".join(lines if continue_final else [*lines, "assistant: "])

    def render_as_data(self, messages: Sequence[ChatTurn], *, continue_final: bool) -> RenderedChat:
        # No text is read as BOS or EOS.
        return RenderedChat(self.render_chat(messages, continue_final=continue_final))

    def encode_rendered(self, rendered: RenderedChat, *, add_special_tokens: bool) -> list[int]:
        return self.encode(rendered.text, add_special_tokens=add_special_tokens)


def mix(*parts: int) -> int:
    """Hash integers to 64 bits (the finalizer of SplitMix64, Steele et al. 2014), chained."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ part) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


class _Sequence:
    """One output of a request: what it says next and when it ends."""

    def __init__(self, request: EngineRequest, index: int, options: FakeOptions) -> None:
        self.request = request
        self.index = index
        self.num_generated = 0
        self.num_blocks = 0
        # Where output is logits: our sampler's side of this output, and the token of the present step.
        self.row: SamplerRequest | None = None
        self.drawn: int | None = None
        self._script = self._choose_script(options)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + self.num_generated

    def _choose_script(self, options: FakeOptions) -> Iterator[int]:
        sampling = self.request.sampling
        seed = 0 if sampling.is_greedy else mix(sampling.seed, self.index)
        if sampling.constraint is not None and sampling.constraint.kind == "choice":
            choices = sampling.constraint.choices
            return iter([*choices[seed % len(choices)].encode(), EOS])
        if options.output == "echo":
            return iter([*(t for t in self.request.prompt_token_ids if t < 256), EOS])
        if options.output == "logits":
            self.row = self._row()
            return iter(self._pop_drawn, None)
        return _letters(
            self.request.sampling, mix(seed, *self.request.prompt_token_ids), options.output_tokens
        )

    def _row(self) -> SamplerRequest:
        from twinjet.sampling import Request

        s = self.request.sampling
        encode = FakeTokenizer().encode
        return Request(
            VOCAB_SIZE, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p,
            repetition_penalty=s.repetition_penalty, frequency_penalty=s.frequency_penalty,
            presence_penalty=s.presence_penalty, seed=s.seed, output_index=self.index,
            prompt_token_ids=self.request.prompt_token_ids, logit_bias=dict(s.logit_bias),
            allowed_token_ids=s.allowed_token_ids or None, min_tokens=s.min_tokens,
            bad_words=[encode(word, add_special_tokens=False) for word in s.bad_words],
            stop_token_ids=sorted({*s.stop_token_ids, *(() if s.ignore_eos else (EOS,))}),
        )  # fmt: skip

    def _pop_drawn(self) -> int | None:
        token, self.drawn = self.drawn, None
        return token

    def logits(self) -> npt.NDArray[np.float32]:
        """Give the fixed model's logits for the next token, float32 [VOCAB_SIZE]."""
        assert self.row is not None, "only where output is logits"
        return fixed_logits([*self.request.prompt_token_ids, *self.row.output_token_ids.tolist()], VOCAB_SIZE)

    def step(self) -> tuple[int, Literal["stop", "length"] | None]:
        """Give one token and, with the last one, why the output ends; it knows nothing of stop strings."""
        sampling = self.request.sampling
        token = next(self._script, EOS)
        self.num_generated += 1
        is_end = token == EOS and not sampling.ignore_eos
        if (is_end or token in sampling.stop_token_ids) and self.num_generated > sampling.min_tokens:
            return token, "stop"
        return token, "length" if self.num_generated >= sampling.max_tokens else None


def _letters(sampling: Sampling, base: int, num_tokens: int | None) -> Iterator[int]:
    for position in itertools.count():
        ends = num_tokens is not None and position >= num_tokens
        if ends and position >= sampling.min_tokens and not sampling.ignore_eos:
            yield EOS
        draw = mix(base, position) % 32
        yield 97 + draw if draw < 26 else 32


def _logprobs(token: int, num_top: int) -> LogprobRow:
    ranks = [1, *range(1, num_top + 1)]
    return [(token + rank - 1) % 256 for rank in ranks], [-0.5 * rank for rank in ranks], 1


@dataclass(eq=False)
class _Running:
    """A request between generate() and the step loop."""

    request: EngineRequest
    sequences: list[_Sequence]
    run: Run
    num_cached_tokens: int = 0
    told_prompt: bool = False
    misbehave: Callable[[int], Exception | None] = lambda _: None
    stalled: bool = False


class FakeEngine:
    """See the module. options: as FakeOptions; ConfigError names a wrong one."""

    _num_starts: dict[str, int] = {}  # noqa: RUF012 - counts over instances, for die_at_start

    def __init__(self, name: str = "fake", options: Mapping[str, Any] | None = None) -> None:
        try:
            self._options = FakeOptions.model_validate(dict(options or {}))
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"deployments.{name}.options.{'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None
        self._name = name
        self.tokenizer = FakeTokenizer()
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._requests: dict[str, _Running] = {}
        self._free_blocks = self._options.num_blocks
        self._prefixes: OrderedDict[int, None] = OrderedDict()
        self._num_preemptions = 0
        self._work = asyncio.Event()
        self._sampler: Sampler | None = None
        self._component = Component("engine", reason="the fake engine samples nothing")
        self._death: asyncio.Future[str] | None = None
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self, report: Callable[[LoadProgress], None]) -> None:
        options = self._options
        if options.fail_start:
            raise ConfigError(options.fail_start)
        if options.output == "logits":
            from twinjet import sampling

            self._sampler = sampling.Sampler()
            self._component = Component(
                "twinjet", version=str(sampling.SPEC_VERSION), target=self._sampler.target
            )
        report(LoadProgress("loading nothing", 0.1))
        await asyncio.sleep(options.load_s / 2)
        report(LoadProgress("loading still nothing", 0.6))
        await asyncio.sleep(options.load_s / 2)
        starts = self._num_starts[self._name] = self._num_starts.get(self._name, 0) + 1
        if starts <= options.die_at_start:
            raise EngineDied("told to die at start")
        self._death = asyncio.get_running_loop().create_future()
        self._loop_task = asyncio.create_task(self._run(), name=f"fake engine {self._name}")

    def describe(self) -> EngineInfo:
        options = self._options
        capabilities = _CAPABILITIES
        if options.output == "logits":
            capabilities |= {"allowed_token_ids"}
        if options.capabilities is not None:
            capabilities &= frozenset(options.capabilities)
        return EngineInfo(
            name="fake", version="1", device="cpu", source="none",
            limits=Limits(options.max_context_tokens, VOCAB_SIZE, 64, 20, options.max_num_seqs),
            capabilities=capabilities, default_sampling=SamplingOverrides(), eos_token_ids=(EOS,),
            sampler=self._component,
            block_manager=Component("engine", reason="the fake engine counts blocks only"),
            kv_cache=KvCache(options.num_blocks, options.block_size),
            settings={"step_s": f"{options.step_s:g}", "output": options.output},
        )  # fmt: skip

    async def load(self) -> EngineLoad:
        return EngineLoad(
            waiting=len(self._waiting),
            running=len(self._running),
            kv_blocks_total=self._options.num_blocks,
            kv_blocks_used=self._options.num_blocks - self._free_blocks,
            preemptions=self._num_preemptions,
        )

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        return pushed.read(self, request)

    def submit(self, request: EngineRequest, run: Run) -> None:
        self._check_alive()
        self._admit(request, run)

    def flush(self) -> None:
        """Nothing is held back."""

    def cancel(self, request_id: str, output_index: int | None = None) -> None:
        entry = self._requests.get(request_id)
        if entry is None:
            return
        if output_index is None:
            del self._requests[request_id]
        for sequence in entry.sequences:
            if output_index in (None, sequence.index):
                self._drop(sequence)

    async def abort(self, request_id: str) -> None:
        entry = self._requests.get(request_id)
        if entry is not None:
            entry.run.fail(RequestAborted(f"request {request_id!r} was aborted"))

    async def embed(
        self, request_id: str, prompt_token_ids: Sequence[int], dimensions: int | None
    ) -> Sequence[float]:
        self._check_alive()
        size = EMBEDDING_SIZE if dimensions is None else dimensions
        if not 1 <= size <= EMBEDDING_SIZE:
            raise InvalidRequest.of("dimensions", f"{size} is out of range; allowed: 1 to {EMBEDDING_SIZE}")
        return [mix(i, *prompt_token_ids) / 2**63 - 1.0 for i in range(size)]

    async def reset_prefix_cache(self) -> bool:
        if self._running:
            return False
        self._prefixes.clear()
        return True

    async def wait_dead(self) -> str:
        assert self._death is not None, "start() has not returned"
        return await asyncio.shield(self._death)

    def die(self, reason: str = "told to die") -> None:
        """Die as a crashed engine does: every request ends with EngineDied."""
        assert self._death is not None, "start() has not returned"
        if not self._death.done():
            self._death.set_result(reason)
        for entry in list(self._requests.values()):
            entry.run.fail(EngineDied(reason))

    async def stop(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task])
            self._loop_task = None

    def _check_alive(self) -> None:
        if self._death is None or self._loop_task is None:
            raise EngineDied("the fake engine is not running")
        if self._death.done():
            raise EngineDied("the fake engine is dead")

    def _admit(self, request: EngineRequest, run: Run) -> None:
        if request.sampling.constraint is not None and request.sampling.constraint.kind != "choice":
            raise InvalidRequest.of("sampling.constraint", "the fake engine knows only choice")
        sequences = [_Sequence(request, i, self._options) for i in range(request.sampling.n)]
        entry = _Running(request, sequences, run)
        text = self.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True)
        entry.stalled = "!stall" in text
        if found := re.search(r"!(fail|die)(?::(\d+))?", text):
            after = int(found[2] or 0)
            entry.misbehave = lambda tokens: self._trouble(found[1]) if tokens >= after else None
        entry.num_cached_tokens = self._cached_tokens(request)
        self._requests[request.request_id] = entry
        self._waiting.extend(sequences)
        self._work.set()

    def _trouble(self, kind: str | Any) -> Exception:
        if kind == "die":
            self.die()
            return EngineDied("told to die")
        return RequestFailed("told to fail")

    def _cached_tokens(self, request: EngineRequest) -> int:
        size, prompt = self._options.block_size, request.prompt_token_ids
        state, hits, is_hit = hash((request.cache_salt, request.adapter)), 0, True
        for start in range(0, len(prompt) - size, size):
            state = hash((state, prompt[start : start + size]))
            is_hit = is_hit and state in self._prefixes
            hits += size * is_hit
            self._prefixes[state] = None
            self._prefixes.move_to_end(state)
        while len(self._prefixes) > self._options.num_blocks:
            self._prefixes.popitem(last=False)
        return hits

    def _drop(self, sequence: _Sequence) -> None:
        self._free_blocks += sequence.num_blocks
        sequence.num_blocks = 0
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    async def _run(self) -> None:
        while True:
            if not self._running and not self._waiting:
                self._work.clear()
                await self._work.wait()
            prefill_tokens = self._take_up()
            await self._pause(self._options.step_s + prefill_tokens * self._options.prefill_token_s)
            if self._sampler is not None:
                self._draw(self._sampler)
            rows: dict[Outlet, list[StepRow]] = {}
            for sequence in list(self._running):
                self._step(sequence, rows)
            for outlet, of_it in rows.items():
                outlet.step(of_it)

    async def _pause(self, step_s: float) -> None:
        """Let a step take its time; what simulates an unsteady machine overrides it."""
        await asyncio.sleep(step_s)

    def _draw(self, sampler: Sampler) -> None:
        """Draw the next token of every running sequence in one batch, as a real engine does."""
        batch = [
            s for s in self._running if s.row is not None and s.drawn is None and not self._is_stalled(s)
        ]
        if not batch:
            return
        rows = [s.row for s in batch if s.row is not None]
        result = sampler.sample(np.stack([s.logits() for s in batch]), rows)
        for sequence, token in zip(batch, result.token_ids.tolist(), strict=True):
            sequence.drawn = token

    def _is_stalled(self, sequence: _Sequence) -> bool:
        entry = self._requests.get(sequence.request.request_id)
        return entry is None or entry.stalled

    def _take_up(self) -> int:
        """Move waiting sequences to running while there is room; return the prompt tokens to prefill."""
        tokens = 0
        while self._waiting and len(self._running) < self._options.max_num_seqs:
            sequence = self._waiting[0]
            if not self._grow(sequence, sequence.num_tokens + 1):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            tokens += sequence.num_tokens - self._num_cached(sequence)
        return tokens

    def _num_cached(self, sequence: _Sequence) -> int:
        # A preempted sequence's blocks are gone.
        entry = self._requests.get(sequence.request.request_id)
        return entry.num_cached_tokens if entry is not None and not sequence.num_generated else 0

    def _grow(self, sequence: _Sequence, num_tokens: int) -> bool:
        needed = -(-num_tokens // self._options.block_size) - sequence.num_blocks
        if needed > self._free_blocks:
            return False
        self._free_blocks -= needed
        sequence.num_blocks += needed
        return True

    def _preempt_for(self, sequence: _Sequence) -> bool:
        while not self._grow(sequence, sequence.num_tokens + 1):
            victim = self._running[-1]
            self._drop(victim)
            self._waiting.appendleft(victim)
            self._num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _step(self, sequence: _Sequence, rows: dict[Outlet, list[StepRow]]) -> None:
        entry = self._requests.get(sequence.request.request_id)
        if entry is None or sequence not in self._running or entry.stalled:
            return
        if not self._preempt_for(sequence):
            return
        trouble = entry.misbehave(sequence.num_generated)
        if sequence.drawn == -1:
            trouble = RequestFailed("no token is admissible", reason="NO_ADMISSIBLE_TOKEN")
        if trouble is not None:
            entry.run.fail(trouble)
            self._drop(sequence)
            return
        prompt = None if entry.told_prompt else (entry.num_cached_tokens, self._prompt_logprobs(entry))
        entry.told_prompt = True
        token, finish = sequence.step()
        if finish is not None:
            self._drop(sequence)
        num_top = sequence.request.sampling.logprobs
        logprobs = None if num_top is None else (_logprobs(token, num_top),)
        rows.setdefault(entry.run.outlet, []).append(
            (entry.run.key + sequence.index, (token,), finish, None, prompt, logprobs)
        )

    @staticmethod
    def _prompt_logprobs(entry: _Running) -> tuple[LogprobRow, ...] | None:
        num_top = entry.request.sampling.prompt_logprobs
        if num_top is None:
            return None
        return tuple(_logprobs(token, num_top) for token in entry.request.prompt_token_ids[1:])
