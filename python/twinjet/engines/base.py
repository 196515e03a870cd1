"""The seam between Twinjet and an engine: the Engine protocol and its plain dataclasses.

An engine gets requests whose every setting is resolved and checked (see twinjet.request) and whose prompt is
token ids; it gives back deltas. It knows neither protobuf nor the scheduler.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

from twinjet.request import EngineRequest, SamplingOverrides

if TYPE_CHECKING:
    from twinjet._core import Pump, Vocabulary
    from twinjet.engines.kv_journal import KvJournal
    from twinjet.grammar.vocabulary import Vocabulary as GrammarVocabulary

Capability = Literal[
    "generate", "chat", "embed", "logprobs", "prompt_logprobs", "json_schema", "regex", "ebnf", "choice",
    "penalties", "logit_bias", "bad_words", "allowed_token_ids", "min_p", "seed", "multiple_outputs",
    "adapters", "prefix_cache", "kv_events", "priority", "image_input", "audio_input", "min_tokens",
    "structural_tag", "data_parallel_rank", "kv_retention", "trace_context",
    "prefill_only", "handoff",
]  # fmt: skip
"""Names of proto Capability, lower case, without the prefix."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Effective limits of a deployment; all counts of tokens, ids, outputs or sequences, at least 1."""

    max_context_tokens: int
    vocab_size: int
    max_outputs: int
    max_logprobs: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class KvCache:
    """Size of the KV cache: usable blocks and tokens per block.

    reserves_output: the engine takes up a request only when its whole output fits, to max_tokens, so a ledger
    must reserve that much; else blocks are taken as tokens come.
    """

    num_blocks: int
    block_size: int
    reserves_output: bool = False


@dataclass(frozen=True, slots=True)
class Component:
    """Which implementation of a component is in use, and why not ours (reason, "" if ours always is)."""

    implementation: Literal["twinjet", "engine"]
    version: str = ""
    target: str = ""
    reason: str = ""
    counters: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine is and can do, valid once start() has returned.

    settings: effective settings that bear on speed and results, by the engine's own names.
    """

    name: Literal["vllm", "tensorrt_llm", "fake"]
    version: str
    device: str
    source: str
    limits: Limits
    capabilities: frozenset[Capability]
    default_sampling: SamplingOverrides
    eos_token_ids: tuple[int, ...]
    sampler: Component
    block_manager: Component
    kv_cache: KvCache | None
    settings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """A reading of the engine; None is not known, 0 was measured. Counts since start: preemptions."""

    waiting: int | None = None
    running: int | None = None
    kv_blocks_total: int | None = None
    kv_blocks_used: int | None = None
    preemptions: int | None = None


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far start-up is: phase for people, done 0 to 1, never going back within one start."""

    phase: str
    done: float


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token before temperature and filters; rank 1 is the most probable."""

    token_id: int
    logprob: float
    rank: int | None
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The token in the sequence and its most probable rivals, best first."""

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """Why an output ended. stopped_by: end or stop token id, stop string, or None (grammar complete)."""

    reason: Literal["stop", "length"]
    stopped_by: int | str | None = None
    is_eos: bool = False


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """The engine has taken up the prompt. num_cached_tokens: from the prefix cache, None if not known.

    logprobs: one entry for each prompt token but the first, or None if not asked for.
    """

    num_cached_tokens: int | None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class OutputEvent:
    """New tokens of one output; never cumulative. finish: set on the last event of the output.

    logprobs: one for each of token_ids, or empty if not asked for.
    """

    output_index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class HandoffEvent:
    """A prefill_only request's last event: what another engine needs to go on, sealed."""

    state: bytes


EngineEvent = PromptEvent | OutputEvent | HandoffEvent


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation; role: system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as its template renders it.

    plain_spans: from and to in characters, ascending: text that came from the conversation's content and would
    read as a control token.
    """

    text: str
    plain_spans: tuple[tuple[int, int], ...] = ()


class Tokenizer(Protocol):
    """Text to tokens and back for one model. Thread-safe; calls may take milliseconds for long texts."""

    vocab_size: int
    has_chat_template: bool

    @property
    def vocabulary(self) -> Vocabulary:
        """What each token says; joins tokens as decode() does."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def render_chat(self, messages: Sequence[ChatTurn], *, continue_final: bool) -> str:
        """Render a conversation as the model's template says, opened for the assistant.

        Raises InvalidRequest if the template refuses the conversation.
        """
        ...

    def render_as_data(self, messages: Sequence[ChatTurn], *, continue_final: bool) -> RenderedChat:
        """Render a conversation whose content cannot steer the template; see render_chat."""
        ...

    def encode_rendered(self, rendered: RenderedChat, *, add_special_tokens: bool) -> list[int]:
        """Give the token ids of a rendering, whose plain spans give no control token. Raises InvalidRequest."""
        ...


class Engine(Protocol):
    """An engine behind one deployment. All methods are called from one asyncio loop."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; available once start() has returned."""
        ...

    async def start(self, report: Callable[[LoadProgress], None]) -> None:
        """Load the model and return when requests can be served.

        report is called from the loop with progress. Raises ConfigError if it can never work as configured,
        EngineDied if it failed for now. After a failure or a death, a fresh Engine is made.
        """
        ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """Run one request: one PromptEvent, then OutputEvents until each output has its finish, or a HandoffEvent.

        Closing the iterator early aborts the request within one step. Ends with at most one exception and
        nothing after it: InvalidRequest (a grammar that does not compile), Unsupported, NotFound (adapter),
        RequestFailed (this request alone), EngineDied (all requests).
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Stop a request's work within one step; its iterator ends with RequestAborted.

        Unknown ids are ignored.
        """
        ...

    async def load(self) -> EngineLoad:
        """Read the engine's load; cheap, may be up to a second old."""
        ...

    def describe(self) -> EngineInfo:
        """Describe the engine; counters of its components are up to a second old."""
        ...

    async def wait_dead(self) -> str:
        """Return why, once the engine has died by itself; never after stop()."""
        ...

    async def stop(self) -> None:
        """End the engine and its processes. Idempotent; also after a death or a failed start."""
        ...


LogprobRow = tuple[Sequence[int], Sequence[float], int | None]
"""Token ids and their log probabilities, the token in the sequence first, then the best; the first one's rank."""

StepRow = tuple[
    int,
    Sequence[int],
    Literal["stop", "length", "aborted", "failed"] | None,
    int | str | None,
    tuple[int | None, Sequence[LogprobRow] | None] | None,
    Sequence[LogprobRow] | None,
]
"""What a step gave one sequence: key, new token ids, finish, stopped by, prompt, logprobs.

finish, stopped by: the engine's word on the end, None while it goes on or if it leaves ends to the pump.
prompt: once, with or before the first tokens of a request: cached tokens, and prompt logprobs if asked for.
logprobs: a row a token, if asked for.
"""


class Outlet(Protocol):
    """Where an engine puts its steps; used on the engine's loop, but see pump."""

    @property
    def pump(self) -> Pump:
        """Takes steps of native threads as well, if each request's vocabulary is native; then collect()."""
        ...

    def step(self, rows: list[StepRow]) -> None:
        """Put one step, of as many sequences as ran. May call the engine's cancel()."""
        ...

    def collect(self) -> None:
        """Act on steps that were put into the pump itself."""
        ...


class Run(Protocol):
    """A request in an engine that puts its steps into an outlet. key: of output 0; output i has key + i."""

    @property
    def key(self) -> int: ...

    @property
    def outlet(self) -> Outlet: ...

    def fail(self, error: Exception) -> None:
        """End the request with an error, one that Engine.generate may raise; the first one counts."""
        ...

    def hand_off(
        self, num_cached_tokens: int | None, prompt_logprobs: Sequence[LogprobRow] | None, state: bytes
    ) -> None:
        """End a prefill_only request with what another engine needs to go on; nothing is put for it otherwise."""
        ...


class PushEngine(Engine, Protocol):
    """An engine that puts its steps into pumps, all sequences at once, instead of being read request by request.

    Its generate() is engines.pushed.read().
    """

    def submit(self, request: EngineRequest, run: Run) -> None:
        """Begin a request. Raises as generate() does, or fails the run later."""
        ...

    def flush(self) -> None:
        """Let what was submitted in this turn of the loop go to the engine, as it would after the turn."""
        ...

    def cancel(self, request_id: str, output_index: int | None = None) -> None:
        """Stop work on one output, or on the request, within one step and forget it; nothing if it is unknown."""
        ...


class EmbeddingEngine(Protocol):
    """Capability "embed"."""

    async def embed(
        self, request_id: str, prompt_token_ids: Sequence[int], dimensions: int | None
    ) -> Sequence[float]:
        """Give the vector of one input. Raises as Engine.generate."""
        ...


class GrammarEngine(Protocol):
    """An engine that takes constraints as grammars compiled by the server (EngineRequest.grammar)."""

    async def vocabulary(self, folder: Path) -> GrammarVocabulary:
        """Write the model's vocabulary into a folder. Raises GrammarUnavailable."""
        ...


class AdapterEngine(Protocol):
    """Capability "adapters"."""

    async def load_adapter(self, name: str, path: str) -> bool:
        """Load a LoRA adapter; True if it was loaded before. Raises AlreadyExists, InvalidRequest."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Remove an adapter. Raises NotFound."""
        ...

    def adapters(self) -> Mapping[str, str]:
        """Loaded adapters: name to path."""
        ...


class PrefixCacheEngine(Protocol):
    """Capability "prefix_cache"."""

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False if running requests hold some."""
        ...


KvMedium = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True)
class KvBlockFacts:
    """Who can share blocks, and where they are. salt, adapter: "" is none. medium: None is not known."""

    salt: str = ""
    adapter: str = ""
    medium: KvMedium | None = None


@dataclass(frozen=True, slots=True)
class KvStored:
    """Blocks that can now be shared; each hash continues the one before; parent b"" for a first block.

    token_ids: block_size for each hash. A hash that is held already is the same block on another medium.
    """

    block_hashes: Sequence[bytes]
    parent_hash: bytes
    token_ids: Sequence[int]
    block_size: int
    facts: KvBlockFacts = KvBlockFacts()


@dataclass(frozen=True, slots=True)
class KvRemoved:
    """Blocks that are gone."""

    block_hashes: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class KvCleared:
    """All blocks are gone."""


KvEvent = KvStored | KvRemoved | KvCleared


class KvEventEngine(Protocol):
    """Capability "kv_events"."""

    @property
    def kv_journal(self) -> KvJournal:
        """What the prefix cache holds and how it changes; closed when the engine stops or dies."""
        ...
