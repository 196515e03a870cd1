"""Plain calls of the native door: taken in batches, and served as the handler would have served each."""

from __future__ import annotations

import asyncio
import functools
import random
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tests.server.harness import Harness, Serve, collect, details, kinds
from twinjet import _core
from twinjet.engines.fake import FakeEngine
from twinjet.request import EngineRequest
from twinjet.server import native_door
from twinjet.server.plain import PlainCalls
from twinjet.v1 import generation_pb2, routing_pb2, sampling_pb2

Request = generation_pb2.GenerateRequest
Options = generation_pb2.RequestOptions
Sampling = sampling_pb2.SamplingParams

if not native_door.is_available():
    pytest.skip("this build has no native door", allow_module_level=True)


@pytest.fixture
def door() -> str:
    return "native"


# Reading.

_texts = st.text(max_size=8) | st.sampled_from(["", "a b", "x" * 128, "x" * 129, "é" * 64, "é" * 65])
_options = st.builds(
    Options,
    request_id=_texts | st.just("good-id"),
    tenant=_texts,
    cache_salt=_texts,
    session=_texts,
    adapter=st.just("") | st.just("a"),
    priority=st.none() | st.integers(-3, 3),
    report_queue=st.none() | st.booleans(),
)
_requests = st.builds(
    Request,
    model=_texts,
    text=st.just("") | _texts,
    token_ids=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 300), max_size=6),
    sampling=st.none() | st.builds(Sampling, max_tokens=st.none() | st.integers(0, 9)),
    options=st.none() | _options,
)


@given(_requests, st.data())
def test_what_is_plain_is_read_as_protobuf_reads_it(request: Any, data: st.DataObject) -> None:
    encoded = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(0, 2)) if encoded else 0):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    _compare(bytes(encoded))
    twice = bytes(encoded) + request.SerializeToString()
    _compare(twice)


def _compare(encoded: bytes) -> None:
    plain = _core.read_plain_generate(encoded)
    if plain is None:
        return
    model, text, token_ids, largest, sampling, request_id, tenant, salt, session = plain
    try:
        params = Sampling.FromString(sampling)
    except DecodeError:
        return  # which is found before the request is taken
    options = Options(request_id=request_id, tenant=tenant, cache_salt=salt, session=session)
    read = Request.FromString(encoded)
    assert bool(read.text) != bool(read.token_ids)
    assert largest == max(token_ids, default=-1)
    assert read.sampling == params
    assert read.options == options
    read.ClearField("sampling")
    read.ClearField("options")
    assert read == Request(model=model, text=text, token_ids=token_ids)


def test_what_most_clients_send_is_plain() -> None:
    for request in (
        Request(text="hello"),
        Request(model="m", token_ids=[1, 70_000], sampling=Sampling(temperature=0.5, stop=["x"])),
        Request(text="é", options=Options(request_id="a", tenant="t", cache_salt="s", session="c")),
    ):
        assert _core.read_plain_generate(request.SerializeToString()) is not None
    for options in (Options(priority=1), Options(adapter="a"), Options(prefill_only=True)):
        assert _core.read_plain_generate(Request(text="x", options=options).SerializeToString()) is None


# Serving.


class _Both:
    """Has requests served both ways, and keeps what the engine was given."""

    def __init__(self, h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        self.h = h
        self.num_taken = self.num_left = 0
        self.takes = True
        self.submitted: list[EngineRequest] = []
        take = PlainCalls.take

        def spy(calls: PlainCalls, items: Any) -> Any:
            items = list(items)
            left = take(calls, items) if self.takes else items
            if self.takes:
                self.num_left += len(left)
                self.num_taken += len(items) - len(left)
            return left

        monkeypatch.setattr(PlainCalls, "take", spy)
        submit = h.engine.submit

        def see(request: EngineRequest, run: Any) -> None:
            self.submitted.append(request)
            submit(request, run)

        monkeypatch.setattr(type(h.engine), "submit", lambda _, request, run: see(request, run))

    async def ask(self, request: Any, metadata: Any, timeout: float | None) -> Any:
        """What a client sees, without what differs from call to call, and what the engine was given."""
        self.submitted.clear()
        call = self.h.inference.Generate(request, metadata=metadata, timeout=timeout)
        messages: list[Any] = []
        status: tuple[Any, ...] = ("OK",)
        try:
            await collect(call, messages)
        except grpc.aio.AioRpcError as error:
            told = {k: str(v) for k, v in details(error).items()}
            if "RetryInfo" in told:  # each client is told a later time than the one before
                told["RetryInfo"] = ""
            status = (error.code(), error.details(), told)
        initial = dict(await call.initial_metadata())
        trailing = [key for key, _ in await call.trailing_metadata()]
        drawn = initial.get("twinjet-request-id", "")
        for message in messages:
            if message.HasField("summary"):
                message.summary.ClearField("timings")
                message.summary.usage.ClearField("cached_prompt_tokens")
                if not request.sampling.HasField("seed"):
                    message.summary.ClearField("seed")
            if message.HasField("started"):
                assert message.started.request_id == drawn
                message.started.ClearField("request_id")
                message.started.ClearField("cached_prompt_tokens")
        given = [self._shown(r, request) for r in self.submitted]
        shown = drawn if request.options.request_id else (len(drawn), drawn[:-24])
        whole = _joined(messages) if request.sampling.HasField("seed") else kinds(_joined(messages))
        return status, whole, shown, initial.get("twinjet-prefix-key"), trailing, given

    @staticmethod
    def _shown(given: EngineRequest, request: Any) -> Any:
        sampling = given.sampling
        if not request.sampling.HasField("seed"):
            assert 0 <= sampling.seed < 2**53
            sampling = sampling.fitted(seed=0, max_tokens=sampling.max_tokens)
        return (
            given.prompt_token_ids, sampling, given.tenant, given.client_address, given.cache_salt, given.adapter,
            given.priority, given.deadline is None, given.data_parallel_rank, given.kv_retention, dict(given.trace_headers),
            given.prefill_only, given.handoff, given.grammar,
        )  # fmt: skip


def _joined(messages: list[Any]) -> list[Any]:
    """The messages with each output's deltas in one: how they are cut is a matter of speed."""
    joined: list[Any] = []
    deltas: dict[int, Any] = {}
    for message in messages:
        if not message.HasField("delta"):
            joined.append(message)
            continue
        delta = message.delta
        if delta.output_index in deltas:
            deltas[delta.output_index].text += delta.text
            deltas[delta.output_index].token_ids.extend(delta.token_ids)
            deltas[delta.output_index].logprobs.extend(delta.logprobs)
        else:
            deltas[delta.output_index] = delta
            joined.append(message)
    finished = [m for m in joined if m.HasField("finished")]
    for message in finished:
        joined.remove(message)
    return joined + sorted(finished, key=lambda m: m.finished.output_index)


def _draw(rng: random.Random, number: int) -> tuple[Any, Any, float | None]:
    """A request that may be anything, most often good."""

    def rarely(value: Any, usual: Any = None) -> Any:
        return value if rng.random() < 0.08 else usual

    sampling = Sampling(
        seed=rng.choice([1, 2**60, 7]) if rng.random() < 0.8 else None,
        max_tokens=rng.choice([1, 3, 5]) if rng.random() < 0.8 else rarely(rng.choice([0, 10**6])),
        temperature=rng.choice([None, 0.0, 0.7, rarely(1000.0)]),
        n=rng.choice([None, None, 1, 2, rarely(1000)]),
        stop=rng.choice([[], ["ab"], rarely([""], [])]),
        min_tokens=rarely(rng.choice([1, 100])),
        logprobs=rarely(rng.choice([0, 2, 1000])),
        top_p=rarely(-1.0),
    )
    if rng.random() < 0.05:
        sampling.constraint.SetInParent()
    options = Options(
        request_id=rng.choice(["", f"r{number}", rarely("not an id", "")]),
        tenant=rng.choice(["", "t", rarely("é" * 100, "")]),
        cache_salt=rarely("salt", ""),
        session=rarely("session", ""),
        priority=rarely(rng.choice([0, 5, 1000])),
        adapter=rarely("none", ""),
        report_queue=rarely(True),
    )
    request = Request(
        model=rng.choice(["", "fake", rarely("other", "")]),
        sampling=sampling if rng.random() < 0.9 else Sampling(seed=1, max_tokens=2),
        options=options if rng.random() < 0.7 else None,
    )
    if rng.random() < 0.5:
        request.token_ids.extend(rng.choices(range(200), k=rng.choice([1, 5, 40, rarely(10_000, 2)])))
        if rng.random() < 0.05:
            request.token_ids.append(rng.choice([-1, 10**6]))
    if rng.random() < 0.55 or not request.token_ids:
        request.text = rng.choice(["hello", "é", rarely("x" * 5000, "hi"), rarely("", "two words")])
    ids = [("x-request-id", rng.choice(["caller", "x" * 200, rarely("a b", "c")]))]
    trace = [("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")]
    metadata = (ids if rng.random() < 0.2 else []) + (trace if rng.random() < 0.05 else [])
    return request, metadata, rng.choice([None, 30.0])


@pytest.mark.parametrize("seed", range(3))
async def test_both_ways_give_the_same(serve: Serve, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    h = await serve({"max_context_tokens": 512})
    both = _Both(h, monkeypatch)
    rng = random.Random(seed)
    for number in range(60):
        request, metadata, timeout = _draw(rng, number)
        both.takes = True
        plain = await both.ask(request, metadata, timeout)
        both.takes = False
        assert plain == await both.ask(request, metadata, timeout), request
    assert both.num_taken > 15
    assert both.num_left > 3
    await h.until_idle()


async def test_refusals_are_counted_and_told_alike(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full server, a full queue, a spent quota and a name in use."""
    h = await serve(
        {"max_num_seqs": 1, "step_s": 0.01},
        server={"max_streams": 3},
        deployments={
            "fake": {
                "engine": "fake",
                "options": {"max_num_seqs": 1, "step_s": 0.01},
                "scheduler": {"max_waiting": 1, "tenants": {"poor": {"max_streams": 1}}},
            }
        },
    )
    both = _Both(h, monkeypatch)
    long = Request(text="x", sampling=Sampling(max_tokens=400, min_tokens=400, seed=1))
    long.options.request_id = "long"
    long.options.tenant = "poor"
    running = h.inference.Generate(long)
    await running.read()
    for options in (Options(request_id="long"), Options(tenant="poor")):
        request = Request(text="x", sampling=Sampling(max_tokens=2, seed=1), options=options)
        both.takes = True
        plain = await both.ask(request, (), None)
        both.takes = False
        assert plain[0][0] in (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert plain == await both.ask(request, (), None)
    waiting = h.inference.Generate(Request(text="x"))
    await h.until(lambda: h.server.deployments.by_name["fake"].dispatcher.totals().waiting == 1)
    refused = []
    for takes in (True, False):
        both.takes = takes
        refused.append(await both.ask(Request(text="x"), (), None))
    assert "queue is full" in refused[0][0][1]
    assert refused[0][:2] == refused[1][:2]
    running.cancel()
    waiting.cancel()
    await h.until_idle()
    samples = {
        s.labels["code"]: s.value
        for family in h.server.metrics.registry.collect()
        for s in family.samples
        if s.name == "twinjet_calls_total" and s.labels["method"] == "Generate"
    }
    assert samples == {"ALREADY_EXISTS": 2, "RESOURCE_EXHAUSTED": 4, "CANCELLED": 2}


async def test_nothing_is_left_of_calls_that_end_in_any_way(serve: Serve) -> None:
    h = await serve({"step_s": 0.001, "max_num_seqs": 4})
    rng = random.Random(3)

    async def one(number: int) -> None:
        request = Request(text="x", sampling=Sampling(max_tokens=30, min_tokens=30, seed=number))
        call = h.inference.Generate(request, timeout=rng.choice([None, 0.02]))
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.05)
            call.cancel()
        try:
            await collect(call)
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            return

    await asyncio.gather(*(one(i) for i in range(60)))
    await h.until_idle()
    dispatcher = h.server.deployments.by_name["fake"].dispatcher
    assert dispatcher.load().request_ids == ()
    door: Any = h.server._door
    await asyncio.wait_for(door._plain.wait_idle(), 10)
    assert len(door._plain) == 0


async def test_where_calls_go_is_looked_up_anew_when_it_changes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As an engine whose state does not change: it says the same of itself.
    monkeypatch.setattr(FakeEngine, "describe", functools.cache(FakeEngine.describe))
    h = await serve(
        deployments={"a": {"engine": "fake"}, "b": {"engine": "fake"}}, routes={"m": {"weights": {"a": 1}}}
    )

    async def served_by() -> str:
        sampling = Sampling(max_tokens=2, min_tokens=2, seed=1)
        messages = await collect(h.inference.Generate(Request(model="m", text="x", sampling=sampling)))
        return str(messages[0].started.deployment)

    assert [await served_by() for _ in range(3)] == ["a"] * 3
    await h.admin.SetRoute(
        routing_pb2.SetRouteRequest(route=routing_pb2.Route(model="m", weights={"b": 1.0}))
    )
    assert [await served_by() for _ in range(2)] == ["b"] * 2
    b = h.server.deployments.by_name["b"]
    first = b.supervisor.engine
    first.die()  # type: ignore[attr-defined]
    await h.until(lambda: b.is_ready and b.supervisor.engine is not first)
    assert await served_by() == "b"
    door: Any = h.server._door
    assert door._plain._only["m"].engine is b.supervisor.engine


async def test_calls_without_a_request_end_as_others_do(serve: Serve) -> None:
    """One that is closed, one that is cancelled, and one that the server's end finds open."""
    h = await serve()
    door: Any = h.server._door
    open_call = h.channel.stream_stream("/twinjet.v1.InferenceService/Generate")
    closed = open_call()
    await closed.done_writing()
    assert await closed.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await closed.details() == "request: there is no message"
    cancelled = open_call()
    await cancelled.wait_for_connection()
    await h.until(lambda: door._door.totals()["calls"] == 1)
    cancelled.cancel()
    await h.until(lambda: door._door.totals()["calls"] == 0)
    left = open_call()
    await left.wait_for_connection()
    await h.until(lambda: door._door.totals()["calls"] == 1)
    await h.server.stop()
    assert await left.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_is_behind_gets_all_of_it(serve: Serve) -> None:
    """More than the door takes at once waits for the end, which a task then writes."""
    window: list[tuple[str, Any]] = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
    h = await serve({"max_context_tokens": 100_000, "num_blocks": 10_000}, channel_options=window)
    door: Any = h.server._door
    sampling = Sampling(max_tokens=4000, min_tokens=4000, logprobs=20, seed=1)
    call = h.inference.Generate(Request(text="x", sampling=sampling))
    messages = [await call.read()]
    assert len(door._plain) == 1
    await h.until(lambda: len(door._calls) == 1)  # the task has it
    messages += await collect(call)
    assert sum(len(m.delta.token_ids) for m in messages) == 4000
    assert kinds(messages)[-2:] == ["finished", "summary"]
    await h.until_idle()
    await asyncio.wait_for(door._plain.wait_idle(), 10)
