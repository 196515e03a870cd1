"""The service in front of the real vLLM on CPU with the small real model, as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.epp.replicas import until
from tests.epp.test_mirroring import cached, picker_over
from tests.server.harness import details
from tests.server.processes import Service, descendants, is_alive, server
from twinjet.epp.main import Epp
from twinjet.epp.mirroring import Mirrored
from twinjet.errors import Unavailable
from twinjet.server import native_door
from twinjet.v1 import admin_pb2, generation_pb2, model_pb2, sampling_pb2, tokenization_pb2

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

Request = generation_pb2.GenerateRequest
Sampling = sampling_pb2.SamplingParams
SETTINGS = '[deployments.smollm2]\nengine = "vllm"\nmodel = "demo"\nkv_events = true\n'


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
    with server(folder, f'door = "{request.param}"\n{SETTINGS}', grace_s=60) as (process, address):
        service = Service(process, address)
        yield service
        below = descendants(process.pid)
        num_logged = log.stat().st_size
        last = service.inference.Generate(
            Request(text="x", sampling=Sampling(max_tokens=30, ignore_eos=True))
        )
        assert next(last).HasField("started")
        # What a terminal's Ctrl-C does.
        os.killpg(process.pid, signal.SIGINT)
        assert list(last)[-1].HasField("summary")
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
        has_deadline = i % 3 == 1
        wanted = Sampling(max_tokens=1500 if has_deadline else 40, ignore_eos=True)
        request = Request(text=f"Story {i}: once", sampling=wanted)
        call = service.inference.Generate(request, timeout=seconds if has_deadline else None)
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


@ONE_DOOR
def test_a_picker_started_again_knows_what_the_engine_has_cached(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the snapshot of the engine's real events; and where the stream broke it goes on with the next delta."""
    text = "The quick brown fox jumps over the lazy dog and tells everybody about it. " * 12
    tokenized = service.inference.Tokenize(tokenization_pb2.TokenizeRequest(text=text))
    tokens = list(tokenized.token_ids)
    kinds: list[int] = []
    take = Mirrored.take

    def noted(self: Mirrored, message: admin_pb2.WatchKvEventsResponse) -> None:
        kinds.append(message.kind)
        take(self, message)

    monkeypatch.setattr(Mirrored, "take", noted)

    def ask(prompt: list[int]) -> int:
        """Have a prompt computed; gives how much of it was cached."""
        request = Request(token_ids=[*prompt, 1, 2], sampling=Sampling(temperature=0, max_tokens=2))
        return int(next(service.inference.Generate(request)).started.cached_prompt_tokens)

    def known(epp: Epp, prompt: list[int]) -> int:
        """How much of a prompt the picker takes for cached; nothing while no replica answers it."""
        try:
            return cached(epp.picker, prompt, "smollm2")
        except Unavailable:
            return 0

    async def agree(epp: Epp, prompt: list[int]) -> None:
        """The picker knows of all that the engine has."""
        held = await asyncio.to_thread(ask, prompt)
        assert held > len(prompt) - 32
        await until(lambda: known(epp, prompt) == held)

    async def look() -> None:
        async with forwarder(service.address) as (address, broken):
            for start in range(2):
                kinds.clear()
                async with picker_over(address) as epp:
                    await agree(epp, tokens)
                    assert kinds[0] in (
                        admin_pb2.KV_BATCH_KIND_SNAPSHOT,
                        admin_pb2.KV_BATCH_KIND_SNAPSHOT_END,
                    )
                    if start == 1:
                        kinds.clear()
                        broken.set()
                        await until(lambda epp=epp: not any(r.is_up for r in epp.picker.replicas.values()))
                        await asyncio.to_thread(ask, tokens[::-1])
                        broken.clear()
                        await agree(epp, tokens[::-1])
                        await agree(epp, tokens)
                        assert set(kinds) <= {
                            admin_pb2.KV_BATCH_KIND_DELTA,
                            admin_pb2.KV_BATCH_KIND_HEARTBEAT,
                        }

    ask(tokens)
    asyncio.run(look())


@asynccontextmanager
async def forwarder(address: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A port before another that breaks every connection, old and new, while the event is set."""
    broken = asyncio.Event()
    writers: set[asyncio.StreamWriter] = set()
    copying: set[asyncio.Task[Any]] = set()
    host, _, port = address.rpartition(":")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if broken.is_set():
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        writers.update((writer, far_writer))
        task = asyncio.current_task()
        assert task is not None
        copying.add(task)
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    async def breaking() -> None:
        while True:
            await broken.wait()
            while writers:
                writers.pop().transport.abort()
            await asyncio.sleep(0.01)

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    task = asyncio.create_task(breaking())
    try:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", broken
    finally:
        task.cancel()
        listener.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*copying)


@pytest.mark.parametrize(
    ("service", "how"), [("grpc", signal.SIGKILL), ("native", signal.SIGTERM)], indirect=["service"]
)
def test_a_kill_of_the_engine_ends_every_stream_at_once_and_it_comes_back(
    service: Service, how: signal.Signals
) -> None:
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
    os.kill(_engine_process(service), how)
    for thread in threads:
        thread.join(30)
    assert [code for _, code in ended] == [grpc.StatusCode.UNAVAILABLE] * 8
    # By themselves they would go on for minutes.
    assert max(at for at, _ in ended) - killed_at < 10.0
    while service.status() != health_pb2.HealthCheckResponse.NOT_SERVING:
        assert time.monotonic() - killed_at < 10.0
    service.until(lambda: service.status() == health_pb2.HealthCheckResponse.SERVING, 120)
    events = list(service.inference.Generate(Request(text="again", sampling=Sampling(max_tokens=3))))
    assert events[-1].HasField("summary")
    assert service.load().restarts == 1
    service.until_idle()
