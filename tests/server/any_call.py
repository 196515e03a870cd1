"""Every RPC of a server called with any message, and what must hold of each answer whatever was sent."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from tests.server.any_message import hostile, on_the_wire
from tests.server.hostile import Answer, ask
from twinjet.protocols.openengine.v1 import openengine_pb2
from twinjet.v1 import service_pb2

DUE = frozenset(
    {
        "OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "UNIMPLEMENTED", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED", "ABORTED", "PERMISSION_DENIED",
    }
)  # fmt: skip
"""What hostile calls may end with. The others speak of a fault of the server's, or of a client that left."""

LEFT_OUT = frozenset({"Drain"})
"""After it a server serves nobody."""
WATCHES = frozenset(
    {"Watch", "WatchKvEvents", "SubscribeKvEvents", "Compare", "AddDeployment", "ServerReflectionInfo"}
)
"""What may go on for as long as its caller stays."""
METADATA_FIELDS = frozenset({"openengine-routing-key", "openengine-target-dp-rank", "openengine-priority"})

_BASES: dict[str, dict[str, Any]] = {
    "twinjet.v1.GenerateRequest": {"text": "x", "sampling": {"max_tokens": 3}},
    "twinjet.v1.ChatRequest": {"messages": [{"role": "user", "content": "x"}], "sampling": {"max_tokens": 3}},
    "twinjet.v1.EmbedRequest": {"inputs": [{"text": "x"}]},
    "twinjet.v1.TokenizeRequest": {"text": "x"},
    "twinjet.v1.DetokenizeRequest": {"token_ids": [1, 2]},
    "twinjet.v1.LoadAdapterRequest": {"name": "a", "path": "/nowhere"},
    "twinjet.v1.UnloadAdapterRequest": {"name": "a"},
    "twinjet.v1.AbortRequest": {"request_id": "x"},
    "twinjet.v1.AddDeploymentRequest": {"name": "extra", "settings": {"engine": "fake"}},
    "twinjet.v1.RemoveDeploymentRequest": {"name": "extra", "grace": {"seconds": 0}},
    "twinjet.v1.SetRouteRequest": {"route": {"model": "spare"}},
    "twinjet.v1.CompareRequest": {
        "synthetic": {"prompt_tokens": 2, "output_tokens": 2}, "requests_per_leg": 1, "max_blocks": 6, "num_answers": 1,
    },
    "openengine.v1.GenerateRequest": {"prompt": "x", "stopping": {"max_tokens": 3}},
    "openengine.v1.AbortRequest": {"request_id": "x"},
    "openengine.v1.LoadLoraRequest": {"adapter": {"lora_name": "a", "source_path": "/nowhere"}},
}  # fmt: skip
"""A request of each kind that is in order."""


@dataclass(frozen=True)
class Rpc:
    """One method, with a request that is in order."""

    path: str
    base: Message = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def rpcs(model: str, deployment: str) -> list[Rpc]:
    """Every method of a server with OpenEngine switched on that has a model and a deployment of these names."""
    services = [
        service
        for file in (service_pb2, openengine_pb2, health_pb2, reflection_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    ]
    return [
        Rpc(f"/{service.full_name}/{method.name}", _base(method.input_type, model, deployment))
        for service in services
        for method in service.methods
        if method.name not in LEFT_OUT
    ]


def _base(descriptor: Any, model: str, deployment: str) -> Message:
    message_class = message_factory.GetMessageClass(descriptor)
    message: Any = message_class(**_BASES.get(descriptor.full_name, {}))
    if "model" in descriptor.fields_by_name:
        message.model = model
    if descriptor.full_name == "twinjet.v1.SetRouteRequest":
        message.route.weights[deployment] = 1.0
    if descriptor.full_name == "twinjet.v1.CompareRequest":
        message.deployment_a = message.deployment_b = deployment
    return message


@st.composite
def calls(draw: st.DrawFn, methods: Sequence[Rpc], model: str, deployment: str) -> tuple[Rpc, bytes]:
    """A method and what is sent to it; nothing by which an operator may rightly take the model from others."""
    rpc = draw(st.sampled_from(methods))
    data = draw(
        on_the_wire(draw(hostile(rpc.base))).filter(lambda data: not governs(rpc, data, model, deployment))
    )
    return rpc, data


def governs(rpc: Rpc, data: bytes, model: str, deployment: str) -> bool:
    """Whether the call is an order, and no fault, by which a model's requests are served otherwise or an engine starts that
    is more than a fake."""
    try:
        request: Any = type(rpc.base).FromString(data)
    except DecodeError:
        return False
    match rpc.base.DESCRIPTOR.full_name:
        case "twinjet.v1.SetRouteRequest":
            return bool(request.route.model == model)
        case "twinjet.v1.RemoveDeploymentRequest":
            return bool(request.name == deployment)
        case "twinjet.v1.AddDeploymentRequest":
            fields = request.settings.fields
            return "engine" not in fields or fields["engine"].string_value in ("vllm", "tensorrt_llm")
    return False


def call(channel: grpc.Channel, rpc: Rpc, data: bytes) -> Answer:
    """Make a call and read to its end, or a little of what has none."""
    return ask(channel, rpc.path, data, 0.3 if rpc.name in WATCHES else 60.0)


def campaign(channel: grpc.Channel, model: str, deployment: str, num_calls: int, seed: int) -> Counter[str]:
    """Make so many calls and count their answers; what is at fault begins with WRONG."""
    found: Counter[str] = Counter()

    @with_seed(seed)
    @settings(
        database=None,
        deadline=None,
        max_examples=num_calls,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(rpcs(model, deployment), model, deployment))
    def run(sent: tuple[Rpc, bytes]) -> None:
        rpc, data = sent
        began = time.monotonic()
        answer = call(channel, rpc, data)
        wrong = fault(rpc, answer)
        took = time.monotonic() - began
        slow = f" after {took:.1f} s" if took > 2 else ""
        found[f"WRONG: {wrong}: {data[:2000]!r}" if wrong else f"{rpc.name} {answer.code}{slow}"] += 1

    run()
    return found


def fault(rpc: Rpc, answer: Answer) -> str:
    """Say what an answer should not be; "" if nothing."""
    if answer.code not in DUE:
        return f"{rpc.path}: {answer.code}: {answer.message[:300]}"
    if answer.code != "INVALID_ARGUMENT" or not rpc.path.startswith(("/twinjet.", "/openengine.")):
        return ""
    descriptor = rpc.base.DESCRIPTOR
    known = {
        *descriptor.fields_by_name,
        *descriptor.oneofs_by_name,
        descriptor.name,
        "request",
        *METADATA_FIELDS,
    }
    names = [name.partition(".")[0].partition("[")[0] for name in answer.fields]
    if not names or not known.issuperset(names):
        return f"{rpc.path}: names {answer.fields}, which the request has not: {answer.message[:300]}"
    return ""
