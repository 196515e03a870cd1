"""What no friendly client sends: each call gets one status that names the field, and costs no more than it should."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tests.server.harness import Harness, Serve, collect, details
from tests.server.hostile import ALLOWED, BIAS, CASES, SAMPLING, STOP, TOKEN_IDS, Answer, Case
from twinjet.errors import InvalidRequest
from twinjet.protobuf_bytes import field, number_field, varint
from twinjet.request import MAX_ALLOWED_IDS
from twinjet.server import convert, wire
from twinjet.server.inference import MAX_DETOKENIZED_IDS
from twinjet.server.wire import MAX_NUMBERS, MAX_VALUES, Malformed, deserializer
from twinjet.v1 import generation_pb2, routing_pb2, sampling_pb2, tokenization_pb2

_NEED_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


async def _ask(h: Harness, case: Case) -> Answer:
    try:
        await collect(h.channel.unary_stream(case.path)(case.make()))
    except grpc.aio.AioRpcError as error:
        return Answer(error)
    return Answer(None)


async def test_every_hostile_request_is_answered_by_the_field_that_is_wrong(serve: Serve) -> None:
    h = await serve(channel_options=[("grpc.max_send_message_length", -1)])
    asked = [
        case
        for case in CASES
        if not case.field.endswith(_NEED_GRAMMARS) and case.code != "FAILED_PRECONDITION"
    ]
    answers = [await _ask(h, case) for case in asked]
    wrong = {
        case.name: str(answer)
        for case, answer in zip(asked, answers, strict=True)
        if answer.code != case.code or not any(f.startswith(case.field) for f in answer.fields or [""])
    }
    assert wrong == {}
    await h.until_idle()


@pytest.mark.parametrize(
    ("message_class", "data", "path"),
    [
        (
            generation_pb2.GenerateRequest,
            field(SAMPLING, field(STOP, b"") * (MAX_VALUES + 1)),
            "sampling.stop",
        ),
        (generation_pb2.GenerateRequest, field(SAMPLING, b"") * (MAX_VALUES + 1), "sampling"),
        (generation_pb2.GenerateRequest, number_field(999, 1) * (MAX_VALUES + 1), "GenerateRequest"),
        (generation_pb2.GenerateRequest, field(TOKEN_IDS, b"\x01" * (MAX_NUMBERS + 1)), "token_ids"),
        (generation_pb2.GenerateRequest, number_field(TOKEN_IDS, 1) * (MAX_NUMBERS + 1), "token_ids"),
        (
            generation_pb2.GenerateRequest,
            field(SAMPLING, field(ALLOWED, b"\x01" * (MAX_NUMBERS + 1))),
            "sampling.allowed_token_ids",
        ),
        (
            generation_pb2.GenerateRequest,
            field(SAMPLING, field(BIAS, number_field(1, 1)) * MAX_VALUES),
            "sampling.logit_bias",
        ),
        (generation_pb2.ChatRequest, field(2, b"") * (MAX_VALUES + 1), "messages"),
        (
            routing_pb2.AddDeploymentRequest,
            field(2, field(1, field(1, b"k") + field(2, field(6, field(1, b"") * (MAX_VALUES + 1))))),
            "settings.fields",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message_of_too_many_values_is_refused_before_it_is_parsed(
    message_class: Any, data: bytes, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_explain", lambda *_: pytest.fail("it was parsed"))
    answer = deserializer(message_class)(data)
    assert isinstance(answer, Malformed)
    (violation,) = answer.violations
    assert violation.field == path


@pytest.mark.parametrize(
    "data",
    [
        field(SAMPLING, field(STOP, b"s") * (MAX_VALUES - 1)),
        field(TOKEN_IDS, varint(40_000) * MAX_NUMBERS),
        field(2, b"\xc3\xa4" * (4 << 20)),
    ],
    ids=["values", "numbers", "text"],
)
def test_a_message_of_as_much_as_is_allowed_is_parsed(data: bytes) -> None:
    parsed = deserializer(generation_pb2.GenerateRequest)(data)
    assert isinstance(parsed, generation_pb2.GenerateRequest)
    assert parsed.ByteSize() == len(data)


def test_of_many_texts_that_are_no_utf8_only_so_many_are_told_of_as_fit_a_status() -> None:
    answer = deserializer(generation_pb2.GenerateRequest)(field(SAMPLING, field(STOP, b"\xff") * 20_000))
    assert isinstance(answer, Malformed)
    assert [v.field for v in answer.violations] == ["sampling.stop"] * 16


def test_lists_that_are_too_long_are_all_told_of_before_any_is_copied() -> None:
    message = sampling_pb2.SamplingParams(
        stop=["s"] * 65,
        stop_token_ids=[1] * 65,
        bad_words=["b"] * 257,
        allowed_token_ids=[1] * (MAX_ALLOWED_IDS + 1),
        logit_bias=dict.fromkeys(range(1025), 1.0),
    )
    with pytest.raises(InvalidRequest) as caught:
        convert.sampling_overrides(message)
    found = {v.field.removeprefix("sampling."): v.message for v in caught.value.violations}
    assert found == {
        name: f"{most + 1} entries; at most {most} are allowed"
        for name, most in {
            "stop": 64,
            "stop_token_ids": 64,
            "bad_words": 256,
            "logit_bias": 1024,
            "allowed_token_ids": MAX_ALLOWED_IDS,
        }.items()
    }


async def test_more_ids_than_anybody_needs_are_not_detokenized(serve: Serve) -> None:
    h = await serve()
    request = tokenization_pb2.DetokenizeRequest(token_ids=[65] * (MAX_DETOKENIZED_IDS + 1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.inference.Detokenize(request)
    assert details(caught.value)["BadRequest"].field_violations[0].field == "token_ids"
    del request.token_ids[-1]
    async with asyncio.timeout(60):
        assert len((await h.inference.Detokenize(request)).text) == MAX_DETOKENIZED_IDS
