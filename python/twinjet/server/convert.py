"""Protobuf to Twinjet's types and back. Pure; the only module that raises InvalidRequest for a message's shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf.duration_pb2 import Duration

from twinjet.engines.base import ChatTurn, Component, EngineInfo
from twinjet.errors import InvalidRequest, Unsupported, Violation
from twinjet.request import (
    MAX_HANDOFF_BYTES,
    Constraint,
    KvRetention,
    SamplingOverrides,
    too_many_entries,
)
from twinjet.v1 import generation_pb2, model_pb2, sampling_pb2

MAX_ID_CHARS = 128
MAX_LABEL_BYTES = 128
MAX_MESSAGES = 4096
MAX_RETENTION_PRIORITY = 100
MAX_RETENTION_S = 7 * 24 * 3600
MAX_TRACE_BYTES = 512
ROLES = ("system", "user", "assistant", "tool")

_PRINTABLE = re.compile(r"[\x21-\x7e]*")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class Options(NamedTuple):
    """RequestOptions, checked. "" and 0 are unset."""

    request_id: str = ""
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""
    report_queue: bool = False
    session: str = ""
    data_parallel_rank: int | None = None
    kv_retention: KvRetention | None = None
    prefill_only: bool = False
    handoff: bytes = b""
    handoff_seed: int | None = None


def request_id_violation(field: str, request_id: str) -> list[Violation]:
    """Say what is wrong with a request id, if anything is."""
    if len(request_id) <= MAX_ID_CHARS and _PRINTABLE.fullmatch(request_id):
        return []
    return [Violation(field, f"must be at most {MAX_ID_CHARS} printable ASCII characters without spaces")]


def options(message: generation_pb2.RequestOptions) -> Options:
    """Check and convert RequestOptions. Raises InvalidRequest."""
    violations = request_id_violation("options.request_id", message.request_id)
    if not -100 <= message.priority <= 100:
        violations.append(
            Violation("options.priority", f"{message.priority} is out of range; allowed: -100 to 100")
        )
    for name in ("tenant", "cache_salt", "adapter", "session"):
        if len(getattr(message, name).encode()) > MAX_LABEL_BYTES:
            violations.append(Violation(f"options.{name}", f"is longer than {MAX_LABEL_BYTES} bytes"))
    if message.data_parallel_rank < 0:
        violations.append(
            Violation(
                "options.data_parallel_rank",
                f"{message.data_parallel_rank} is out of range; allowed: 0 or more",
            )
        )
    retention = _kv_retention(message.kv_retention, violations) if message.HasField("kv_retention") else None
    is_handed = message.HasField("handoff")
    if is_handed:
        _check_handoff(message, violations)
    if violations:
        raise InvalidRequest(violations)
    return Options(
        message.request_id,
        message.priority,
        message.tenant,
        message.cache_salt,
        message.adapter,
        message.report_queue,
        message.session,
        message.data_parallel_rank if message.HasField("data_parallel_rank") else None,
        retention,
        message.prefill_only,
        message.handoff.state if is_handed else b"",
        message.handoff.seed if is_handed else None,
    )


def _check_handoff(message: generation_pb2.RequestOptions, violations: list[Violation]) -> None:
    """Add what is wrong with a handoff, whatever the engine, to violations."""
    size = len(message.handoff.state)
    if not 1 <= size <= MAX_HANDOFF_BYTES:
        violations.append(
            Violation(
                "options.handoff.state",
                f"{size} bytes; allowed: 1 to {MAX_HANDOFF_BYTES}, as a prefill gave it",
            )
        )
    if message.prefill_only:
        violations.append(Violation("options.handoff", "cannot go with prefill_only; set one of them"))


def _kv_retention(message: generation_pb2.KvRetention, violations: list[Violation]) -> KvRetention:
    """Convert KvRetention, adding what is wrong with it to violations."""
    priorities: dict[str, int | None] = {}
    for name in ("prompt_priority", "output_priority"):
        value = priorities[name] = getattr(message, name) if message.HasField(name) else None
        if value is not None and not 0 <= value <= MAX_RETENTION_PRIORITY:
            violations.append(
                Violation(
                    f"options.kv_retention.{name}",
                    f"{value} is out of range; allowed: 0 to {MAX_RETENTION_PRIORITY}",
                )
            )
    seconds = None
    if message.HasField("duration"):
        seconds = message.duration.seconds + message.duration.nanos / 1e9
        if not 0 < seconds <= MAX_RETENTION_S:
            violations.append(
                Violation(
                    "options.kv_retention.duration",
                    f"{seconds:g} s is out of range; allowed: above 0 to {MAX_RETENTION_S} s",
                )
            )
    return KvRetention(duration_s=seconds, **priorities)


def trace_headers(metadata: Iterable[tuple[str, str | bytes]] | None) -> Mapping[str, str]:
    """Give the W3C trace context of a call: traceparent and tracestate, if the former is there and well formed."""
    found = {}
    for key, value in metadata or ():
        if (
            (key == "traceparent" or key == "tracestate")
            and isinstance(value, str)
            and len(value) <= MAX_TRACE_BYTES
        ):
            found[key] = value
    return found if found and _TRACEPARENT.fullmatch(found.get("traceparent", "")) else {}


def one_prompt(text: str, token_ids: Sequence[int], max_bytes: int, prefix: str = "") -> None:
    """Check that exactly one of text and token_ids is given, and the text's size. Raises InvalidRequest."""
    if bool(text) == bool(token_ids):
        what = "both are set" if text else "both are empty"
        raise InvalidRequest.of(f"{prefix}text", f"{what}; set exactly one of text and token_ids")
    size = len(text.encode()) if text else 0
    if size > max_bytes:
        raise InvalidRequest.of(f"{prefix}text", f"{size} bytes; at most {max_bytes} are allowed")


def token_ids(ids: Sequence[int], vocab_size: int, field: str) -> tuple[int, ...]:
    """Check token ids against the vocabulary. Raises InvalidRequest."""
    checked = tuple(ids)
    if checked and not (min(checked) >= 0 and max(checked) < vocab_size):
        bad = next(t for t in checked if not 0 <= t < vocab_size)
        raise InvalidRequest.of(
            field, f"token id {bad} is outside the vocabulary; allowed: 0 to {vocab_size - 1}"
        )
    return checked


def chat_turns(
    messages: Sequence[generation_pb2.ChatMessage], max_bytes: int, *, continue_final: bool = False
) -> list[ChatTurn]:
    """Check and convert a conversation. Raises InvalidRequest, or Unsupported for pictures and sound."""
    if not messages:
        raise InvalidRequest.of("messages", "is empty; at least one message is needed")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest.of("messages", f"{len(messages)} messages; at most {MAX_MESSAGES} are allowed")
    size = sum(len(message.content.encode()) for message in messages)
    if size > max_bytes:
        raise InvalidRequest.of("messages", f"{size} bytes of content; at most {max_bytes} are allowed")
    violations = [
        Violation(f"messages[{i}].role", f"{message.role[:32]!r} is unknown; allowed: {', '.join(ROLES)}")
        for i, message in enumerate(messages)
        if message.role not in ROLES
    ]
    if continue_final and messages[-1].role != "assistant":
        violations.append(Violation("continue_final_message", "needs a last message whose role is assistant"))
    if violations:
        raise InvalidRequest(violations)
    if any(message.images for message in messages):
        raise Unsupported("image_input")
    if any(message.audio for message in messages):
        raise Unsupported("audio_input")
    return [ChatTurn(message.role, message.content) for message in messages]


def sampling_overrides(message: sampling_pb2.SamplingParams) -> SamplingOverrides:
    """Convert SamplingParams, keeping what is unset unset.

    Raises InvalidRequest for lists that are too long and for an empty constraint.
    """
    if violations := too_many_entries(message):
        raise InvalidRequest(violations)

    def optional(name: str) -> Any:
        return getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type]

    return SamplingOverrides(
        temperature=optional("temperature"),
        top_p=optional("top_p"),
        top_k=optional("top_k"),
        min_p=optional("min_p"),
        repetition_penalty=optional("repetition_penalty"),
        frequency_penalty=optional("frequency_penalty"),
        presence_penalty=optional("presence_penalty"),
        logit_bias=dict(message.logit_bias),
        seed=optional("seed"),
        n=optional("n"),
        max_tokens=optional("max_tokens"),
        min_tokens=optional("min_tokens"),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        include_stop=optional("include_stop"),
        ignore_eos=optional("ignore_eos"),
        bad_words=tuple(message.bad_words),
        allowed_token_ids=tuple(message.allowed_token_ids),
        logprobs=optional("logprobs"),
        prompt_logprobs=optional("prompt_logprobs"),
        skip_special_tokens=optional("skip_special_tokens"),
        constraint=_constraint(message.constraint) if message.HasField("constraint") else None,
    )


def _constraint(message: sampling_pb2.Constraint) -> Constraint:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest.of(
            "sampling.constraint",
            "no kind is set; set one of json_schema, json_object, regex, ebnf, choice, structural_tag",
        )
    if kind == "choice":
        return Constraint("choice", choices=tuple(message.choice.values))
    if kind == "json_object":
        if not message.json_object:
            raise InvalidRequest.of("sampling.constraint.json_object", "must be true when set")
        return Constraint("json_object")
    return Constraint(kind, getattr(message, kind))


def sampling_message(values: SamplingOverrides) -> sampling_pb2.SamplingParams:
    """Convert a model's default sampling back to a message."""
    message = sampling_pb2.SamplingParams()
    for name in message.DESCRIPTOR.fields_by_name:
        value = getattr(values, name, None)
        if isinstance(value, bool | int | float):
            setattr(message, name, value)
        elif name == "logit_bias":
            message.logit_bias.update(values.logit_bias)
        elif isinstance(value, tuple):
            getattr(message, name).extend(value)
    return message


def duration(seconds: float) -> Duration:
    """Seconds to a Duration; never negative."""
    message = Duration()
    message.FromNanoseconds(max(0, int(seconds * 1e9)))
    return message


def component(part: Component) -> model_pb2.ComponentInfo:
    """Convert what is in use of a component."""
    return model_pb2.ComponentInfo(
        implementation=part.implementation,
        version=part.version,
        target=part.target,
        reason=part.reason,
        counters=part.counters,
    )


def fill_engine_info(model: model_pb2.Model, info: EngineInfo) -> None:
    """Fill in what is known of a model once its engine runs."""
    model.engine.CopyFrom(
        model_pb2.EngineInfo(name=info.name, version=info.version, device=info.device, source=info.source)
    )
    model.limits.CopyFrom(
        model_pb2.ModelLimits(
            max_context_tokens=info.limits.max_context_tokens,
            vocab_size=info.limits.vocab_size,
            max_outputs=info.limits.max_outputs,
            max_logprobs=info.limits.max_logprobs,
            max_concurrent_sequences=info.limits.max_num_seqs,
        )
    )
    model.capabilities.extend(
        sorted(model_pb2.Capability.Value(f"CAPABILITY_{c.upper()}") for c in info.capabilities)
    )
    model.default_sampling.CopyFrom(sampling_message(info.default_sampling))
    model.sampler.CopyFrom(component(info.sampler))
    model.block_manager.CopyFrom(component(info.block_manager))
    model.eos_token_ids.extend(info.eos_token_ids)
    if info.kv_cache is not None:
        model.kv_cache.num_blocks = info.kv_cache.num_blocks
        model.kv_cache.block_size = info.kv_cache.block_size
    model.settings.update(info.settings)
