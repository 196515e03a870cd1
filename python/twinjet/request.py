"""A request and its parts in Twinjet's own terms: neither protobuf nor an engine's types.

`SamplingOverrides` is what a client sent or a model's defaults; `resolve_sampling` checks it, fills the gaps
and gives the `Sampling` that an engine gets, in which nothing is left open. So an unset field means the same
on every engine.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from twinjet.errors import ConfigError, InvalidRequest, Unsupported, Violation

if TYPE_CHECKING:
    from twinjet.engines.base import EngineInfo
    from twinjet.grammar.room import CompiledGrammar

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""

MAX_LOGIT_BIASES = 1024
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
MAX_BAD_WORDS = 256
MAX_ALLOWED_IDS = 1 << 20
MAX_CHOICES = 1024
MAX_OUTPUTS = 64
MAX_GRAMMAR_BYTES = 256 * 1024
MAX_SEED = 2**64 - 1
MAX_HANDOFF_BYTES = 256 * 1024
DRAWN_SEED_BITS = 53
"""Seeds that nobody sent are below 2^53, so that languages whose numbers are doubles read them exactly."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number may be; low and high are allowed themselves, unless is_open excludes low."""

    low: float
    high: float
    is_open: bool = False

    def __str__(self) -> str:
        return f"{'above ' if self.is_open else ''}{self.low:g} to {self.high:g}"

    def allows(self, value: float) -> bool:
        """Compare as float32, which is what clients send and what the sampler computes with."""
        single, low = ctypes.c_float(value).value, ctypes.c_float(self.low).value
        is_in = low < single if self.is_open else low <= single
        return is_in and single <= ctypes.c_float(self.high).value


NUMBER_BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "temperature": Bound(0, 100),
        "top_p": Bound(0, 1, is_open=True),
        "top_k": Bound(-1, 2**31 - 1),
        "min_p": Bound(0, 1),
        "repetition_penalty": Bound(0.01, 100),
        "frequency_penalty": Bound(-2, 2),
        "presence_penalty": Bound(-2, 2),
        "logit_bias": Bound(-100, 100),
    }
)
"""The contract's range of every number that reaches the sampler. The sampler's own, `_core.SAMPLER_RANGES`, must
hold each of them: it runs inside the engine's process, where a value that it refuses would end the engine."""
_SCALARS = tuple(name for name in NUMBER_BOUNDS if name != "logit_bias")

MAX_ENTRIES: Mapping[str, int] = MappingProxyType(
    {
        "logit_bias": MAX_LOGIT_BIASES,
        "stop": MAX_STOPS,
        "stop_token_ids": MAX_STOPS,
        "bad_words": MAX_BAD_WORDS,
        "allowed_token_ids": MAX_ALLOWED_IDS,
    }
)
"""The most entries of every list and map in a request's sampling parameters."""

ConstraintKind = Literal["json_schema", "json_object", "regex", "ebnf", "choice", "structural_tag"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar for the output. value: schema, pattern or grammar text; choices: for kind "choice"."""

    kind: ConstraintKind
    value: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOverrides:
    """What a client set, or a model's defaults. None and empty mean unset. Ranges: proto SamplingParams."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool | None = None
    ignore_eos: bool | None = None
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Everything an engine must know to draw tokens and end outputs; nothing is left open.

    temperature: 0 is greedy. top_k: 0 is off. top_p and repetition_penalty: 1 is off. min_p: 0 is off.
    max_tokens: at least 1, fits the context. seed: 64 bits. logprobs, prompt_logprobs: None is off, 0 is
    the token alone.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    max_tokens: int
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop: bool
    ignore_eos: bool
    bad_words: tuple[str, ...]
    allowed_token_ids: tuple[int, ...]
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool
    constraint: Constraint | None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    def fitted(self, *, seed: int, max_tokens: int) -> Sampling:
        """Give the same with another seed and limit, in half the time that making it anew takes."""
        made: Sampling = object.__new__(Sampling)
        for read, write in _SAMPLING_FIELDS:
            write(made, read(self))
        _WRITE_SEED(made, seed)
        _WRITE_MAX_TOKENS(made, max_tokens)
        return made


_ACCESS = {f.name: getattr(Sampling, f.name) for f in fields(Sampling)}
_SAMPLING_FIELDS = tuple((slot.__get__, slot.__set__) for slot in _ACCESS.values())
_WRITE_SEED = _ACCESS["seed"].__set__
_WRITE_MAX_TOKENS = _ACCESS["max_tokens"].__set__


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRetention:
    """How long a request's KV blocks are worth keeping. Priorities 0 to 100, None the engine's default.

    duration_s: how long they hold, above 0; None for good.
    """

    prompt_priority: int | None = None
    output_priority: int | None = None
    duration_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One request as an engine gets it, with what the scheduler has to know.

    prompt_token_ids: at least one, each in 0 .. vocab_size - 1; with sampling.max_tokens within the context.
    grammar: sampling.constraint compiled for this engine's vocabulary; None only where there is no constraint or the
    engine has none. priority: -100 to 100, higher first. client_address: where the caller is,
    without the port; tells those apart who name no tenant, "" is unknown. cache_salt, adapter: "" is none. deadline: time.monotonic() seconds,
    None is none; engines may use it, the server enforces it. data_parallel_rank: a hint, at least 0, None is any.
    trace_headers: the caller's W3C trace context, empty is none. prefill_only: end with a handoff. handoff: a sealed one
    to go on from, as it came; b"" is none.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    grammar: CompiledGrammar | None = None
    priority: int = 0
    tenant: str = ""
    client_address: str = ""
    cache_salt: str = ""
    adapter: str = ""
    deadline: float | None = None
    data_parallel_rank: int | None = None
    kv_retention: KvRetention | None = None
    trace_headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    prefill_only: bool = False
    handoff: bytes = b""


def draw_seed() -> int:
    """Draw a seed for a request that brought none, in 0 .. 2^53 - 1."""
    return secrets.randbits(DRAWN_SEED_BITS)


def too_many_entries(sampling: object, prefix: str = "sampling.") -> list[Violation]:
    """Say which lists of sampling parameters, whatever their type, are too long; to be asked before they are copied."""
    return [
        Violation(prefix + name, f"{count} entries; at most {most} are allowed")
        for name, most in MAX_ENTRIES.items()
        if (count := len(getattr(sampling, name))) > most
    ]


class _Checker:
    """Collects violations, so that a client hears of all its mistakes at once."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.violations: list[Violation] = []

    def fail(self, name: str, message: str) -> None:
        self.violations.append(Violation(self.prefix + name, message))

    def number(self, name: str, value: float | None) -> None:
        bound = NUMBER_BOUNDS[name]
        if value is not None and not bound.allows(value):
            self.fail(name, f"{value:g} is out of range; allowed: {bound}")

    def count(self, name: str, value: int | None, low: int, high: int) -> None:
        if value is not None and not low <= value <= high:
            self.fail(name, f"{value} is out of range; allowed: {low} to {high}")

    def logit_bias(self, biases: Mapping[int, float], vocab_size: int) -> None:
        self.token_ids("logit_bias", tuple(biases), vocab_size)
        for bias in biases.values():
            self.number("logit_bias", bias)

    def token_ids(self, name: str, ids: tuple[int, ...], vocab_size: int) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            bad = next(t for t in ids if not 0 <= t < vocab_size)
            self.fail(name, f"token id {bad} is outside the vocabulary; allowed: 0 to {vocab_size - 1}")

    def strings(self, name: str, values: tuple[str, ...], max_bytes: int) -> None:
        if any(not v for v in values):
            self.fail(name, "an entry is empty; each must have at least one character")
        elif any(len(v.encode()) > max_bytes for v in values):
            self.fail(name, f"an entry is longer than {max_bytes} bytes")

    def constraint(self, constraint: Constraint | None) -> None:
        if constraint is None:
            return
        path = f"constraint.{constraint.kind}"
        if constraint.kind == "choice":
            if not constraint.choices:
                self.fail(path, "has no values; at least one is needed")
            if len(constraint.choices) > MAX_CHOICES:
                self.fail(
                    f"{path}.values", f"{len(constraint.choices)} entries; at most {MAX_CHOICES} are allowed"
                )
            elif (size := sum(len(choice.encode()) for choice in constraint.choices)) > MAX_GRAMMAR_BYTES:
                self.fail(f"{path}.values", f"{size} bytes together; at most {MAX_GRAMMAR_BYTES} are allowed")
            else:
                self.strings(f"{path}.values", constraint.choices, MAX_GRAMMAR_BYTES)
        elif constraint.kind != "json_object" and not constraint.value:
            self.fail(path, "is empty")
        elif len(constraint.value.encode()) > MAX_GRAMMAR_BYTES:
            self.fail(path, f"is longer than {MAX_GRAMMAR_BYTES} bytes")


def resolve_sampling(
    sent: SamplingOverrides, info: EngineInfo, *, num_prompt_tokens: int, seed: int, prefix: str = "sampling."
) -> Sampling:
    """Check what was sent, fill the gaps from the model's defaults, and size it to the model's context.

    seed: used if none was sent. prefix: put before field names in violations.
    Raises InvalidRequest with every violation found, Unsupported if the model lacks a capability asked for.
    """
    limits = info.limits
    check = _Checker(prefix)
    check.violations += too_many_entries(sent, prefix)
    if check.violations:
        raise InvalidRequest(check.violations)
    for name in _SCALARS:
        check.number(name, getattr(sent, name))
    check.count("n", sent.n, 1, min(MAX_OUTPUTS, limits.max_outputs))
    check.count("max_tokens", sent.max_tokens, 1, limits.max_context_tokens)
    check.count("min_tokens", sent.min_tokens, 0, sent.max_tokens or limits.max_context_tokens)
    check.count("logprobs", sent.logprobs, 0, limits.max_logprobs)
    check.count("prompt_logprobs", sent.prompt_logprobs, 0, limits.max_logprobs)
    check.count("seed", sent.seed, 0, MAX_SEED)
    check.logit_bias(sent.logit_bias, limits.vocab_size)
    check.strings("stop", sent.stop, MAX_STOP_BYTES)
    check.token_ids("stop_token_ids", sent.stop_token_ids, limits.vocab_size)
    check.strings("bad_words", sent.bad_words, MAX_STOP_BYTES)
    check.token_ids("allowed_token_ids", sent.allowed_token_ids, limits.vocab_size)
    if len(set(sent.allowed_token_ids)) != len(sent.allowed_token_ids):
        check.fail("allowed_token_ids", "has duplicates")
    check.constraint(sent.constraint)
    room = limits.max_context_tokens - num_prompt_tokens
    if not check.violations and sent.max_tokens is not None and sent.max_tokens > room:
        check.fail(
            "max_tokens",
            f"{sent.max_tokens} does not fit: the prompt has {num_prompt_tokens} tokens and the model's "
            f"context {limits.max_context_tokens}; allowed: 1 to {room}",
        )
    if not check.violations and (sent.min_tokens or 0) > room:
        check.fail("min_tokens", f"{sent.min_tokens} does not fit the context; allowed: 0 to {room}")
    if check.violations:
        raise InvalidRequest(check.violations)

    sampling = _fill(sent, info.default_sampling, room=room, seed=seed)
    if sampling.n > 1 and sampling.is_greedy:
        raise InvalidRequest.of(
            f"{prefix}n", f"{sampling.n} outputs of a greedy request would be equal; allowed: 1"
        )
    _check_capabilities(sampling, info)
    return sampling


def check_defaults(info: EngineInfo) -> None:
    """Check a model's own sampling defaults by the bounds that hold for requests. Raises ConfigError."""
    defaults, check = info.default_sampling, _Checker("")
    for name in _SCALARS:
        check.number(name, getattr(defaults, name))
    check.logit_bias(defaults.logit_bias, info.limits.vocab_size)
    if check.violations:
        found = "; ".join(f"{v.field} {v.message}" for v in check.violations)
        raise ConfigError(f"the model's default sampling (generation_config.json) is unusable: {found}")


def _fill(sent: SamplingOverrides, defaults: SamplingOverrides, *, room: int, seed: int) -> Sampling:
    merged = {
        f.name: value
        for f in fields(SamplingOverrides)
        if (value := getattr(sent, f.name)) not in (None, (), {})
        or (value := getattr(defaults, f.name)) not in (None, (), {})
    }
    neutral: dict[str, object] = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": MappingProxyType({}), "seed": seed,
        "n": 1, "max_tokens": room, "min_tokens": 0, "stop": (), "stop_token_ids": (), "include_stop": False,
        "ignore_eos": False, "bad_words": (), "allowed_token_ids": (), "logprobs": None,
        "prompt_logprobs": None, "skip_special_tokens": True, "constraint": None,
    }  # fmt: skip
    values = neutral | merged
    values["top_k"] = max(0, merged.get("top_k", 0))
    if values["constraint"] is not None:
        # What comes after a complete grammar would no longer keep to it.
        values["ignore_eos"] = False
    values["max_tokens"] = min(merged.get("max_tokens", room), room)
    return Sampling(**values)  # type: ignore[arg-type]


def _check_capabilities(sampling: Sampling, info: EngineInfo) -> None:
    needed = {
        "penalties": sampling.repetition_penalty != 1
        or sampling.frequency_penalty != 0
        or sampling.presence_penalty != 0,
        "logit_bias": bool(sampling.logit_bias),
        "bad_words": bool(sampling.bad_words),
        "allowed_token_ids": bool(sampling.allowed_token_ids),
        "min_p": sampling.min_p > 0,
        "min_tokens": sampling.min_tokens > 0,
        "multiple_outputs": sampling.n > 1,
        "logprobs": sampling.logprobs is not None,
        "prompt_logprobs": sampling.prompt_logprobs is not None,
    }
    if sampling.constraint is not None:
        kind = sampling.constraint.kind
        needed["json_schema" if kind == "json_object" else kind] = True
    for capability, is_needed in needed.items():
        if is_needed and capability not in info.capabilities:
            raise Unsupported(capability)
