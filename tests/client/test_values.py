"""What the client takes for a value, what it makes of it, and what it refuses before anything is sent."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

import pydantic
import pytest

from twinjet.client import BadRequest, Client, Constraint, Message, Options, Route, Sampling
from twinjet.client._calls import merged_metadata, time_limit
from twinjet.client._requests import (
    chat_request,
    detokenize_request,
    embed_request,
    generate_request,
    options_message,
    sampling_message,
    tokenize_request,
)
from twinjet.v1 import generation_pb2, sampling_pb2


def sent(**values: Any) -> sampling_pb2.SamplingParams:
    message = sampling_message(Sampling(**values))
    assert message is not None
    return message


def test_sampling_and_options_have_every_field_of_the_contract() -> None:
    for kind, message in (
        (Sampling, sampling_pb2.SamplingParams),
        (Options, generation_pb2.RequestOptions),
        (Message, generation_pb2.ChatMessage),
    ):
        names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        assert names == {f.name for f in message.DESCRIPTOR.fields}


def test_a_stop_may_be_one_string_or_several() -> None:
    assert list(sent(stop="\n\n").stop) == ["\n\n"]
    assert list(sent(stop=["a", "b"]).stop) == ["a", "b"]
    assert list(sent(stop=(s for s in "ab")).stop) == ["a", "b"]
    assert list(sent(bad_words="word").bad_words) == ["word"]
    assert list(sent(stop_token_ids=[1, 2]).stop_token_ids) == [1, 2]
    assert Sampling(stop="a") == Sampling(stop=["a"])
    for wrong in (5, b"a", {"a": 1}):
        with pytest.raises(TypeError, match=r"sampling\.stop must be a string or strings"):
            Sampling(stop=wrong)  # type: ignore[arg-type]


class Colour(enum.Enum):
    RED = "red"


class Thing(pydantic.BaseModel):
    colour: Colour
    parts: list[Thing] = []


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_a_schema_may_be_text_a_dict_or_a_pydantic_type() -> None:
    for given in (SCHEMA, Constraint("json_schema", SCHEMA), json.dumps(SCHEMA)):
        assert json.loads(sent(constraint=given).constraint.json_schema) == SCHEMA
    for given in (Thing, Constraint("json_schema", Thing)):
        assert json.loads(sent(constraint=given).constraint.json_schema) == Thing.model_json_schema()
    adapter = pydantic.TypeAdapter(list[int])
    assert json.loads(sent(constraint=adapter).constraint.json_schema) == adapter.json_schema()
    assert sent(constraint=Constraint("json_object")).constraint.json_object
    assert list(sent(constraint=Constraint("choice", choices=["x"])).constraint.choice.values) == ["x"]
    assert list(sent(constraint=Constraint("choice", choices="x")).constraint.choice.values) == ["x"]


@pytest.mark.parametrize(
    ("kind", "value", "error"),
    [
        ("grammar", "x", ValueError),
        ("regex", None, TypeError),
        ("ebnf", {"a": 1}, TypeError),
        ("json_schema", 5, TypeError),
        ("json_schema", None, TypeError),
    ],
)
def test_what_is_no_constraint_is_refused(kind: Any, value: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        Constraint(kind, value)


def roles(request: generation_pb2.ChatRequest) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in request.messages]


def chat(messages: Any) -> generation_pb2.ChatRequest:
    return chat_request(messages, None, None, "", False)


def test_messages_may_be_dicts_or_a_string() -> None:
    both = [{"role": "system", "content": "s"}, Message("user", "u")]
    assert roles(chat(both)) == [("system", "s"), ("user", "u")]
    assert roles(chat("u")) == roles(chat(Message("user", "u"))) == [("user", "u")]
    assert roles(chat({"role": "user", "content": "u"})) == [("user", "u")]
    pictured = chat([{"role": "user", "content": "", "images": [b"png"]}])
    assert list(pictured.messages[0].images) == [b"png"]
    assert [m.content for m in tokenize_request([{"role": "user", "content": "u"}], "", None).messages] == [
        "u"
    ]


@pytest.mark.parametrize(
    ("messages", "field", "message"),
    [
        ([{"role": "user", "contents": "x"}], "messages[0].contents", "is unknown; known: audio, content"),
        ([Message("user", "x"), {"role": "user"}], "messages[1].content", "is missing"),
        ([{"content": "x"}], "messages[0].role", "is missing"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content", "half a surrogate pair"),
    ],
)
def test_a_wrong_message_is_named(messages: Any, field: str, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(messages)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert message in violation.message


@pytest.mark.parametrize("messages", [5, None, [5], [["user", "x"]], [None], ["a", "b"]])
def test_what_is_no_message_is_a_type_error(messages: Any) -> None:
    with pytest.raises(TypeError):
        chat(messages)


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        (
            {"top_k": 2**31},
            "sampling.top_k",
            "2147483648 is out of range; allowed: -2147483648 to 2147483647",
        ),
        ({"max_tokens": 10**30}, "sampling.max_tokens", "is out of range"),
        ({"seed": -1}, "sampling.seed", "-1 is out of range; allowed: 0 to 18446744073709551615"),
        ({"seed": 2**64}, "sampling.seed", "is out of range"),
        ({"n": -(2**31) - 1}, "sampling.n", "is out of range"),
        ({"stop_token_ids": [1, 2**40]}, "sampling.stop_token_ids", "1099511627776 is out of range"),
        ({"allowed_token_ids": [2**31]}, "sampling.allowed_token_ids", "is out of range"),
        ({"logit_bias": {2**31: 1.0}}, "sampling.logit_bias", "2147483648 is out of range"),
        ({"stop": "\udc00"}, "sampling.stop", "half a surrogate pair"),
        ({"constraint": "\udc00"}, "sampling.constraint.json_schema", "half a surrogate pair"),
        (
            {"constraint": Constraint("choice", choices=["\udc00"])},
            "sampling.constraint.choice.values",
            "half a surrogate pair",
        ),
    ],
)
def test_what_no_message_can_carry_is_refused_as_the_server_would(
    values: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        sampling_message(Sampling(**values))
    assert caught.value.code == "INVALID_ARGUMENT"
    (violation,) = caught.value.violations
    assert violation.field == field
    assert message in violation.message


def test_other_requests_name_their_fields_too() -> None:
    def refused(make: Any) -> str:
        with pytest.raises(BadRequest) as caught:
            make()
        return str(caught.value.violations[0].field)

    assert refused(lambda: generate_request("\ud800", None, None, "")) == "text"
    assert refused(lambda: generate_request([2**31], None, None, "")) == "token_ids"
    assert refused(lambda: generate_request("x", None, None, "\ud800")) == "model"
    assert refused(lambda: options_message(Options(priority=2**31))) == "options.priority"
    assert refused(lambda: options_message(Options(tenant="\ud800"))) == "options.tenant"
    assert refused(lambda: embed_request(["x"], -1, None, "")) == "dimensions"
    assert refused(lambda: embed_request(["x", [2**31]], None, None, "")) == "inputs[1].token_ids"
    assert refused(lambda: detokenize_request([2**31], "", None)) == "token_ids"
    assert refused(lambda: tokenize_request("\ud800", "", None)) == "text"


@pytest.mark.parametrize(
    ("use", "field"),
    [
        (lambda c: c.get_model("\ud800"), "model"),
        (lambda c: c.wait_ready("\ud800"), "model"),
        (lambda c: c.get_load("\ud800"), "model"),
        (lambda c: c.adapters("\ud800"), "model"),
        (lambda c: c.load_adapter("a", "\ud800"), "path"),
        (lambda c: c.unload_adapter("\ud800"), "name"),
        (lambda c: c.abort("\ud800"), "request_id"),
        (lambda c: c.reset_prefix_cache("\ud800"), "model"),
        (lambda c: list(c.watch_kv_events("\ud800")), "model"),
        (lambda c: c.drain(float("inf")), "grace"),
        (lambda c: c.drain(float("nan")), "grace"),
        (lambda c: c.remove_deployment("a", 1e300), "grace"),
        (lambda c: c.remove_deployment("\ud800"), "name"),
        (lambda c: c.add_deployment("\ud800", {}), "name"),
        (lambda c: c.set_route(Route("\ud800")), "route.model"),
        (lambda c: c.set_route(Route("m", {"\ud800": 1})), "route.weights"),
        (lambda c: c.set_route(Route("m"), revision=-1), "revision"),
    ],
)
def test_calls_of_every_kind_name_their_fields(use: Any, field: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(BadRequest) as caught:
        use(client)
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize("prompt", [b"text", None, 5, {"a": 1}])
def test_what_is_no_prompt_is_a_type_error(prompt: Any) -> None:
    with pytest.raises(TypeError, match="must be text or token ids"):
        generate_request(prompt, None, None, "")


def test_a_wrong_type_names_the_field() -> None:
    with pytest.raises(TypeError, match=r"sampling\.temperature"):
        sent(temperature="hot")
    with pytest.raises(TypeError, match="token_ids"):
        generate_request(["a"], None, None, "")  # type: ignore[list-item]


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("-inf")])
def test_a_time_limit_is_above_0(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="allowed: above 0"):
        Client("localhost:1", timeout_s=timeout_s)
    with Client("localhost:1") as client, pytest.raises(ValueError, match="allowed: above 0"):
        client.generate("x", timeout_s=timeout_s)


def test_an_endless_time_limit_is_none() -> None:
    assert time_limit(float("inf")) is time_limit(1e300) is time_limit(None) is None
    assert time_limit(5) == 5


def test_metadata_is_joined_by_name() -> None:
    base, mine = {"Authorization": "Bearer a", "x": "1"}, [("authorization", "Bearer b"), ("y-bin", b"\xff")]
    assert merged_metadata(base, mine) == (
        ("x", "1"),
        ("authorization", "Bearer b"),
        ("y-bin", b"\xff"),
    )


@pytest.mark.parametrize(
    "metadata", [{"a b": "x"}, {"": "x"}, {"a": "é"}, {"a": "x\n"}, {"a": b"x"}, {"a-bin": "x"}, {"ä": "x"}]
)
def test_metadata_that_cannot_be_sent_is_named(metadata: Any) -> None:
    with pytest.raises(ValueError, match="metadata"):
        merged_metadata(metadata)
