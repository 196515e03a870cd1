"""OpenEngine v1: what its messages mean here, and that discovery tells no more than Generate takes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.protocols.wire import OPENENGINE
from tests.server.full_fake import FullFakeEngine
from tests.server.harness import Harness, Serve, details
from twinjet import config
from twinjet.protocols.openengine import requests
from twinjet.protocols.openengine.v1 import (
    error_pb2,
    generation_pb2,
    kv_pb2,
    lifecycle_pb2,
    lora_pb2,
    model_pb2,
    openengine_pb2,
    openengine_pb2_grpc,
    server_pb2,
)
from twinjet.v1 import admin_pb2, routing_pb2
from twinjet.v1 import generation_pb2 as ours

Request = generation_pb2.GenerateRequest
ON = {"openengine": {"enabled": True}}


@pytest.fixture
async def serve_full(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """A server whose engine has adapters and KV events."""
    monkeypatch.setattr("twinjet.engines.fake.FakeEngine", FullFakeEngine)
    return await serve(protocols=ON)


class Client:
    """Stubs of the protocol."""

    def __init__(self, h: Harness) -> None:
        self.inference = openengine_pb2_grpc.InferenceStub(h.channel)
        self.control = openengine_pb2_grpc.ControlStub(h.channel)

    async def generate(
        self, request: Request, metadata: tuple[tuple[str, str], ...] = (), **options: Any
    ) -> list[generation_pb2.GenerateResponse]:
        call: Any = self.inference.Generate(request, metadata=metadata, **options)
        messages = []
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
        return messages


async def refused(coroutine: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await coroutine
    error: grpc.aio.AioRpcError = caught.value
    return error


def request(text: str = "Hello", **fields: Any) -> Request:
    fields.setdefault("stopping", {"max_tokens": 5})
    return Request(request_id="r1", prompt=text, **fields)


def events(messages: list[generation_pb2.GenerateResponse]) -> list[str]:
    return [m.WhichOneof("event") or "" for m in messages]


# ---- the wire ----


def test_the_protos_are_the_published_wire() -> None:
    assert OPENENGINE["package"] == openengine_pb2.DESCRIPTOR.package
    pool = openengine_pb2.DESCRIPTOR.pool
    for name, fields in OPENENGINE["messages"].items():
        found = pool.FindMessageTypeByName(f"openengine.v1.{name}")
        assert [_field(f) for f in sorted(found.fields, key=lambda f: f.number)] == fields, name
    for name, values in OPENENGINE["enums"].items():
        enum = pool.FindEnumTypeByName(f"openengine.v1.{name}")
        assert [[v.name, v.number] for v in enum.values] == values, name
    for name, methods in OPENENGINE["services"].items():
        service = openengine_pb2.DESCRIPTOR.services_by_name[name]
        told = [[m.name, m.input_type.name, m.output_type.name, m.server_streaming] for m in service.methods]
        assert told == methods, name


def _field(field: FieldDescriptor) -> list[Any]:
    """Number, name, kind of value and how it may be absent."""
    if field.message_type is not None:
        kind = field.message_type.full_name
    elif field.enum_type is not None:
        kind = field.enum_type.full_name
    else:
        kind = {
            1: "double",
            3: "int64",
            4: "uint64",
            5: "int32",
            8: "bool",
            9: "string",
            12: "bytes",
            13: "uint32",
        }[field.type]
    oneof = field.containing_oneof
    if field.is_repeated:
        label = "repeated"
    elif oneof is not None and not oneof.name.startswith("_"):
        label = f"oneof {oneof.name}"
    elif oneof is not None:
        label = "optional"
    else:
        label = "singular"
    return [field.number, field.name, kind.removeprefix("openengine.v1."), label]


# ---- switched on or off ----


async def test_it_is_off_unless_configured(serve: Serve) -> None:
    h = await serve()
    error = await refused(Client(h).control.GetServerInfo(server_pb2.GetServerInfoRequest()))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_and_health_know_it(serve: Serve) -> None:
    h = await serve(protocols=ON)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(h.channel)
    call = stub.ServerReflectionInfo(iter([ask]))
    names = {s.name for s in (await call.read()).list_services_response.service}
    assert {"openengine.v1.Inference", "openengine.v1.Control", "twinjet.v1.InferenceService"} <= names


# ---- Generate ----


async def test_a_stream_is_tokens_then_finished_with_usage(serve: Serve) -> None:
    h = await serve(protocols=ON)
    messages = await Client(h).generate(request())
    assert set(events(messages[:-1])) == {"token"}
    assert {m.request_id for m in messages} == {"r1"}
    tokens = [t for m in messages for t in m.token.tokens]
    assert len(tokens) == 5
    assert all(t.token == chr(t.token_id) and not t.HasField("logprob") for t in tokens)
    assert "".join(m.token.text for m in messages) == "".join(t.token for t in tokens)
    last = messages[-1]
    assert last.finished.reason == generation_pb2.FINISH_REASON_LENGTH
    assert last.finished.HasField("output_index")
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (6, 5, 11)


async def test_it_is_the_stream_that_our_own_contract_gives(serve: Serve) -> None:
    h = await serve({"output": "logits"}, protocols=ON)
    fields = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7}
    penalties = {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1}
    theirs = await Client(h).generate(
        request(
            sampling={**fields, **penalties, "num_sequences": 2},
            stopping={"max_tokens": 12, "min_tokens": 3, "ignore_eos": True},
        )
    )
    sampling = {**fields, **penalties, "n": 2, "max_tokens": 12, "min_tokens": 3, "ignore_eos": True}
    mine = [m async for m in h.inference.Generate(ours.GenerateRequest(text="Hello", sampling=sampling))]
    for index in range(2):
        expected = [t for m in mine if m.delta.output_index == index for t in m.delta.token_ids]
        got = [t.token_id for m in theirs if m.token.output_index == index for t in m.token.tokens]
        assert got == expected
        assert len(got) == 12


async def test_tokens_alone_where_text_is_not_wanted(serve: Serve) -> None:
    h = await serve(protocols=ON)
    quiet = request(response={"output_candidates": {"top_n": 1}})
    quiet.extra["detokenize"] = False
    quiet.extra["something_else"] = 3
    messages = await Client(h).generate(quiet)
    tokens = [t for m in messages for t in m.token.tokens]
    assert len(tokens) == 5
    assert all(not t.token and not t.candidates[0].token for t in tokens)
    assert all(not m.token.text for m in messages)
    loud = request()
    loud.extra["detokenize"] = "no"
    error = await refused(Client(h).generate(loud))
    assert details(error)["BadRequest"].field_violations[0].field == "extra.detokenize"


async def test_log_probabilities_of_prompt_and_output(serve: Serve) -> None:
    h = await serve({"output": "logits"}, protocols=ON)
    asked = request(
        response={
            "return_output_logprobs": True,
            "return_prompt_logprobs": True,
            "prompt_candidates": {"top_n": 2},
            "prompt_logprob_start": 3,
        }
    )
    messages = await Client(h).generate(asked)
    assert messages[0].WhichOneof("event") == "prompt"
    # BOS H e l l o, from the third after BOS on.
    assert [t.token for t in messages[0].prompt.tokens] == ["l", "l", "o"]
    assert all(len(t.candidates) == 2 and t.HasField("logprob") for t in messages[0].prompt.tokens)
    tokens = [t for m in messages for t in m.token.tokens]
    assert len(tokens) == 5
    assert all(t.HasField("logprob") and not t.candidates for t in tokens)


async def test_what_ended_an_output_is_told(serve: Serve) -> None:
    h = await serve({"output": "echo"}, protocols=ON)
    client = Client(h)

    async def end(**stopping: Any) -> tuple[str, generation_pb2.GenerationFinished]:
        messages = await client.generate(request("abcdef", stopping=stopping))
        return "".join(m.token.text for m in messages), messages[-1].finished

    text, finished = await end(conditions=[{"stop_text": "cd"}])
    assert (text, finished.stop_match.stop_text) == ("ab", "cd")
    text, finished = await end(conditions=[{"stop_text": "cd"}], include_stop_in_output=True)
    assert (text, finished.stop_match.stop_text) == ("abcd", "cd")
    text, finished = await end(conditions=[{"stop_token_id": ord("e")}])
    assert (text, finished.stop_match.stop_token_id) == ("abcd", ord("e"))
    text, finished = await end()
    assert (text, finished.stop_match.eos_token_id) == ("abcdef", 256)
    assert finished.reason == generation_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"sampling": {"num_sequences": 1000}}, "sampling.num_sequences"),
        ({"sampling": {"num_sequences": 2**31 - 1}}, "sampling.num_sequences"),
        ({"sampling": {"num_sequences": 2**32 - 1}}, "sampling.num_sequences"),
        ({"stopping": {"max_tokens": 0}}, "stopping.max_tokens"),
        ({"stopping": {"max_tokens": 2**32 - 1}}, "stopping.max_tokens"),
        ({"stopping": {"min_tokens": 9999}}, "stopping.min_tokens"),
        ({"stopping": {"conditions": [{}]}}, "stopping.conditions[0]"),
        ({"stopping": {"conditions": [{"stop_text": ""}]}}, "stopping.conditions"),
        ({"stopping": {"conditions": [{"stop_token_id": 2**31}]}}, "stopping.conditions[0].stop_token_id"),
        ({"response": {"output_candidates": {"top_n": 999}}}, "response.output_candidates.top_n"),
        ({"response": {"output_candidates": {}}}, "response.output_candidates"),
        (
            {"response": {"return_output_logprobs": False, "output_candidates": {"top_n": 1}}},
            "response.return_output_logprobs",
        ),
        ({"response": {"prompt_logprob_start": 1}}, "response.prompt_logprob_start"),
        ({"token_ids": {"ids": [1, 300]}}, "token_ids.ids"),
        ({"token_ids": {"ids": [2**32 - 1]}}, "token_ids.ids"),
        ({"token_ids": {}}, "prompt"),
        ({"request_id": "no spaces"}, "request_id"),
        ({"kv": {"cache_salt": "s" * 129}}, "kv.cache_salt"),
        ({"lora_name": "l" * 129}, "lora_name"),
        ({"guided": {}}, "guided"),
        ({"guided": {"choice": {}}}, "guided.choice"),
        ({"metadata": ("openengine-priority", "101")}, "openengine-priority"),
        ({"metadata": ("openengine-priority", "high")}, "openengine-priority"),
        ({"metadata": ("openengine-priority", str(2**40))}, "openengine-priority"),
        ({"metadata": ("openengine-target-dp-rank", "-1")}, "openengine-target-dp-rank"),
        ({"metadata": ("openengine-routing-key", "k" * 129)}, "openengine-routing-key"),
    ],
)
async def test_mistakes_are_named_in_the_words_of_the_protocol(
    serve: Serve, change: dict[str, Any], field: str
) -> None:
    h = await serve(protocols=ON)
    metadata = change.get("metadata")
    wrong = request()
    wrong.MergeFrom(Request(**{k: v for k, v in change.items() if k != "metadata"}))
    error = await refused(Client(h).generate(wrong, metadata=(metadata,) if metadata else ()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert details(error)["BadRequest"].field_violations[0].field == field
    await h.until_idle()


@pytest.mark.parametrize(
    "change",
    [
        {"media": [{"url": "http://example.org/a.png"}]},
        {"kv": {"session": {"session_id": "x"}}},
        {"kv": {"bypass_prefix_cache": True}},
        {"guided": {"json_object": {}, "backend": "other"}},
        {"response": {"output_candidates": {"all": {}}}},
        {"response": {"prompt_candidates": {"token_ids": {"ids": [1]}}}},
        {"guided": {"regex": "a+"}},
    ],
)
async def test_what_cannot_be_done_is_unimplemented(serve: Serve, change: dict[str, Any]) -> None:
    h = await serve(protocols=ON)
    error = await refused(Client(h).generate(request(**change)))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED, error.details()
    assert details(error)["ErrorInfo"].reason == "CAPABILITY_MISSING"


async def test_bytes_that_are_no_message_name_the_field(serve: Serve) -> None:
    h = await serve(protocols=ON)
    raw = h.channel.unary_stream("/openengine.v1.Inference/Generate", request_serializer=lambda data: data)
    error = await refused(raw(b"\x12\x02\xff\xfe").read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)["BadRequest"].field_violations[0].field == "model"


async def test_a_refusal_is_a_status_and_a_failure_later_one_error_event(serve: Serve) -> None:
    h = await serve(protocols=ON, deployments={"fake": {"engine": "fake", "max_restarts": 2}})
    client = Client(h)
    error = await refused(client.generate(request(model="unknown")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    messages = await client.generate(request("!fail:2", stopping={"max_tokens": 9}))
    assert events(messages)[-1] == "error"
    assert events(messages).count("error") == 1
    assert messages[-1].error.code == error_pb2.ERROR_CODE_INTERNAL
    assert not messages[-1].error.retryable
    messages = await client.generate(request("!die:2", stopping={"max_tokens": 9}))
    assert messages[-1].error.code == error_pb2.ERROR_CODE_INTERNAL
    assert not messages[-1].error.retryable, "it may have ended the engine"
    await h.until(lambda: len(h.engines) == 2)
    await h.until_ready()
    assert events(await client.generate(request()))[-1] == "finished"


async def test_a_failure_that_is_told_counts_in_the_load_reports(serve: Serve) -> None:
    h = await serve(protocols=ON)
    counted = []
    h.server.load_reports.count = counted.append  # type: ignore[method-assign]
    await Client(h).generate(request("!fail:2", stopping={"max_tokens": 9}))
    await Client(h).generate(request())
    assert [type(error).__name__ for error in counted] == ["RequestFailed", "NoneType"]


async def test_a_priority_above_the_deployments_bound_is_named_in_the_words_of_the_protocol(
    serve: Serve,
) -> None:
    deployments = {"fake": {"engine": "fake", "scheduler": {"max_priority": 5}}}
    h = await serve(protocols=ON, deployments=deployments)
    error = await refused(Client(h).generate(request(), metadata=(("openengine-priority", "6"),)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details(error)["BadRequest"].field_violations
    assert violation.field == "openengine-priority" and "-100 to 5" in violation.description


@pytest.mark.parametrize("tenant", ["dynamo", ""])
async def test_requests_are_accounted_to_the_configured_tenant_or_to_addresses(
    serve: Serve, tenant: str
) -> None:
    h = await serve(protocols={"openengine": {"enabled": True, "tenant": tenant}})
    dispatcher = h.server.deployments.by_name["fake"].dispatcher
    call: Any = Client(h).inference.Generate(request("!stall"))
    await h.until(lambda: bool(dispatcher.load().running))
    load = await h.admin.GetLoad(admin_pb2.GetLoadRequest())
    assert [t.tenant for t in load.models[0].tenants] == [tenant]
    (entry,) = dispatcher._core.entries()
    assert entry.account.name == (tenant or "ipv4:127.0.0.1")
    call.cancel()
    await h.until_idle()


async def test_requests_without_a_deadline_get_the_configured_one(serve: Serve) -> None:
    h = await serve(protocols={"openengine": {"enabled": True, "deadline_s": 0.3}})
    error = await refused(Client(h).generate(request("!stall")))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    h2 = await serve({"step_s": 0.05}, protocols={"openengine": {"enabled": True, "deadline_s": 0.4}})
    messages = await Client(h2).generate(request(stopping={"max_tokens": 3000}))
    assert messages[-1].error.code == error_pb2.ERROR_CODE_CANCELLED


async def test_a_cancelled_call_stops_the_engine(serve: Serve) -> None:
    h = await serve({"step_s": 0.01}, protocols=ON)
    call: Any = Client(h).inference.Generate(request(stopping={"max_tokens": 3000}))
    await call.read()
    call.cancel()
    await h.until_idle()


# ---- Abort ----


async def test_an_abort_ends_each_output_as_cancelled(serve: Serve) -> None:
    h = await serve({"step_s": 0.01}, protocols=ON)
    client = Client(h)
    call: Any = client.inference.Generate(
        request(sampling={"num_sequences": 2, "temperature": 1}, stopping={"max_tokens": 3000})
    )
    await call.read()
    abort = lifecycle_pb2.AbortRequest(request_id="r1")
    answer = await client.control.Abort(abort)
    assert answer.status == lifecycle_pb2.ABORT_STATUS_ABORTED
    rest = []
    while (message := await call.read()) is not grpc.aio.EOF:
        rest.append(message)
    ends = [m.finished for m in rest if m.HasField("finished")]
    assert [(e.output_index, e.reason) for e in ends] == [
        (0, generation_pb2.FINISH_REASON_CANCELLED),
        (1, generation_pb2.FINISH_REASON_CANCELLED),
    ]
    assert await call.code() is grpc.StatusCode.OK
    answer = await client.control.Abort(abort)
    assert answer.status == lifecycle_pb2.ABORT_STATUS_ALREADY_FINISHED
    error = await refused(client.control.Abort(lifecycle_pb2.AbortRequest(request_id="never")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_an_abort_reaches_a_request_that_waits(serve: Serve) -> None:
    h = await serve({"max_num_seqs": 1}, protocols=ON)
    client = Client(h)
    first: Any = client.inference.Generate(Request(request_id="first", prompt="!stall"))
    dispatcher = h.server.deployments.by_name["fake"].dispatcher
    await h.until(lambda: dispatcher.load().running == 1)
    waits = asyncio.create_task(client.generate(request()))
    await h.until(lambda: dispatcher.load().waiting + dispatcher.load().running == 2)
    answer = await client.control.Abort(lifecycle_pb2.AbortRequest(request_id="r1"))
    assert answer.status == lifecycle_pb2.ABORT_STATUS_ABORTED
    assert (await refused(waits)).code() is grpc.StatusCode.CANCELLED
    first.cancel()
    await h.until_idle()


async def test_an_abort_touches_requests_of_this_protocol_alone(serve: Serve) -> None:
    h = await serve(protocols=ON)
    client = Client(h)
    options = ours.RequestOptions(request_id="mine")
    mine: Any = h.inference.Generate(ours.GenerateRequest(text="!stall", options=options))
    theirs: Any = client.inference.Generate(request("!stall"))
    dispatcher = h.server.deployments.by_name["fake"].dispatcher
    await h.until(lambda: dispatcher.load().running == 2)
    error = await refused(client.control.Abort(lifecycle_pb2.AbortRequest(request_id="mine")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    answer = await client.control.Abort(lifecycle_pb2.AbortRequest(all_requests={}))
    assert answer.status == lifecycle_pb2.ABORT_STATUS_ABORTED
    assert dispatcher.load().request_ids == ("mine",)
    mine.cancel()
    theirs.cancel()
    await h.until_idle()


async def test_what_changes_others_needs_the_admins_leave(serve: Serve) -> None:
    h = await serve(protocols=ON, admin={"token": "secret"})
    control = Client(h).control
    for call, message in (
        (control.Abort, lifecycle_pb2.AbortRequest(all_requests={})),
        (control.GetLoad, server_pb2.GetLoadRequest()),
    ):
        assert (await refused(call(message))).code() is grpc.StatusCode.PERMISSION_DENIED
        await call(message, metadata=(("authorization", "Bearer secret"),))
    for call, message in (
        (control.LoadLora, lora_pb2.LoadLoraRequest(adapter={"lora_name": "a", "source_path": "/etc"})),
        (control.UnloadLora, lora_pb2.UnloadLoraRequest(lora_name="a")),
    ):
        assert (await refused(call(message))).code() is grpc.StatusCode.PERMISSION_DENIED
    stream: Any = control.SubscribeKvEvents(kv_pb2.SubscribeKvEventsRequest())
    assert (await refused(stream.read())).code() is grpc.StatusCode.PERMISSION_DENIED
    for target in ({}, {"kv_session": {}}):
        error = await refused(control.Abort(lifecycle_pb2.AbortRequest(**target)))
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)


# ---- discovery ----


GUIDES: dict[int, dict[str, Any]] = {
    model_pb2.GUIDED_DECODING_MODE_JSON_SCHEMA: {"json_schema": '{"type": "object"}'},
    model_pb2.GUIDED_DECODING_MODE_JSON_OBJECT: {"json_object": {}},
    model_pb2.GUIDED_DECODING_MODE_REGEX: {"regex": "a"},
    model_pb2.GUIDED_DECODING_MODE_EBNF_GRAMMAR: {"ebnf_grammar": 'root ::= "a"'},
    model_pb2.GUIDED_DECODING_MODE_STRUCTURAL_TAG: {"structural_tag": "{}"},
    model_pb2.GUIDED_DECODING_MODE_CHOICE: {"choice": {"choices": ["yes", "no"]}},
}


@pytest.mark.parametrize(
    "lacks", ["", "logprobs", "prompt_logprobs", "choice", "multiple_outputs", "priority"]
)
async def test_discovery_tells_what_generate_takes_and_no_more(serve: Serve, lacks: str) -> None:
    full = ["generate", "logprobs", "prompt_logprobs", "choice", "seed", "multiple_outputs", "priority"]
    h = await serve({"capabilities": [c for c in full if c != lacks]}, protocols=ON)
    client = Client(h)
    info = await client.control.GetModelInfo(model_pb2.GetModelInfoRequest())
    can = info.generation

    async def takes(asked: Request, *metadata: tuple[str, str]) -> bool:
        try:
            await client.generate(asked, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            code = grpc.StatusCode
            assert error.code() in (code.UNIMPLEMENTED, code.INVALID_ARGUMENT, code.NOT_FOUND)
            return False
        return True

    top = {"output_candidates": {"top_n": can.output_logprobs.max_top_n or 1}}
    assert await takes(request(response=top)) == can.output_logprobs.supported
    top = {"prompt_candidates": {"top_n": can.prompt_logprobs.max_top_n or 1}}
    assert await takes(request(response=top)) == can.prompt_logprobs.supported
    for mode, guide in GUIDES.items():
        assert await takes(request(guided=guide)) == (mode in can.guided_decoding.modes), guide
    assert can.guided_decoding.supported == bool(can.guided_decoding.modes)
    many = {"num_sequences": can.max_num_sequences, "temperature": 1}
    assert await takes(request(sampling=many))
    assert not await takes(request(sampling={**many, "num_sequences": can.max_num_sequences + 1}))
    assert await takes(request(), ("openengine-priority", "5")) == can.supports_priority
    assert await takes(request(stopping={"max_tokens": 3, "include_stop_in_output": True}))
    assert await takes(request(kv={"bypass_prefix_cache": True})) == can.supports_prefix_cache_bypass
    assert await takes(request(lora_name="x")) == info.supports_lora
    assert await takes(request(media=[{"url": "u"}])) == info.supports_multimodal
    long = request("x", stopping={"max_tokens": info.max_output_tokens - 1})
    assert await takes(long)
    ids = [97] * (info.max_context_length - 1)
    assert await takes(Request(token_ids={"ids": ids}, stopping={"max_tokens": 1}))
    assert not await takes(Request(token_ids={"ids": [*ids, 97]}, stopping={"max_tokens": 1}))


async def test_models_go_by_public_name_or_source(serve: Serve) -> None:
    deployments = {
        name: {"engine": "fake", "model": source}
        for name, source in (("a", "/models/one"), ("b", "/models/two"), ("c", "/models/two"))
    }
    h = await serve(protocols=ON, deployments=deployments)
    control = Client(h).control
    info = await control.GetModelInfo(model_pb2.GetModelInfoRequest(model="/models/one"))
    assert (info.served_model_name, info.model_id) == ("a", "/models/one")
    assert "/models/one" in info.served_model_aliases
    for model, code in (
        ("/models/two", grpc.StatusCode.INVALID_ARGUMENT),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("d", grpc.StatusCode.NOT_FOUND),
    ):
        error = await refused(control.GetModelInfo(model_pb2.GetModelInfoRequest(model=model)))
        assert error.code() is code
    messages = await Client(h).generate(request(model="/models/one"))
    assert events(messages)[-1] == "finished"


async def test_several_deployments_tell_what_all_of_them_can(serve: Serve) -> None:
    deployments = {
        "a": {
            "engine": "fake",
            "options": {"capabilities": ["generate", "logprobs"], "max_context_tokens": 100},
        },
        "b": {"engine": "fake", "options": {"capabilities": ["generate", "choice"]}},
    }
    h = await serve(protocols=ON, deployments=deployments, routes={"m": {"weights": {"a": 1, "b": 1}}})
    info = await Client(h).control.GetModelInfo(model_pb2.GetModelInfoRequest())
    assert not info.generation.output_logprobs.supported
    assert not info.generation.guided_decoding.supported
    assert info.max_context_length == 100


async def test_the_server_and_its_load_are_described(serve: Serve) -> None:
    h = await serve({"max_num_seqs": 7, "num_blocks": 50, "block_size": 8}, protocols=ON)
    control = Client(h).control
    info = await control.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert (info.schema_revision, info.minimum_client_revision) == (1, 1)
    assert info.engine_role == server_pb2.ENGINE_ROLE_AGGREGATED
    assert list(info.supported_models) == ["fake"]
    assert info.kv_connector.HasField("enabled") and not info.kv_connector.enabled
    capacity = info.capacity
    assert (capacity.kv_block_size, capacity.total_kv_blocks, capacity.max_running_requests) == (8, 50, 7)
    call: Any = Client(h).inference.Generate(request("!stall"))
    await h.until(lambda: bool(h.server.deployments.by_name["fake"].dispatcher.load().running))
    load = await control.GetLoad(server_pb2.GetLoadRequest(include_per_rank=True))
    assert load.instance_id == info.instance_id
    assert (load.running_requests, load.queued_requests, load.total_kv_blocks) == (1, 0, 50)
    assert (load.ranks[0].running_requests, load.ranks[0].total_kv_blocks) == (1, 50)
    call.cancel()


async def test_health_follows_the_engine(serve: Serve) -> None:
    h = await serve({"load_s": 0.5}, protocols=ON, ready=False)
    control = Client(h).control

    async def state(**fields: Any) -> int:
        return (await control.Health(lifecycle_pb2.HealthRequest(**fields))).state

    assert await state() == lifecycle_pb2.HEALTH_STATE_STARTING
    error = await refused(control.GetModelInfo(model_pb2.GetModelInfoRequest()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "RetryInfo" in details(error)
    await h.until_ready()
    assert await state() == lifecycle_pb2.HEALTH_STATE_READY
    assert await state(model="fake", include_inference_probe=True) == lifecycle_pb2.HEALTH_STATE_READY
    assert await state(role=server_pb2.ENGINE_ROLE_PREFILL) == lifecycle_pb2.HEALTH_STATE_NOT_READY
    h.server.deployments.drain()
    assert await state() == lifecycle_pb2.HEALTH_STATE_DRAINING


# ---- adapters and KV events ----


async def test_adapters_are_loaded_listed_and_removed(serve_full: Harness) -> None:
    client = Client(serve_full)
    adapter = {"lora_name": "french", "source_path": "/adapters/french"}
    loaded = await client.control.LoadLora(lora_pb2.LoadLoraRequest(adapter=adapter))
    assert (loaded.adapter.lora_name, loaded.already_loaded) == ("french", False)
    listed = await client.control.ListLoras(lora_pb2.ListLorasRequest())
    assert [a.source_path for a in listed.adapters] == ["/adapters/french"]
    assert listed.adapters[0].lora_id == loaded.adapter.lora_id > 0
    gone = await client.control.UnloadLora(lora_pb2.UnloadLoraRequest(lora_name="french"))
    assert gone.adapter.source_path == "/adapters/french"
    bad = lora_pb2.LoadLoraRequest(adapter={"lora_name": "x", "source_path": "relative"})
    error = await refused(client.control.LoadLora(bad))
    assert details(error)["BadRequest"].field_violations[0].field == "adapter.source_path"


async def test_what_names_no_model_is_refused_where_there_are_several(serve: Serve) -> None:
    h = await serve(protocols=ON, deployments={"a": {"engine": "fake"}, "b": {"engine": "fake"}})
    control = Client(h).control
    watch: Any = control.SubscribeKvEvents(kv_pb2.SubscribeKvEventsRequest())
    load = lora_pb2.LoadLoraRequest(adapter={"lora_name": "x", "source_path": "/x"})
    for call in (
        control.ListLoras(lora_pb2.ListLorasRequest()),
        control.LoadLora(load),
        control.UnloadLora(lora_pb2.UnloadLoraRequest(lora_name="x")),
        watch.read(),
    ):
        error = await refused(call)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert details(error)["ErrorInfo"].reason == "SEVERAL_MODELS"


async def test_a_stream_goes_on_when_its_model_loses_its_route_and_its_deployment(serve: Serve) -> None:
    options = {"step_s": 0.002}
    h = await serve(
        protocols=ON,
        deployments={"a": {"engine": "fake", "options": options}, "b": {"engine": "fake"}},
    )
    call: Any = Client(h).inference.Generate(request(model="a", stopping={"max_tokens": 200}))
    first = await call.read()
    route = routing_pb2.SetRouteRequest(route=routing_pb2.Route(model="a"), remove=True)
    await h.admin.SetRoute(route)
    removal = h.admin.RemoveDeployment(routing_pb2.RemoveDeploymentRequest(name="a"))
    messages = [first]
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    assert set(events(messages)) == {"token", "finished"}
    assert (await removal).finished == 1


async def test_adapters_are_unimplemented_where_there_are_none(serve: Serve) -> None:
    h = await serve(protocols=ON)
    error = await refused(Client(h).control.ListLoras(lora_pb2.ListLorasRequest()))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_kv_events_begin_with_what_is_held_if_asked(serve_full: Harness) -> None:
    control = Client(serve_full).control
    assert not (await control.GetKvEventSources(kv_pb2.GetKvEventSourcesRequest())).sources
    call: Any = control.SubscribeKvEvents(kv_pb2.SubscribeKvEventsRequest(include_snapshot=True))
    batch = (await call.read()).batch
    cleared, stored = batch.events
    assert cleared.HasField("all_blocks_cleared")
    block = stored.block_stored
    assert ([h.value for h in block.block_hashes], block.parent_block_hash.value) == ([b"\x02"], b"\x01")
    assert (list(block.token_ids), block.block_size) == ([7, 8], 2)
    assert ([list(k.values) for k in block.extra_keys], block.lora_name) == ([["salt"]], "lora")
    assert block.medium == kv_pb2.STORAGE_MEDIUM_GPU
    call.cancel()
    again: Any = control.SubscribeKvEvents(kv_pb2.SubscribeKvEventsRequest(start_sequence_number=2))
    batch = (await again.read()).batch
    assert (batch.sequence_number, batch.events[0].block_removed.block_hashes[0].value) == (2, b"\x01")
    await serve_full.engines[-1].stop()
    assert (await again.read()).error.code == error_pb2.ERROR_CODE_INTERNAL
    assert await again.read() is grpc.aio.EOF
    wrong: Any = control.SubscribeKvEvents(kv_pb2.SubscribeKvEventsRequest(data_parallel_ranks=[1]))
    assert (await refused(wrong.read())).code() is grpc.StatusCode.NOT_FOUND


# ---- pure ----


def test_every_field_of_ours_has_its_name_in_theirs() -> None:
    known = set(requests._SAMPLING)
    for field in ours.GenerateRequest.DESCRIPTOR.fields_by_name["sampling"].message_type.fields:
        name = f"sampling.{field.name}"
        is_sent = field.name in known or requests._their_field(name) != name
        unsent = ("logit_bias", "bad_words", "allowed_token_ids", "skip_special_tokens")
        assert is_sent or field.name in unsent, name


def test_the_setting_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "twinjet.toml"
    path.write_text(f"[deployments.a]\nengine = 'fake'\n[protocols.openengine]\ntenant = '{'t' * 129}'\n")
    with pytest.raises(config.ConfigError, match=r"protocols\.openengine\.tenant"):
        config.load(path, {}, {})
    loaded = config.load(None, {"deployments": {"a": {}}}, {"TWINJET_PROTOCOLS__OPENENGINE__ENABLED": "true"})
    assert loaded.protocols.openengine.enabled


def test_requests_of_random_content_translate_or_are_refused() -> None:
    """Whatever the bytes, only our own errors come out."""
    import random

    from twinjet.errors import TwinjetError

    rng = random.Random(5)
    kind = message_factory.GetMessageClass(Request.DESCRIPTOR)
    assert kind is Request
    for _ in range(300):
        message = Request()
        _fill(message, rng, 0)
        try:
            requests.generate_request(message, {}, model="m", tenant="t")
            requests.wants_text(message)
        except TwinjetError:
            continue


def _fill(message: Any, rng: Any, depth: int) -> None:
    if message.DESCRIPTOR.full_name.startswith("google."):
        json.dumps(depth)
        return
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.4:
            continue
        count = rng.randint(1, 2) if field.is_repeated else 1
        for _ in range(count):
            if field.message_type is not None:
                target = getattr(message, field.name)
                child = target.add() if field.is_repeated else target
                if not field.is_repeated:
                    child.SetInParent()
                if depth < 3:
                    _fill(child, rng, depth + 1)
                continue
            value = {
                8: rng.random() < 0.5, 9: rng.choice(["", "a", "x" * 200]), 12: b"z", 1: rng.choice([0.0, -1e9, 0.5]),
            }.get(field.type, rng.choice([0, 1, 2, 2**31 - 1]))  # fmt: skip
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
