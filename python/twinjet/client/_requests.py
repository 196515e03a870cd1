"""Builds request messages from plain Python values.

Checks nothing that the server checks, but what no message can carry is refused here, as the server would.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage

from twinjet.client._errors import BadRequest, Violation
from twinjet.client._events import Handoff
from twinjet.v1 import embedding_pb2, generation_pb2, sampling_pb2, tokenization_pb2

_M = TypeVar("_M", bound=ProtoMessage)

_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}

_LONGEST_S = 315_576_000_000
"""Longest google.protobuf.Duration: ten thousand years."""

ConstraintKind = Literal["json_schema", "json_object", "regex", "ebnf", "choice", "structural_tag"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; role: "system", "user", "assistant" or "tool". images, audio: encoded."""

    role: str
    content: str
    images: tuple[bytes, ...] = ()
    audio: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRetention:
    """How long a request's KV blocks are worth keeping; see KvRetention in the proto. None is the engine's default.

    duration_s: how long the priorities hold, seconds; None for good.
    """

    prompt_priority: int | None = None
    output_priority: int | None = None
    duration_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What concerns a request and not its tokens. "" and None mean unset. See RequestOptions in the proto."""

    request_id: str = ""
    priority: int | None = None
    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""
    report_queue: bool | None = None
    session: str = ""
    data_parallel_rank: int | None = None
    kv_retention: KvRetention | None = None
    prefill_only: bool | None = None
    handoff: Handoff | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar for the output. value: schema, pattern or grammar text; choices: for kind "choice".

    A schema may also be given as a dict, or as a pydantic model or TypeAdapter; it is kept as JSON text.
    """

    kind: ConstraintKind
    value: Any = ""
    choices: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConstraintKind):
            raise ValueError(f"{self.kind!r} is no constraint; known: {', '.join(get_args(ConstraintKind))}")
        if self.kind == "json_schema" and not isinstance(self.value, str):
            object.__setattr__(self, "value", _schema_text(self.value))
        if not isinstance(self.value, str):
            raise TypeError(f"a constraint of kind {self.kind} must be text, not {type(self.value).__name__}")
        object.__setattr__(self, "choices", _strings("constraint.choices", self.choices))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when an output ends; see SamplingParams in the proto.

    None and empty mean unset: the model's own default. stop and bad_words may be one string. constraint may be a
    schema: a dict, or a pydantic model or TypeAdapter.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool | None = None
    ignore_eos: bool | None = None
    bad_words: str | Sequence[str] = ()
    allowed_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    constraint: Any = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            object.__setattr__(self, name, _strings(f"sampling.{name}", getattr(self, name)))
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            object.__setattr__(self, "constraint", Constraint("json_schema", self.constraint))


Prompt = str | Sequence[int]
"""Text, or token ids taken as they are."""

Turn = Message | Mapping[str, Any]
"""One turn: a Message, or a dict with its fields."""

Conversation = str | Turn | Sequence[Turn]
"""Turns, oldest first, or the one thing that the user says."""


def sampling_message(sampling: Sampling | None) -> sampling_pb2.SamplingParams | None:
    """Give the message; unset fields stay unset. Raises BadRequest for values that it cannot carry."""
    if sampling is None:
        return None
    values = {f.name: getattr(sampling, f.name) for f in fields(sampling) if f.name != "constraint"}
    message = filled(sampling_pb2.SamplingParams(), values, "sampling.")
    constraint = sampling.constraint
    if constraint is not None:
        kind: dict[str, Any] = {constraint.kind: constraint.value}
        if constraint.kind == "choice":
            choice = filled(
                sampling_pb2.Choice(), {"values": constraint.choices}, "sampling.constraint.choice."
            )
            kind = {"choice": choice}
        elif constraint.kind == "json_object":
            kind = {"json_object": True}
        filled(message.constraint, kind, "sampling.constraint.")
    return message


def options_message(options: Options | None) -> generation_pb2.RequestOptions | None:
    """Give the message; unset fields stay unset. Raises BadRequest for values that it cannot carry."""
    if options is None:
        return None
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    if options.kv_retention is not None:
        values["kv_retention"] = _retention_message(options.kv_retention)
    if options.handoff is not None:
        handoff = {"state": options.handoff.state, "seed": options.handoff.seed}
        values["handoff"] = filled(generation_pb2.Handoff(), handoff, "options.handoff.")
    return filled(generation_pb2.RequestOptions(), values, "options.")


def _retention_message(retention: KvRetention) -> generation_pb2.KvRetention:
    values: dict[str, Any] = {f.name: getattr(retention, f.name) for f in fields(retention)}
    values["duration"] = duration("options.kv_retention.duration", values.pop("duration_s"))
    return filled(generation_pb2.KvRetention(), values, "options.kv_retention.")


def generate_request(
    prompt: Prompt, sampling: Sampling | None, options: Options | None, model: str
) -> generation_pb2.GenerateRequest:
    """Give a GenerateRequest."""
    values = _prompt("prompt", prompt) | {
        "model": model,
        "sampling": sampling_message(sampling),
        "options": options_message(options),
    }
    return filled(generation_pb2.GenerateRequest(), values)


def chat_request(
    messages: Conversation,
    sampling: Sampling | None,
    options: Options | None,
    model: str,
    continue_final_message: bool,
    parse_control_tokens: bool = False,
) -> generation_pb2.ChatRequest:
    """Give a ChatRequest."""
    values = {
        "model": model,
        "messages": _messages(messages),
        "sampling": sampling_message(sampling),
        "options": options_message(options),
        "continue_final_message": continue_final_message or None,
        "parse_control_tokens": parse_control_tokens or None,
    }
    return filled(generation_pb2.ChatRequest(), values)


def tokenize_request(
    text: Conversation, model: str, add_special_tokens: bool | None, parse_control_tokens: bool = False
) -> tokenization_pb2.TokenizeRequest:
    """Give a TokenizeRequest."""
    what = {"text": text} if isinstance(text, str) else {"messages": _messages(text)}
    values = what | {
        "model": model,
        "add_special_tokens": add_special_tokens,
        "parse_control_tokens": parse_control_tokens or None,
    }
    return filled(tokenization_pb2.TokenizeRequest(), values)


def detokenize_request(
    token_ids: Sequence[int], model: str, skip_special_tokens: bool | None
) -> tokenization_pb2.DetokenizeRequest:
    """Give a DetokenizeRequest."""
    values = {"model": model, "token_ids": token_ids, "skip_special_tokens": skip_special_tokens}
    return filled(tokenization_pb2.DetokenizeRequest(), values)


def embed_request(
    inputs: Prompt | Sequence[Prompt], dimensions: int | None, options: Options | None, model: str
) -> embedding_pb2.EmbedRequest:
    """Give an EmbedRequest; a plain string is one input."""
    prompts: Sequence[Any] = [inputs] if isinstance(inputs, str) else inputs
    values = {
        "model": model,
        "inputs": [
            filled(embedding_pb2.EmbedInput(), _prompt(f"inputs[{i}]", prompt), f"inputs[{i}].")
            for i, prompt in enumerate(prompts)
        ],
        "dimensions": dimensions,
        "options": options_message(options),
    }
    return filled(embedding_pb2.EmbedRequest(), values)


def _messages(conversation: Conversation) -> list[generation_pb2.ChatMessage]:
    if isinstance(conversation, str):
        conversation = Message("user", conversation)
    turns = [conversation] if isinstance(conversation, Message | Mapping) else conversation
    return [_message(f"messages[{i}]", turn) for i, turn in enumerate(turns)]


def _message(path: str, turn: Turn) -> generation_pb2.ChatMessage:
    if isinstance(turn, Message):
        values: dict[str, Any] = {f.name: getattr(turn, f.name) for f in fields(turn)}
    elif isinstance(turn, Mapping):
        values = dict(turn)
    else:
        raise TypeError(f"{path} must be a Message or a dict, not {type(turn).__name__}")
    known = {f.name for f in fields(Message)}
    if unknown := sorted(str(key) for key in values if key not in known):
        raise _refused(f"{path}.{unknown[0]}", f"is unknown; known: {', '.join(sorted(known))}")
    if missing := sorted({"role", "content"} - values.keys()):
        raise _refused(f"{path}.{missing[0]}", "is missing")
    return filled(generation_pb2.ChatMessage(), values, f"{path}.")


def _prompt(path: str, prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    # Bytes are a sequence of numbers too, and would be sent as token ids.
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise TypeError(f"{path} must be text or token ids, not {type(prompt).__name__}")
    return {"token_ids": prompt}


def _strings(path: str, values: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        return (values,)
    if isinstance(values, bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{path} must be a string or strings, not {type(values).__name__}")
    return tuple(values)


def _schema_text(schema: object) -> str:
    if isinstance(schema, Mapping):
        return json.dumps(schema)
    # pydantic is not needed here: its models and type adapters say their schema themselves.
    for name in ("model_json_schema", "json_schema"):
        if callable(make := getattr(schema, name, None)):
            return json.dumps(make())
    raise TypeError(
        "a JSON schema must be JSON text, a dict, or a pydantic model or TypeAdapter, "
        f"not {type(schema).__name__}"
    )


def duration(path: str, seconds: float | None) -> Duration | None:
    """Give a duration, None for None. Raises BadRequest for one that the message cannot carry."""
    if seconds is None:
        return None
    if not abs(seconds) <= _LONGEST_S:
        raise _refused(path, f"{seconds:g} s is out of range; allowed: up to {_LONGEST_S:g} s")
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def filled(message: _M, values: Mapping[str, Any], prefix: str = "") -> _M:
    """Set fields; None leaves one unset. Raises BadRequest for a value that does not fit, TypeError for a wrong type."""
    for name, value in values.items():
        if value is None:
            continue
        current = getattr(message, name)
        try:
            if hasattr(current, "extend"):
                current.extend(value)
            elif hasattr(current, "update"):
                current.update(value)
            elif hasattr(current, "CopyFrom"):
                current.CopyFrom(value)
            else:
                setattr(message, name, value)
        except TypeError as error:
            raise TypeError(f"{prefix}{name}: {error}") from None
        except ValueError as error:
            raise _refused(f"{prefix}{name}", _misfit(message, name, value, error)) from None
    return message


def _misfit(message: ProtoMessage, name: str, value: Any, error: ValueError) -> str:
    if isinstance(error, UnicodeError):
        return "has half a surrogate pair in it, which UTF-8 cannot carry"
    kind = message.DESCRIPTOR.fields_by_name[name]
    if kind.message_type is not None and kind.message_type.GetOptions().map_entry:
        kind = kind.message_type.fields_by_name["key"]
    bounds = _BOUNDS.get(kind.cpp_type)
    if bounds is None:
        return str(error)
    numbers = [v for v in (value if isinstance(value, Iterable) else [value]) if isinstance(v, int)]
    odd = next((v for v in numbers if not bounds[0] <= v <= bounds[1]), value)
    return f"{odd} is out of range; allowed: {bounds[0]} to {bounds[1]}"


def _refused(path: str, message: str) -> BadRequest:
    return BadRequest(f"{path}: {message}", code="INVALID_ARGUMENT", violations=[Violation(path, message)])
