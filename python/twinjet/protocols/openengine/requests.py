"""An openengine.v1.GenerateRequest as a twinjet.v1 one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from twinjet.errors import InvalidRequest, Unsupported, Violation
from twinjet.protocols.openengine.v1 import generation_pb2 as pb
from twinjet.v1 import generation_pb2, sampling_pb2

INT32_MAX = 2**31 - 1
MAX_ID_CHARS = 128
BACKENDS = ("", "auto", "xgrammar")

ROUTING_KEY = "openengine-routing-key"
TARGET_RANK = "openengine-target-dp-rank"
PRIORITY = "openengine-priority"

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "seed",
)  # fmt: skip
_FIELDS = {
    "text": "prompt",
    "token_ids": "token_ids.ids",
    "options.request_id": "request_id",
    "options.adapter": "lora_name",
    "options.cache_salt": "kv.cache_salt",
    "options.priority": PRIORITY,
    "options.session": ROUTING_KEY,
    "options.data_parallel_rank": TARGET_RANK,
    "sampling.n": "sampling.num_sequences",
    "sampling.max_tokens": "stopping.max_tokens",
    "sampling.min_tokens": "stopping.min_tokens",
    "sampling.ignore_eos": "stopping.ignore_eos",
    "sampling.include_stop": "stopping.include_stop_in_output",
    "sampling.stop": "stopping.conditions",
    "sampling.stop_token_ids": "stopping.conditions",
    "sampling.logprobs": "response.output_candidates.top_n",
    "sampling.prompt_logprobs": "response.prompt_candidates.top_n",
    "sampling.constraint.ebnf": "guided.ebnf_grammar",
    "sampling.constraint.choice.values": "guided.choice.choices",
    "sampling.constraint": "guided",
}
"""Where a field of ours comes from, or all fields that begin so."""


def generate_request(
    message: pb.GenerateRequest, metadata: Mapping[str, str | bytes], *, model: str, tenant: str
) -> generation_pb2.GenerateRequest:
    """Translate a request. model: the public name; tenant: whom to account it to.

    Raises InvalidRequest, or Unsupported for what no engine behind Twinjet does.
    """
    _refuse_unsupported(message)
    request = generation_pb2.GenerateRequest(model=model)
    kind = message.WhichOneof("input")
    if kind == "prompt":
        request.text = message.prompt
    elif kind == "token_ids":
        request.token_ids.extend(_token_ids(message.token_ids.ids))
    if not request.text and not request.token_ids:
        raise InvalidRequest.of("prompt", "is empty; set one of prompt and token_ids")
    options = request.options
    options.request_id = message.request_id
    options.tenant = tenant
    options.cache_salt = message.kv.cache_salt
    options.adapter = message.lora_name
    _fill_hints(options, metadata)
    _fill_sampling(request.sampling, message)
    return request


def wants_text(message: pb.GenerateRequest) -> bool:
    """Whether tokens are to come with their text. Raises InvalidRequest."""
    if "detokenize" not in message.extra.fields:
        return True
    value = message.extra.fields["detokenize"]
    if value.WhichOneof("kind") != "bool_value":
        raise InvalidRequest.of("extra.detokenize", "must be true or false")
    return bool(value.bool_value)


def in_their_words(error: InvalidRequest) -> InvalidRequest:
    """Name the fields that the client sent instead of those that it was translated to."""
    return InvalidRequest([Violation(_their_field(v.field), v.message) for v in error.violations])


def _their_field(field: str) -> str:
    prefix = field
    while prefix:
        if prefix in _FIELDS:
            return _FIELDS[prefix] + field[len(prefix) :]
        prefix = prefix.rpartition(".")[0]
    return field


def _refuse_unsupported(message: pb.GenerateRequest) -> None:
    if message.media:
        raise Unsupported("image_input", "media are not taken")
    if message.kv.HasField("session"):
        raise Unsupported("kv_session", "no KV blocks of other engines are taken")
    if message.kv.bypass_prefix_cache:
        raise Unsupported("prefix_cache_bypass")
    if message.guided.backend not in BACKENDS:
        raise Unsupported("guided_backend", f"{message.guided.backend[:64]!r}; leave it empty")


def _token_ids(ids: Iterable[int]) -> list[int]:
    checked = list(ids)
    if bad := [t for t in checked if t > INT32_MAX]:
        raise InvalidRequest.of("token_ids.ids", f"token id {bad[0]} is outside the vocabulary")
    return checked


def _fill_hints(options: generation_pb2.RequestOptions, metadata: Mapping[str, str | bytes]) -> None:
    if (key := metadata.get(ROUTING_KEY)) is not None:
        if not isinstance(key, str) or not key:
            raise InvalidRequest.of(ROUTING_KEY, "must be text that is not empty")
        options.session = key
    for name, field in ((TARGET_RANK, "data_parallel_rank"), (PRIORITY, "priority")):
        if (value := metadata.get(name)) is not None:
            setattr(options, field, _metadata_number(name, value))


def _metadata_number(name: str, value: str | bytes) -> int:
    try:
        number = int(value)
    except ValueError:
        raise InvalidRequest.of(name, "is not a whole number in base 10") from None
    if not -INT32_MAX - 1 <= number <= INT32_MAX:
        raise InvalidRequest.of(name, f"{number} does not fit 32 bits")
    return number


def _fill_sampling(sampling: sampling_pb2.SamplingParams, message: pb.GenerateRequest) -> None:
    sent, stopping = message.sampling, message.stopping
    for name in _SAMPLING:
        if sent.HasField(name):  # type: ignore[arg-type]
            setattr(sampling, name, getattr(sent, name))
    if sent.HasField("num_sequences"):
        sampling.n = _count("sampling.num_sequences", sent.num_sequences)
    if stopping.HasField("max_tokens"):
        sampling.max_tokens = _count("stopping.max_tokens", stopping.max_tokens)
    if stopping.HasField("min_tokens"):
        sampling.min_tokens = _count("stopping.min_tokens", stopping.min_tokens)
    if stopping.HasField("ignore_eos"):
        sampling.ignore_eos = stopping.ignore_eos
    if stopping.HasField("include_stop_in_output"):
        sampling.include_stop = stopping.include_stop_in_output
    for i, condition in enumerate(stopping.conditions):
        match condition.WhichOneof("condition"):
            case "stop_text":
                sampling.stop.append(condition.stop_text)
            case "stop_token_id":
                name = f"stopping.conditions[{i}].stop_token_id"
                sampling.stop_token_ids.append(_count(name, condition.stop_token_id))
            case _:
                raise InvalidRequest.of(
                    f"stopping.conditions[{i}]", "has neither stop_text nor stop_token_id"
                )
    _fill_logprobs(sampling, message.response)
    if message.HasField("guided"):
        _fill_constraint(sampling.constraint, message.guided)


def _fill_logprobs(sampling: sampling_pb2.SamplingParams, response: pb.ResponseOptions) -> None:
    """Candidates ask for log probabilities too; "false" beside them is a contradiction."""
    for side, field in (("output", "logprobs"), ("prompt", "prompt_logprobs")):
        asked = f"return_{side}_logprobs"
        has_candidates = response.HasField(f"{side}_candidates")  # type: ignore[arg-type]
        is_asked = getattr(response, asked)
        if has_candidates and response.HasField(asked) and not is_asked:  # type: ignore[arg-type]
            raise InvalidRequest.of(f"response.{asked}", f"is false although {side}_candidates is set")
        if has_candidates:
            setattr(
                sampling,
                field,
                _top_n(f"response.{side}_candidates", getattr(response, f"{side}_candidates")),
            )
        elif is_asked:
            setattr(sampling, field, 0)
    if response.HasField("prompt_logprob_start") and not sampling.HasField("prompt_logprobs"):
        raise InvalidRequest.of("response.prompt_logprob_start", "is set without prompt logprobs")


def _top_n(name: str, selection: pb.CandidateTokenSelection) -> int:
    match selection.WhichOneof("selection"):
        case "top_n":
            return _count(f"{name}.top_n", selection.top_n)
        case None:
            raise InvalidRequest.of(name, "selects nothing; set top_n")
        case kind:
            raise Unsupported("candidate_selection", f"{kind}; only top_n is told")


def _fill_constraint(constraint: sampling_pb2.Constraint, guided: pb.GuidedDecoding) -> None:
    match guided.WhichOneof("guide"):
        case None:
            raise InvalidRequest.of("guided", "no guide is set")
        case "choice":
            constraint.choice.values.extend(guided.choice.choices)
            constraint.choice.SetInParent()
        case "json_object":
            constraint.json_object = True
        case "ebnf_grammar":
            constraint.ebnf = guided.ebnf_grammar
        case kind:
            setattr(constraint, kind, getattr(guided, kind))


def _count(name: str, value: int) -> int:
    """A uint32 that becomes an int32 of ours, whose own range is checked later."""
    if value > INT32_MAX:
        raise InvalidRequest.of(name, f"{value} is out of range; at most {INT32_MAX}")
    return value


def metadata_of(context: Any) -> dict[str, str | bytes]:
    """The call's metadata; of a key that comes several times the last value."""
    return dict(context.invocation_metadata() or ())
