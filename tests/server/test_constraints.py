"""Constraints through the whole service on the real engine: kept, or refused with a reason, at nobody's cost."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import psutil
import pytest

from tests.server.harness import details, text_of
from tests.server.processes import server
from twinjet.v1 import generation_pb2, sampling_pb2, service_pb2_grpc, tokenization_pb2

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SETTINGS = '[deployments.smollm2]\nengine = "vllm"\nmodel = "demo"\n'
INTEGER: dict[str, Any] = {"type": "integer"}


class Service:
    def __init__(self, pid: int, address: str) -> None:
        self.pid = pid
        self.channel = grpc.insecure_channel(address)
        self.inference = service_pb2_grpc.InferenceServiceStub(self.channel)

    def generate(
        self, text: str, timeout_s: float = 120.0, options: Any = None, **sampling: Any
    ) -> list[generation_pb2.GenerateResponse]:
        request = generation_pb2.GenerateRequest(
            text=text, sampling=sampling_pb2.SamplingParams(**sampling), options=options
        )
        return list(self.inference.Generate(request, timeout=timeout_s))

    def refused(self, text: str, **sampling: Any) -> tuple[grpc.StatusCode, str, str, float]:
        """Status, reason, message and seconds of a request that fails."""
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            self.generate(text, **sampling)
        error: Any = caught.value
        reason = details(error)["ErrorInfo"].reason
        return error.code(), reason, error.details(), time.monotonic() - began

    def token_id(self, text: str) -> int:
        request = tokenization_pb2.TokenizeRequest(text=text, add_special_tokens=False)
        (token_id,) = self.inference.Tokenize(request).token_ids
        return token_id

    def workers(self) -> list[psutil.Process]:
        """The children that compile at the moment."""
        found = []
        for process in psutil.Process(self.pid).children():
            if "twinjet.grammar.worker" in " ".join(process.cmdline()):
                found += process.children()
        return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[Service]:
    with server(tmp_path_factory.mktemp("server"), SETTINGS) as (process, address):
        service = Service(process.pid, address)
        yield service
        service.channel.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def _schema(schema: Any) -> dict[str, str]:
    return {"json_schema": json.dumps(schema)}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                   {"properties": {"b": {"enum": ["x", "y"]}}, "required": ["b"]}]},
        {"type": "object", "required": ["name"], "properties": {"name": {"maxLength": 8, "pattern": "^[a-z]+$"}}},
        {"anyOf": [INTEGER, {"type": "string"}], "maxLength": 3, "maximum": 9},
        {"$ref": "#/$defs/n", "minimum": 5, "$defs": {"n": {"type": "integer", "maximum": 7}}},
        {"enum": [1, 7, "seven"], "minimum": 5, "not": {"type": "string"}},
        {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
         "if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}},
    ],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_schemas_that_were_not_kept_are_kept(service: Service, schema: dict[str, Any]) -> None:
    for temperature in (0.0, 1.5):
        events = service.generate(
            "Say something.", temperature=temperature, max_tokens=200, seed=3, constraint=_schema(schema)
        )
        finished = next(e.finished for e in events if e.HasField("finished"))
        if finished.reason == generation_pb2.FINISH_REASON_STOP:
            jsonschema.validate(json.loads(text_of(events)), schema)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (_schema({"type": "array", "items": INTEGER, "minItems": 10**18}), "minItems at /"),
        (_schema({"type": "array", "items": INTEGER, "uniqueItems": True}), "uniqueItems at /"),
        (_schema({"$ref": "#"}), "$ref at /"),
        (_schema({"$ref": "https://example.com/x"}), "$ref at /"),
        ({"json_schema": '{"items":' * 150 + "{}" + "}" * 150}, "151 deep"),
        ({"json_schema": "{"}, "not JSON"),
        ({"ebnf": "root ::= root"}, "no token of this model can begin"),
        ({"ebnf": "root ::= other"}, 'Rule "other" is not defined'),
        ({"regex": "(a"}, "parenthesis is not closed"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(
    service: Service, constraint: dict[str, str], message: str
) -> None:
    code, reason, text, seconds = service.refused("x", constraint=constraint)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert message in text
    assert seconds < 30


def test_a_choice_ends_the_output_whatever_ignore_eos_says(service: Service) -> None:
    events = service.generate("?", ignore_eos=True, max_tokens=20, constraint={"choice": {"values": ["yes"]}})
    assert text_of(events) == "yes"


def test_logprobs_under_a_constraint_are_those_before_its_mask(service: Service) -> None:
    token_id = service.token_id("yes")
    free = service.generate(
        "Once upon", logit_bias={token_id: 100.0}, max_tokens=1, logprobs=0, temperature=0
    )
    held = service.generate(
        "Once upon", allowed_token_ids=[token_id, 2], max_tokens=1, logprobs=0, temperature=0,
        constraint={"choice": {"values": ["yes"]}},
    )  # fmt: skip

    def chosen(events: list[generation_pb2.GenerateResponse]) -> generation_pb2.Logprob:
        return next(e.delta.logprobs[0].chosen for e in events if e.delta.logprobs)

    assert chosen(held).token_id == chosen(free).token_id == token_id
    assert chosen(held).rank == chosen(free).rank > 1
    assert chosen(held).logprob == pytest.approx(chosen(free).logprob, abs=1e-3)
    assert chosen(held).logprob < -1


def test_contradictions_are_the_clients(service: Service) -> None:
    code, reason, _, _ = service.refused(
        "x", allowed_token_ids=[service.token_id("a")], constraint={"choice": {"values": ["yes", "no"]}}
    )
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_ADMISSIBLE_TOKEN")


def test_a_stop_token_that_ends_a_choice_ends_it(service: Service) -> None:
    events = service.generate(
        "?", stop_token_ids=[service.token_id("yes")], allowed_token_ids=[service.token_id("yes")],
        include_stop=True, max_tokens=8, constraint={"choice": {"values": ["yes"]}},
    )  # fmt: skip
    assert text_of(events) == "yes"
    finished = next(e.finished for e in events if e.HasField("finished"))
    assert finished.stop_token_id == service.token_id("yes")


def test_a_compilation_ends_with_its_request(service: Service) -> None:
    slow = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "maxLength": 300} for i in range(3000)},
    }
    with pytest.raises(grpc.RpcError) as caught:
        service.generate("x", timeout_s=1.0, constraint=_schema(slow))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    deadline = time.monotonic() + 5
    while service.workers():
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)


def test_a_hostile_tenant_does_not_hold_up_another(service: Service) -> None:
    """The short form of bench/hostile_tenant.py: everyone is answered, and memory stays bounded."""
    wide = {"type": "object", "properties": {f"p{i:05d}": {"type": "string"} for i in range(5000)}}
    deep: Any = INTEGER
    for _ in range(8):
        deep = {"oneOf": [{"type": "object", "properties": {k: deep}, "required": [k]} for k in ("a", "b")]}
    worst: list[dict[str, str]] = [
        _schema(wide), _schema(deep), {"regex": "(([a-z]{1,900}){1,900}x){1,900}"},
        {"json_schema": json.dumps({"enum": list(range(40_000))})},
        _schema({"type": "array", "items": INTEGER, "maxItems": 10**6}),
    ]  # fmt: skip

    def attack(i: int) -> grpc.StatusCode | None:
        try:
            constraint = dict(worst[i % len(worst)])
            service.generate(
                f"{i}", timeout_s=8.0, max_tokens=8, constraint=constraint, options={"tenant": "hostile"}
            )
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
            return code
        return None

    with ThreadPoolExecutor(6) as pool:
        attacks = [pool.submit(attack, i) for i in range(12)]
        gaps = []
        for i in range(3):
            began = time.monotonic()
            events = service.generate(
                f"Count {i}", max_tokens=16, ignore_eos=True, temperature=0, options={"tenant": "normal"},
                constraint=None if i else {"regex": "[0-9]{4}"},
            )  # fmt: skip
            gaps.append(time.monotonic() - began)
            assert events[-1].HasField("summary")
        codes = {a.result() for a in attacks}
    allowed = {
        None, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }  # fmt: skip
    assert codes <= allowed
    assert max(gaps) < 30
    tree = [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
    assert sum(p.memory_info().rss for p in tree) < 8 << 30
