"""The service in front of the real vLLM on CPU with the small real model, as a process of its own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.server.harness import details
from tests.server.processes import descendants, is_alive, server
from twinjet.server import native_door
from twinjet.v1 import admin_pb2, generation_pb2, model_pb2, sampling_pb2, service_pb2_grpc

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

Request = generation_pb2.GenerateRequest
Sampling = sampling_pb2.SamplingParams
SETTINGS = '[deployments.smollm2]\nengine = "vllm"\nmodel = "demo"\n'


class Service:
    """A running server process and stubs for it."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.channel = grpc.insecure_channel(address)
        self.inference = service_pb2_grpc.InferenceServiceStub(self.channel)
        self.models = service_pb2_grpc.ModelServiceStub(self.channel)
        self.admin = service_pb2_grpc.AdminServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def load(self) -> admin_pb2.ModelLoad:
        return self.admin.GetLoad(admin_pb2.GetLoadRequest()).models[0]

    def until(self, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it did not come true in time"
            time.sleep(0.05)

    def until_idle(self, timeout_s: float = 10.0) -> None:
        def is_idle() -> bool:
            load = self.load()
            return (load.waiting, load.running, load.engine_running, load.kv_blocks_used) == (0, 0, 0, 0)

        self.until(is_idle, timeout_s)

    def status(self) -> int:
        return self.health.Check(health_pb2.HealthCheckRequest(service="smollm2")).status


ONE_DOOR = pytest.mark.parametrize("service", ["grpc"], indirect=True)
"""For what lies behind the door: the same through either."""


@pytest.fixture(scope="module", params=["grpc", "native"])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path
) -> Iterator[Service]:
    if request.param == "native" and not native_door.is_available():
        pytest.skip("this build has no native door")
    folder = tmp_path_factory.mktemp("server")
    log = folder / "server.log"
    with server(folder, f'door = "{request.param}"\n{SETTINGS}') as (process, address):
        service = Service(process, address)
        yield service
        below = descendants(process.pid)
        num_logged = log.stat().st_size
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        deadline = time.monotonic() + 10
        while any(map(is_alive, below)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in below if is_alive(pid)], "the server left processes behind"
        service.channel.close()
    last_words = log.read_bytes()[num_logged:].decode()
    assert not any(word in last_words for word in ("ERROR", "Traceback", "failed")), last_words


def test_a_stranger_gets_the_capital_of_france_through_reflection_alone(service: Service) -> None:
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(service.channel))
    method = pool.FindServiceByName("twinjet.v1.InferenceService").methods_by_name["Chat"]
    request_class, response_class = map(
        message_factory.GetMessageClass, (method.input_type, method.output_type)
    )
    typed = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "sampling": {"max_tokens": 40, "temperature": 0},
    }
    call = service.channel.unary_stream(
        "/twinjet.v1.InferenceService/Chat",
        request_serializer=request_class.SerializeToString,
        response_deserializer=response_class.FromString,
    )
    events = list(call(json_format.ParseDict(typed, request_class())))
    assert "Paris" in "".join(event.delta.text for event in events)
    assert events[-1].summary.usage.output_tokens > 0


@ONE_DOOR
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("What is the capital of Germany?", "Berlin"),
        ("What is the capital of Japan?", "Tokyo"),
    ],
)
def test_a_first_question_has_a_good_answer_at_the_models_own_temperature(
    service: Service, question: str, answer: str
) -> None:
    request = generation_pb2.ChatRequest(
        messages=[{"role": "user", "content": question}], sampling=Sampling(n=16, seed=1, max_tokens=40)
    )
    texts = [""] * 16
    for event in service.inference.Chat(request):
        texts[event.delta.output_index] += event.delta.text
    assert [text for text in texts if answer not in text] == []


@ONE_DOOR
def test_the_model_describes_itself_and_the_native_parts_are_in_use(service: Service) -> None:
    model = service.models.GetModel(model_pb2.GetModelRequest()).model
    assert model.state == model_pb2.MODEL_STATE_READY
    assert (model.engine.name, model.engine.version) == ("vllm", "0.32.0")
    assert model.limits.vocab_size == 49152
    assert model.block_manager.implementation == "twinjet", model.block_manager
    assert model.sampler.implementation == "twinjet", model.sampler


def test_a_stream_is_served_by_the_native_parts(service: Service) -> None:
    def counters() -> dict[str, int]:
        model = service.models.GetModel(model_pb2.GetModelRequest()).model
        return {**model.block_manager.counters, **model.sampler.counters}

    before = counters()
    request = Request(text="Once upon a time", sampling=Sampling(max_tokens=24, ignore_eos=True))
    assert list(service.inference.Generate(request))[-1].summary.usage.output_tokens == 24
    served = ("native_steps", "native_updates", "rows_scheduled", "rows_updated", "rows")

    def is_counted() -> bool:
        now = counters()
        # The first token comes of the prefill, which is vLLM's to schedule.
        return all(now[name] - before.get(name, 0) >= 20 for name in served)

    service.until(is_counted, 10)


@ONE_DOOR
@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        ({"regex": "(unclosed"}, "sampling.constraint"),
        ({"json_schema": '{"type": "object", "properties": 5}'}, "sampling.constraint.json_schema"),
        ({"ebnf": "root ::= ("}, "sampling.constraint"),
    ],
)
def test_a_grammar_that_does_not_compile_is_the_clients_mistake(
    service: Service, constraint: dict[str, Any], field: str
) -> None:
    request = Request(text="x", sampling=Sampling(constraint=constraint))
    with pytest.raises(grpc.RpcError) as caught:
        list(service.inference.Generate(request))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    violation = details(caught.value)["BadRequest"].field_violations[0]  # type: ignore[arg-type]
    assert violation.field.startswith(field)
    assert service.status() == health_pb2.HealthCheckResponse.SERVING


def test_of_64_streams_each_ends_once_and_nothing_is_left(service: Service) -> None:
    """A third is cancelled at random points, a third has deadlines that pass."""
    rng = random.Random(11)
    plans = [(i, rng.uniform(0.3, 3.0), rng.randrange(20)) for i in range(64)]

    def one(plan: tuple[int, float, int]) -> str:
        i, seconds, events_before_cancel = plan
        request = Request(text=f"Story {i}: once", sampling=Sampling(max_tokens=40, ignore_eos=True))
        call = service.inference.Generate(request, timeout=seconds if i % 3 == 1 else None)
        kinds: list[str] = []
        try:
            for event in call:
                kinds.append(event.WhichOneof("event"))
                if i % 3 == 0 and len(kinds) > events_before_cancel:
                    call.cancel()
        except grpc.RpcError as error:
            assert "summary" not in kinds
            return str(error.code().name)  # type: ignore[attr-defined]
        assert kinds[-1] == "summary"
        assert kinds.count("summary") == kinds.count("finished") == 1
        return "OK"

    with ThreadPoolExecutor(64) as pool:
        ends = list(pool.map(one, plans))
    assert set(ends[2::3]) == {"OK"}
    assert set(ends[1::3]) <= {"OK", "DEADLINE_EXCEEDED"}
    assert set(ends[0::3]) <= {"OK", "CANCELLED"}
    assert {"CANCELLED", "DEADLINE_EXCEEDED"} <= set(ends)
    service.until_idle()


def _engine_process(service: Service) -> int:
    """The child that was forked from the forkserver."""
    below = descendants(service.process.pid)
    forked = [pid for pid, parent in below.items() if parent in below]
    assert len(forked) == 1, below
    return forked[0]


def test_kill_9_of_the_engine_ends_every_stream_at_once_and_it_comes_back(service: Service) -> None:
    calls = [
        service.inference.Generate(Request(text=f"{i}", sampling=Sampling(max_tokens=2000, ignore_eos=True)))
        for i in range(8)
    ]
    for call in calls:
        assert next(call).HasField("started")
    ended: list[tuple[float, grpc.StatusCode]] = []

    def drain(call: Any) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        ended.append((time.monotonic(), caught.value.code()))  # type: ignore[attr-defined]

    threads = [threading.Thread(target=drain, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    killed_at = time.monotonic()
    os.kill(_engine_process(service), signal.SIGKILL)
    for thread in threads:
        thread.join(30)
    assert [code for _, code in ended] == [grpc.StatusCode.UNAVAILABLE] * 8
    assert max(at for at, _ in ended) - killed_at < 2.0
    while service.status() != health_pb2.HealthCheckResponse.NOT_SERVING:
        assert time.monotonic() - killed_at < 2.0
    service.until(lambda: service.status() == health_pb2.HealthCheckResponse.SERVING, 120)
    events = list(service.inference.Generate(Request(text="again", sampling=Sampling(max_tokens=3))))
    assert events[-1].HasField("summary")
    assert service.load().restarts == 1
    service.until_idle()
