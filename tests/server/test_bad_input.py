"""Each mistake gets one clear status that names the field, and leaves the server serving."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from tests.server.harness import Harness, Serve, collect, details
from twinjet.engines.fake import FakeTokenizer
from twinjet.v1 import generation_pb2, routing_pb2, sampling_pb2, service_pb2_grpc

Request = generation_pb2.GenerateRequest
Chat = generation_pb2.ChatRequest
Sampling = sampling_pb2.SamplingParams
Constraint = sampling_pb2.Constraint


def _text(**sampling: Any) -> generation_pb2.GenerateRequest:
    return Request(text="x", sampling=Sampling(**sampling))


CASES: list[tuple[str, Any, str, str]] = [
    ("empty request", Request(), "text", "set exactly one"),
    ("text and tokens", Request(text="x", token_ids=[1]), "text", "both are set"),
    (
        "negative rank",
        Request(text="x", options={"data_parallel_rank": -1}),
        "options.data_parallel_rank",
        "allowed: 0 or more",
    ),
    (
        "retention above 100",
        Request(text="x", options={"kv_retention": {"prompt_priority": 101}}),
        "options.kv_retention.prompt_priority",
        "allowed: 0 to 100",
    ),
    (
        "retention for no time",
        Request(text="x", options={"kv_retention": {"duration": {"seconds": 0}}}),
        "options.kv_retention.duration",
        "above 0",
    ),
    (
        "handoff of nothing",
        Request(text="x", options={"handoff": {"seed": 1}}),
        "options.handoff.state",
        "allowed: 1 to 262144",
    ),
    (
        "handoff too large",
        Request(text="x", options={"handoff": {"state": b"x" * (256 * 1024 + 1)}}),
        "options.handoff.state",
        "262145 bytes",
    ),
    (
        "handoff to a prefill",
        Request(text="x", options={"handoff": {"state": b"x"}, "prefill_only": True}),
        "options.handoff",
        "set one of them",
    ),
    ("negative temperature", _text(temperature=-1), "sampling.temperature", "0 to 100"),
    ("NaN temperature", _text(temperature=math.nan), "sampling.temperature", "0 to 100"),
    ("infinite temperature", _text(temperature=math.inf), "sampling.temperature", "0 to 100"),
    ("top_p of 0", _text(top_p=0), "sampling.top_p", "above 0 to 1"),
    ("top_p above 1", _text(top_p=1.5), "sampling.top_p", "above 0 to 1"),
    ("top_k of -2", _text(top_k=-2), "sampling.top_k", "-1 to"),
    ("min_p above 1", _text(min_p=2), "sampling.min_p", "0 to 1"),
    ("repetition_penalty of 0", _text(repetition_penalty=0), "sampling.repetition_penalty", "0.01 to 100"),
    ("subnormal penalty", _text(repetition_penalty=1e-45), "sampling.repetition_penalty", "0.01 to 100"),
    ("presence_penalty of 3", _text(presence_penalty=3), "sampling.presence_penalty", "-2 to 2"),
    ("n of 0", _text(n=0), "sampling.n", "1 to 64"),
    ("absurd n", _text(n=2**31 - 1), "sampling.n", "1 to 64"),
    ("greedy n", _text(n=2, temperature=0), "sampling.n", "greedy"),
    ("max_tokens of 0", _text(max_tokens=0), "sampling.max_tokens", "1 to"),
    ("absurd max_tokens", _text(max_tokens=2**31 - 1), "sampling.max_tokens", "1 to 4096"),
    ("max_tokens beyond the context", _text(max_tokens=4095), "sampling.max_tokens", "1 to 4094"),
    ("min above max tokens", _text(min_tokens=9, max_tokens=8), "sampling.min_tokens", "0 to 8"),
    ("absurd logprobs", _text(logprobs=100_000), "sampling.logprobs", "0 to 20"),
    ("10,000 stops", _text(stop=["s"] * 10_000), "sampling.stop", "at most 64"),
    ("empty stop", _text(stop=[""]), "sampling.stop", "empty"),
    ("long stop", _text(stop=["s" * 2000]), "sampling.stop", "1024 bytes"),
    ("bias outside vocabulary", _text(logit_bias={99_999: 1.0}), "sampling.logit_bias", "0 to 257"),
    ("infinite bias", _text(logit_bias={1: math.inf}), "sampling.logit_bias", "-100 to 100"),
    ("stop token outside", _text(stop_token_ids=[-1]), "sampling.stop_token_ids", "0 to 257"),
    ("duplicate allowed ids", _text(allowed_token_ids=[1, 1]), "sampling.allowed_token_ids", "duplicates"),
    ("prompt token outside", Request(token_ids=[1, 258]), "token_ids", "0 to 257"),
    ("negative prompt token", Request(token_ids=[-1]), "token_ids", "0 to 257"),
    (
        "prompt longer than the context",
        Request(text="x" * 5000),
        "text",
        "5001 tokens; the model's context is 4096",
    ),
    ("10 MB prompt", Request(text="x" * 10_000_000), "text", "10000000 bytes; at most 4194304"),
    ("constraint without kind", _text(constraint=Constraint()), "sampling.constraint", "json_schema"),
    ("empty regex", _text(constraint=Constraint(regex="")), "sampling.constraint.regex", "empty"),
    (
        "choices of 257 KiB together",
        _text(constraint=Constraint(choice={"values": ["x" * 1024] * 257})),
        "sampling.constraint.choice.values",
        "263168 bytes together; at most 262144",
    ),
    ("empty choice", _text(constraint=Constraint(choice={})), "sampling.constraint.choice", "at least one"),
    (
        "priority out of range",
        Request(text="x", options={"priority": 101}),
        "options.priority",
        "-100 to 100",
    ),
    (
        "request id with spaces",
        Request(text="x", options={"request_id": "a b"}),
        "options.request_id",
        "printable",
    ),
    ("long tenant", Request(text="x", options={"tenant": "t" * 200}), "options.tenant", "128 bytes"),
    ("chat without messages", Chat(), "messages", "at least one"),
    ("unknown role", Chat(messages=[{"role": "wizard"}]), "messages[0].role", "system, user"),
    (
        "nothing to continue",
        Chat(messages=[{"role": "user"}], continue_final_message=True),
        "continue_final_message",
        "assistant",
    ),
]


def _call(h: Harness, request: Any) -> Any:
    return h.inference.Chat(request) if isinstance(request, Chat) else h.inference.Generate(request)


async def _still_serves(h: Harness) -> None:
    request = Request(text="still there?", sampling=Sampling(max_tokens=1))
    assert (await collect(h.inference.Generate(request)))[-1].HasField("summary")
    await h.until_idle()


async def test_each_mistake_names_its_field_and_range(serve: Serve) -> None:
    h = await serve(
        channel_options=[("grpc.max_send_message_length", -1)], server={"max_request_bytes": 16 << 20}
    )
    for name, request, field, message in CASES:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(_call(h, request))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
        found = details(caught.value)
        assert found["ErrorInfo"].domain == "twinjet", name
        violations = {v.field: v.description for v in found["BadRequest"].field_violations}
        described = next((d for f, d in violations.items() if f.startswith(field)), None)
        assert described is not None and message in described, f"{name}: {violations}"
    await _still_serves(h)


async def test_all_mistakes_are_told_at_once(serve: Serve) -> None:
    h = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(h.inference.Generate(_text(temperature=-1, top_p=7, min_p=-1)))
    violations = details(caught.value)["BadRequest"].field_violations
    assert [v.field for v in violations] == ["sampling.temperature", "sampling.top_p", "sampling.min_p"]


async def test_an_unknown_model_is_not_found_and_the_models_are_named(serve: Serve) -> None:
    h = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(h.inference.Generate(Request(text="x", model="gpt")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "fake" in (caught.value.details() or "")
    assert details(caught.value)["ErrorInfo"].reason == "MODEL_NOT_FOUND"


async def test_a_refused_request_leaves_nothing_for_the_garbage_collector(serve: Serve) -> None:
    h = await serve()
    too_long, endless = "x" * 200_000, "!stall" + "x" * 3000

    def num_left() -> int:
        # Not isinstance(), which asks objects of other packages for their class; some answer with a warning.
        return sum(type(thing) in (Request, Chat) and thing.ByteSize() > 3000 for thing in gc.get_objects())

    cancelled = [Request(text=endless), Request(text=endless, options={"priority": 1})]
    ours = [
        Request(text=too_long),
        Request(text=too_long, options={"priority": 1}),
        Chat(messages=[{"role": "user", "content": too_long}]),
    ]
    gc.collect()
    before = num_left()
    gc.disable()
    try:
        for request in ours:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError):
                    await collect(_call(h, request))
        await h.until(lambda: num_left() <= before)
        calls = [_call(h, request) for request in cancelled for _ in range(3)]
        for call in calls:
            await call.initial_metadata()
            call.cancel()
        await h.until_idle()
        await h.until(lambda: num_left() <= before)
    finally:
        gc.enable()


async def test_a_field_whose_name_holds_a_name_of_the_requests_is_told_in_short(serve: Serve) -> None:
    h = await serve()
    route = routing_pb2.Route(model="m", weights={"d" * (1 << 20): -1.0})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.admin.SetRoute(routing_pb2.SetRouteRequest(route=route))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    fields = [violation.field for violation in details(caught.value)["BadRequest"].field_violations]
    assert fields[0].startswith("route.weights[ddd") and max(map(len, fields)) <= 200


async def test_the_log_holds_no_more_of_a_bad_name_than_the_answer(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    h = await serve()
    caplog.set_level("INFO", "twinjet.server")
    for request in (Request(text="x", model="m" * (1 << 20)), Chat(model="m" * (1 << 20))):
        with pytest.raises(grpc.aio.AioRpcError):
            await collect(_call(h, request))
    told = [record.getMessage() for record in caplog.records]
    assert sum("NotFound" in message for message in told) == 2
    assert max(map(len, told)) < 600


async def test_a_running_request_id_exists_already(serve: Serve) -> None:
    h = await serve({"step_s": 0.01})
    request = Request(text="x", options={"request_id": "same"})
    first = h.inference.Generate(request)
    await first.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(h.inference.Generate(request))
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    first.cancel()
    await h.until_idle()


MISSING: list[tuple[str, Callable[[], Any], str]] = [
    ("regex", lambda: _text(constraint=Constraint(regex="a+")), "regex"),
    ("schema", lambda: _text(constraint=Constraint(json_schema="{}")), "json_schema"),
    ("allowed ids", lambda: _text(allowed_token_ids=[1]), "allowed_token_ids"),
    ("tag", lambda: _text(constraint=Constraint(structural_tag="{}")), "structural_tag"),
    ("rank", lambda: Request(text="x", options={"data_parallel_rank": 0}), "data_parallel_rank"),
    ("retention", lambda: Request(text="x", options={"kv_retention": {}}), "kv_retention"),
    ("prefill", lambda: Request(text="x", options={"prefill_only": True}), "prefill_only"),
    ("handoff", lambda: Request(text="x", options={"handoff": {"state": b"x"}}), "handoff"),
    ("pictures", lambda: Chat(messages=[{"role": "user", "images": [b"png"]}]), "image_input"),
    ("sound", lambda: Chat(messages=[{"role": "user", "audio": [b"wav"]}]), "audio_input"),
]


@pytest.mark.parametrize(("request_of", "capability"), [m[1:] for m in MISSING], ids=[m[0] for m in MISSING])
async def test_a_missing_capability_is_unimplemented_and_named(
    serve: Serve, request_of: Callable[[], Any], capability: str
) -> None:
    h = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(_call(h, request_of()))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert details(caught.value)["ErrorInfo"].metadata["capability"] == capability


def _raw(h: Harness, method: str, data: bytes) -> Any:
    return h.channel.unary_stream(f"/twinjet.v1.InferenceService/{method}")(data)


async def test_invalid_utf8_is_the_clients_mistake_and_names_the_field(serve: Serve) -> None:
    h = await serve()
    for method, data, field in [
        ("Generate", b"\x12\x02\xff\xfe", "text"),
        ("Generate", b"\x2a\x05\x1a\x03a\xffb", "options.tenant"),
        ("Chat", b"\x12\x04\x12\x02\xff\xfe", "messages.content"),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(_raw(h, method, data))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        violation = details(caught.value)["BadRequest"].field_violations[0]
        assert (violation.field, violation.description) == (field, "is not valid UTF-8")
    await _still_serves(h)


async def test_bytes_that_are_no_message_are_the_clients_mistake(serve: Serve) -> None:
    h = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(_raw(h, "Generate", b"\xff\xff\xff\xff"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "GenerateRequest" in details(caught.value)["BadRequest"].field_violations[0].description
    await _still_serves(h)


async def test_every_service_method_answers(serve: Serve) -> None:
    """No method of the contract is missing from the server: gRPC's own UNIMPLEMENTED carries no details."""
    h = await serve()
    for stub_class in (
        service_pb2_grpc.InferenceServiceStub,
        service_pb2_grpc.ModelServiceStub,
        service_pb2_grpc.AdminServiceStub,
    ):
        stub = stub_class(h.channel)
        for name, method in vars(stub).items():
            if name in ("Drain",):
                continue
            try:
                call = method(_empty_request(stub_class.__name__, name))
                await (collect(call) if hasattr(call, "read") else call)
            except grpc.aio.AioRpcError as error:
                assert details(error)["ErrorInfo"].domain == "twinjet", name


def _empty_request(stub: str, method: str) -> Any:
    from google.protobuf import message_factory

    from twinjet.v1 import service_pb2

    service = service_pb2.DESCRIPTOR.services_by_name[stub.removesuffix("Stub")]
    return message_factory.GetMessageClass(service.methods_by_name[method].input_type)()


@pytest.mark.parametrize("name", ["m" * (1 << 20), "🌶" * 100_000])
async def test_an_error_that_repeats_what_was_sent_still_fits_into_trailers(serve: Serve, name: str) -> None:
    h = await serve()
    for call in (
        h.inference.Generate(Request(model=name, text="x")),
        h.inference.Generate(Request(text="x", options=generation_pb2.RequestOptions(adapter="🌶" * 32))),
        h.inference.Chat(Chat(messages=[generation_pb2.ChatMessage(role=name[:1000], content="x")] * 100)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
        assert "ErrorInfo" in details(caught.value)


async def test_a_prompt_far_beyond_the_context_is_refused_by_its_beginning(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = await serve({"max_context_tokens": 100})
    lengths: list[int] = []
    encode = FakeTokenizer.encode

    def counted(self: FakeTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(FakeTokenizer, "encode", counted)
    monkeypatch.setattr(FakeTokenizer, "encode_rendered", None)
    text = "a" * 1_000_000
    for call, field in (
        (h.inference.Generate(Request(text=text)), "text"),
        (
            h.inference.Chat(Chat(messages=[generation_pb2.ChatMessage(role="user", content=text)])),
            "messages",
        ),
        (h.inference.Generate(Request(token_ids=[1] * 900_000)), "token_ids"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = details(caught.value)["BadRequest"].field_violations
        assert violation.field == field
        assert "the model's context is 100" in violation.description
    assert lengths == [800, 800]


async def test_a_text_that_only_begins_with_many_tokens_is_no_mistake(serve: Serve) -> None:
    h = await serve({"max_context_tokens": 1000})
    (answer,) = [
        m
        for m in await collect(h.inference.Generate(Request(text="a" * 900, sampling=Sampling(max_tokens=1))))
        if m.HasField("summary")
    ]
    assert answer.summary.usage.prompt_tokens == 901
