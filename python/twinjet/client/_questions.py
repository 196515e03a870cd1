"""Calls that are asked and answered once, as both clients make them: the method, its request, what its answer means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from twinjet.client._answers import (
    Adapter,
    Drained,
    Embeddings,
    Model,
    ModelLoad,
    Tokens,
    adapter_of,
    load_of,
)
from twinjet.client._events import usage_of
from twinjet.client._requests import (
    Conversation,
    Options,
    Prompt,
    detokenize_request,
    duration,
    embed_request,
    filled,
    tokenize_request,
)
from twinjet.client._routes import Route, Routes, add_request, route_message, routes_of
from twinjet.v1 import admin_pb2, model_pb2, routing_pb2

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Question(Generic[_Answer]):
    """What to ask. stub: whose method it is."""

    stub: Literal["inference", "models", "admin"]
    method: str
    request: Any
    answer: Callable[[Any], _Answer]


def tokenize(
    text: Conversation, model: str, add_special_tokens: bool | None, parse_control_tokens: bool
) -> Question[Tokens]:
    request = tokenize_request(text, model, add_special_tokens, parse_control_tokens)
    return Question(
        "inference", "Tokenize", request, lambda a: Tokens(tuple(a.token_ids), a.text, a.max_context_tokens)
    )


def detokenize(token_ids: Sequence[int], model: str, skip_special_tokens: bool | None) -> Question[str]:
    request = detokenize_request(token_ids, model, skip_special_tokens)
    return Question("inference", "Detokenize", request, lambda a: str(a.text))


def embed(
    inputs: str | Sequence[Prompt], dimensions: int | None, options: Options | None, model: str
) -> Question[Embeddings]:
    def answer(a: Any) -> Embeddings:
        return Embeddings(tuple(tuple(e.values) for e in a.embeddings), usage_of(a.usage))

    return Question("inference", "Embed", embed_request(inputs, dimensions, options, model), answer)


def models() -> Question[list[Model]]:
    request = model_pb2.ListModelsRequest()
    return Question("models", "ListModels", request, lambda a: [Model.of(model) for model in a.models])


def get_model(model: str) -> Question[Model]:
    request = filled(model_pb2.GetModelRequest(), {"model": model})
    return Question("models", "GetModel", request, lambda a: Model.of(a.model))


def load_adapter(name: str, path: str, model: str) -> Question[bool]:
    request = filled(model_pb2.LoadAdapterRequest(), {"model": model, "name": name, "path": path})
    return Question("models", "LoadAdapter", request, lambda a: bool(a.already_loaded))


def unload_adapter(name: str, model: str) -> Question[None]:
    request = filled(model_pb2.UnloadAdapterRequest(), {"model": model, "name": name})
    return Question("models", "UnloadAdapter", request, lambda _: None)


def adapters(model: str) -> Question[list[Adapter]]:
    request = filled(model_pb2.ListAdaptersRequest(), {"model": model})
    return Question("models", "ListAdapters", request, lambda a: [adapter_of(item) for item in a.adapters])


def get_load(model: str) -> Question[list[ModelLoad]]:
    request = filled(admin_pb2.GetLoadRequest(), {"model": model})
    return Question("admin", "GetLoad", request, lambda a: [load_of(load) for load in a.models])


def get_routes() -> Question[Routes]:
    return Question("admin", "GetRoutes", routing_pb2.GetRoutesRequest(), routes_of)


def set_route(route: Route, revision: int | None, remove: bool) -> Question[int]:
    values = {"route": route_message(route), "revision": revision, "remove": remove}
    request = filled(routing_pb2.SetRouteRequest(), values)
    return Question("admin", "SetRoute", request, lambda a: int(a.revision))


def add_deployment(name: str, settings: Mapping[str, Any], public: bool) -> Question[int]:
    request = add_request(name, settings, public=public)
    return Question("admin", "AddDeployment", request, lambda a: int(a.revision))


def remove_deployment(name: str, grace_s: float | None) -> Question[Drained]:
    values = {"name": name, "grace": duration("grace", grace_s)}
    request = filled(routing_pb2.RemoveDeploymentRequest(), values)
    return Question("admin", "RemoveDeployment", request, _drained)


def abort(request_id: str) -> Question[None]:
    request = filled(admin_pb2.AbortRequest(), {"request_id": request_id})
    return Question("admin", "Abort", request, lambda _: None)


def reset_prefix_cache(model: str) -> Question[bool]:
    request = filled(admin_pb2.ResetPrefixCacheRequest(), {"model": model})
    return Question("admin", "ResetPrefixCache", request, lambda a: bool(a.done))


def drain(grace_s: float | None) -> Question[Drained]:
    request = filled(admin_pb2.DrainRequest(), {"grace": duration("grace", grace_s)})
    return Question("admin", "Drain", request, _drained)


def _drained(answer: Any) -> Drained:
    return Drained(answer.finished, answer.ended)
