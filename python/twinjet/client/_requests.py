"""Builds request messages from plain Python values. Checks nothing that the server checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from twinjet.request import SamplingOverrides
from twinjet.v1 import embedding_pb2, generation_pb2, sampling_pb2, tokenization_pb2


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; role: "system", "user", "assistant" or "tool"."""

    role: str
    content: str


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


Prompt = str | Sequence[int]
"""Text, or token ids taken as they are."""

Conversation = str | Sequence[Message]
"""Messages, oldest first, or the one thing that the user says."""


def sampling_message(sampling: SamplingOverrides | None) -> sampling_pb2.SamplingParams | None:
    """Give the message; unset fields stay unset."""
    if sampling is None:
        return None
    message = sampling_pb2.SamplingParams()
    for f in fields(sampling):
        value = getattr(sampling, f.name)
        if value is None or f.name == "constraint":
            continue
        if f.name == "logit_bias":
            message.logit_bias.update(value)
        elif isinstance(value, tuple):
            getattr(message, f.name).extend(value)
        else:
            setattr(message, f.name, value)
    if sampling.constraint is not None:
        kind, choices = sampling.constraint.kind, sampling.constraint.choices
        if kind == "choice":
            message.constraint.choice.values.extend(choices)
        elif kind == "json_object":
            message.constraint.json_object = True
        else:
            setattr(message.constraint, kind, sampling.constraint.value)
    return message


def options_message(options: Options | None) -> generation_pb2.RequestOptions | None:
    """Give the message; unset fields stay unset."""
    if options is None:
        return None
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    return generation_pb2.RequestOptions(**{k: v for k, v in values.items() if v is not None})


def generate_request(
    prompt: Prompt, sampling: SamplingOverrides | None, options: Options | None, model: str
) -> generation_pb2.GenerateRequest:
    """Give a GenerateRequest."""
    text, token_ids = (prompt, None) if isinstance(prompt, str) else ("", prompt)
    return generation_pb2.GenerateRequest(
        model=model,
        text=text,
        token_ids=token_ids,
        sampling=sampling_message(sampling),
        options=options_message(options),
    )


def chat_request(
    messages: Conversation,
    sampling: SamplingOverrides | None,
    options: Options | None,
    model: str,
    continue_final_message: bool,
    parse_control_tokens: bool = False,
) -> generation_pb2.ChatRequest:
    """Give a ChatRequest."""
    return generation_pb2.ChatRequest(
        model=model,
        messages=_messages(messages),
        sampling=sampling_message(sampling),
        options=options_message(options),
        continue_final_message=continue_final_message or None,
        parse_control_tokens=parse_control_tokens or None,
    )


def tokenize_request(
    text: str | Sequence[Message], model: str, add_special_tokens: bool | None
) -> tokenization_pb2.TokenizeRequest:
    """Give a TokenizeRequest."""
    plain, messages = (text, None) if isinstance(text, str) else ("", _messages(text))
    return tokenization_pb2.TokenizeRequest(
        model=model,
        text=plain,
        messages=messages,
        add_special_tokens=add_special_tokens,
    )


def embed_request(
    inputs: Sequence[Prompt], dimensions: int | None, options: Options | None, model: str
) -> embedding_pb2.EmbedRequest:
    """Give an EmbedRequest."""
    return embedding_pb2.EmbedRequest(
        model=model,
        inputs=[
            embedding_pb2.EmbedInput(text=i) if isinstance(i, str) else embedding_pb2.EmbedInput(token_ids=i)
            for i in inputs
        ],
        dimensions=dimensions,
        options=options_message(options),
    )


def _messages(messages: Conversation) -> list[generation_pb2.ChatMessage]:
    if isinstance(messages, str):
        messages = [Message("user", messages)]
    return [generation_pb2.ChatMessage(role=m.role, content=m.content) for m in messages]
