"""Metadata, errors that carry what had come, batches, waiting for a model; each with both clients."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from tests.client.scripted import Fails, Scripted, Stalls, delta, finished, started, summary, whole
from tests.server.full_fake import KV_EVENTS, FullFakeEngine
from tests.server.harness import Harness, Serve
from twinjet.client import (
    AlreadyExists,
    AsyncClient,
    BadRequest,
    BatchProgress,
    Cancelled,
    Client,
    CompareReport,
    CompareStarted,
    Comparison,
    Completion,
    DeadlinePassed,
    Drained,
    IncompleteStream,
    KvCleared,
    KvRemoved,
    KvStored,
    LoadingProgress,
    Mirror,
    NotFound,
    Options,
    PartialOutput,
    PreconditionFailed,
    RetryPolicy,
    Route,
    Routes,
    Sampling,
    ServerFailure,
    StreamConsumed,
    TwinjetClientError,
    Unavailable,
)
from twinjet.v1 import generation_pb2, model_pb2, service_pb2, service_pb2_grpc

ONCE = RetryPolicy(attempts=1)


class Both:
    """Runs the same lines with either client; the blocking one in a thread."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.is_aio = isinstance(client, AsyncClient)

    async def result(self, use: Any) -> Any:
        return await use(self.client) if self.is_aio else await asyncio.to_thread(use, self.client)

    async def items(self, use: Any, most: int | None = None) -> list[Any]:
        def read() -> list[Any]:
            items = []
            source = use(self.client)
            for item in source:
                items.append(item)
                if len(items) == most:
                    source.close()
                    break
            return items

        if not self.is_aio:
            return await asyncio.to_thread(read)
        items, source = [], use(self.client)
        async for item in source:
            items.append(item)
            if len(items) == most:
                await source.aclose()
                break
        return items


@pytest.fixture(params=[AsyncClient, Client])
async def both(request: pytest.FixtureRequest, server: Scripted) -> AsyncIterator[Both]:
    client = request.param(server.address, retry=ONCE, token="secret", metadata={"team": "red"})
    yield Both(client)
    if isinstance(client, AsyncClient):
        await client.close()
    else:
        client.close()


async def test_metadata_goes_with_the_call(server: Scripted, both: Both) -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    await both.result(lambda c: c.generate("x", metadata=trace).text())
    assert server.metadata[-1].items() >= (trace | {"team": "red", "authorization": "Bearer secret"}).items()
    server.scripts = [[]]
    await both.result(lambda c: c.tokenize("x", metadata=[("team", "blue"), ("x-bin", b"\x00")]))
    assert server.metadata[-1]["team"] == "blue"
    assert server.metadata[-1]["x-bin"] == b"\x00"


async def test_an_error_carries_request_id_and_what_had_come(server: Scripted, both: Both) -> None:
    server.scripts = [
        [
            started(),
            delta("ab"),
            delta("x", 1),
            delta("c"),
            Fails(StatusCode.UNAVAILABLE, reason="ENGINE_DIED"),
        ]
    ]
    with pytest.raises(Unavailable) as caught:
        await both.result(lambda c: c.generate("x").text())
    error = caught.value
    assert (error.request_id, error.text) == ("r1", "abc")
    assert error.outputs == (PartialOutput(0, "abc", (2, 1)), PartialOutput(1, "x", (1,)))


async def test_a_refused_call_has_the_id_from_its_metadata(server: Scripted, both: Both) -> None:
    server.request_id = "from-metadata"
    server.scripts = [[Fails(StatusCode.INTERNAL)]]
    with pytest.raises(ServerFailure) as caught:
        await both.result(lambda c: c.generate("x").text())
    assert (caught.value.text, caught.value.outputs) == ("", ())
    # grpc.aio forgets metadata that comes together with the status.
    assert caught.value.request_id in ({"from-metadata", ""} if both.is_aio else {"from-metadata"})


async def test_a_stream_cut_short_or_late_carries_its_text_too(server: Scripted, both: Both) -> None:
    server.scripts = [[started(), delta("ab")]]
    with pytest.raises(IncompleteStream) as caught:
        await both.result(lambda c: c.generate("x").completion())
    assert (caught.value.request_id, caught.value.text) == ("r1", "ab")
    server.scripts = [[started(), delta("ab"), Stalls()]]
    with pytest.raises(DeadlinePassed) as late:
        await both.result(lambda c: c.generate("x", timeout_s=0.5).completion())
    assert late.value.text == "ab"


async def test_a_second_read_is_told(server: Scripted) -> None:
    async with AsyncClient(server.address) as client:
        stream = client.generate("x")
        assert await stream.text() == "hello"
        assert stream.request_id == "r1"
        for read in (stream.text, stream.completion):
            with pytest.raises(StreamConsumed, match="has been read, and its events come once"):
                await read()
        with pytest.raises(StreamConsumed):
            aiter(stream)
        with pytest.raises(StreamConsumed):
            await anext(stream.pieces())
        begun = client.generate("x")
        async for _ in begun:
            break
        with pytest.raises(StreamConsumed, match="has been read in part"):
            await begun.text()
        # Going on where the first loop left is no second read.
        assert [type(e).__name__ for e in [e async for e in begun]] == ["Delta", "Finished", "Summary"]
        closed = client.generate("x")
        async with closed:
            pass
        with pytest.raises(StreamConsumed):
            await closed.text()
    assert server.num_calls == 2


def test_a_second_read_is_told_to_blocking_readers_too(server: Scripted) -> None:
    with Client(server.address) as client:
        stream = client.chat("x")
        assert list(stream.pieces()) == ["hello"]
        for read in (stream.text, stream.completion, lambda: list(stream), lambda: list(stream.pieces())):
            with pytest.raises(StreamConsumed):
                read()
        begun = client.generate("x")
        next(iter(begun))
        with pytest.raises(StreamConsumed, match="in part"):
            begun.text()
        assert len(list(begun)) == 3


async def test_the_time_limit_begins_with_the_first_read(server: Scripted, both: Both) -> None:
    stream = both.client.generate("x", timeout_s=0.5)
    await asyncio.sleep(0.7)
    assert await both.result(lambda _: stream.text()) == "hello"


async def test_leaving_a_stream_in_the_middle_cancels_at_once(server: Scripted, both: Both) -> None:
    server.scripts = [[started(), Stalls()]]
    assert len(await both.items(lambda c: c.generate("x"), most=1)) == 1
    assert await asyncio.to_thread(server.cancelled.wait, 5.0)


async def test_a_batch_is_bounded_ordered_and_tells_how_far_it_is(server: Scripted, both: Both) -> None:
    server.scripts = [whole(str(i)) if i != 4 else [Fails(StatusCode.INTERNAL)] for i in range(12)]
    seen: list[BatchProgress] = []

    def streams(client: Any) -> Iterator[Any]:
        return (client.generate(f"p{i}", Sampling(seed=i)) for i in range(12))

    results = await both.result(lambda c: c.batch(streams(c), limit=3, on_progress=seen.append))
    assert len(results) == 12
    assert server.most_running <= 3
    assert [p.done for p in seen] == list(range(1, 13))
    assert seen[-1] == BatchProgress(12, 1, None, 22)
    failed = [r for r in results if isinstance(r, TwinjetClientError)]
    assert [type(error) for error in failed] == [ServerFailure]
    # Each result stands where its stream stood: the server tells which request it answered.
    answers = {r.sampling.seed: i for i, r in enumerate(server.requests)}
    for index, result in enumerate(results):
        if isinstance(result, Completion):
            assert result.text == str(answers[index])


async def test_a_batch_of_a_list_knows_its_length(server: Scripted, both: Both) -> None:
    seen: list[BatchProgress] = []
    results = await both.result(
        lambda c: c.batch([c.chat("a"), c.generate("b")], limit=50, on_progress=seen.append)
    )
    assert [r.text for r in results] == ["hello", "hello"]
    assert [p.total for p in seen] == [2, 2]
    assert await both.result(lambda c: c.batch([])) == []
    with pytest.raises(ValueError, match="limit is 0"):
        await both.result(lambda c: c.batch([], limit=0))


async def test_a_batch_that_breaks_cancels_what_runs(server: Scripted, both: Both) -> None:
    server.scripts = [[started(), Stalls()], whole("x")]

    def broken(_: BatchProgress) -> None:
        raise LookupError("the caller's own mistake")

    with pytest.raises(LookupError):
        await both.result(lambda c: c.batch([c.generate("a"), c.generate("b")], limit=2, on_progress=broken))
    assert await asyncio.to_thread(server.cancelled.wait, 5.0)


def test_a_blocking_stream_is_cancelled_from_another_thread(server: Scripted) -> None:
    server.scripts = [[started(), delta("ab"), Stalls()]]
    with Client(server.address) as client:
        stream = client.generate("x")
        timer = threading.Timer(0.2, stream.cancel)
        timer.start()
        with pytest.raises(Cancelled) as caught:
            stream.text()
        timer.join()
        assert caught.value.text == "ab"
        unread = client.generate("x")
        unread.cancel()
        with pytest.raises(Cancelled):
            unread.text()


@pytest.mark.parametrize("code", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE])
def test_cancelling_a_blocking_stream_ends_its_wait_for_another_try(
    server: Scripted, code: StatusCode
) -> None:
    server.scripts = [[Fails(code, retry_after_s=40.0)]]
    server.health = [b"\x08\x02"]
    with Client(server.address, retry=RetryPolicy(max_delay_s=60.0)) as client:
        stream = client.generate("x")
        timer = threading.Timer(0.5, stream.cancel)
        began = time.monotonic()
        timer.start()
        with pytest.raises(Cancelled):
            stream.text()
        timer.join()
        assert time.monotonic() - began < 20
    assert server.num_calls == 1


def state(state: model_pb2.ModelState.ValueType, **fields: Any) -> model_pb2.Model:
    return model_pb2.Model(name="m", state=state, **fields)


async def test_waiting_for_a_model_shows_how_far_it_is(server: Scripted, both: Both) -> None:
    server.scripts = [[]]
    loading = model_pb2.LoadingProgress(phase="loading weights", done=0.5)
    server.states = [
        state(model_pb2.MODEL_STATE_LOADING, loading=loading),
        state(model_pb2.MODEL_STATE_RESTARTING),
        state(model_pb2.MODEL_STATE_READY),
    ]
    seen: list[LoadingProgress] = []
    model = await both.result(lambda c: c.wait_ready("m", timeout_s=10, on_progress=seen.append))
    assert (model.name, model.state) == ("m", "ready")
    assert [(p.phase, p.done) for p in seen] == [("loading weights", 0.5), ("", 0.0)]


async def test_waiting_ends_with_a_failed_model_or_with_the_time(server: Scripted, both: Both) -> None:
    server.scripts = [[]]
    server.states = [state(model_pb2.MODEL_STATE_FAILED, failure="no such folder")]
    with pytest.raises(ServerFailure, match="model 'm' failed: no such folder") as failed:
        await both.result(lambda c: c.wait_ready("m"))
    assert failed.value.reason == "ENGINE_FAILED"
    server.states = [state(model_pb2.MODEL_STATE_DRAINING)]
    with pytest.raises(Unavailable, match="is draining"):
        await both.result(lambda c: c.wait_ready("m"))
    loading = model_pb2.LoadingProgress(phase="loading weights", done=0.5)
    server.states = [state(model_pb2.MODEL_STATE_LOADING, loading=loading)]
    with pytest.raises(DeadlinePassed, match=r"not ready after 0.6 s; it is 50% done \(loading weights\)"):
        await both.result(lambda c: c.wait_ready("m", timeout_s=0.6))
    server.scripts = [[Fails(StatusCode.NOT_FOUND)]]
    with pytest.raises(NotFound):
        await both.result(lambda c: c.wait_ready("m"))


def test_a_server_that_is_not_there_yet_is_waited_for(serve_later: Any) -> None:
    address, start = serve_later
    with Client(address) as client:
        began = time.monotonic()
        with pytest.raises(DeadlinePassed, match="the server has not answered"):
            client.wait_ready(timeout_s=0.5)
        assert time.monotonic() - began < 3
        start()
        assert client.wait_ready(timeout_s=30).state == "ready"


@pytest.fixture
def serve_later() -> Iterator[Any]:
    """An address, and a function that starts a server of one ready model there."""

    class Models(service_pb2_grpc.ModelServiceServicer):
        def GetModel(self, request: Any, context: Any) -> Any:
            return model_pb2.GetModelResponse(model=state(model_pb2.MODEL_STATE_READY))

    server = grpc.server(ThreadPoolExecutor(1))
    service_pb2_grpc.add_ModelServiceServicer_to_server(Models(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    yield f"127.0.0.1:{port}", server.start
    server.stop(0).wait()


METHODS = {
    "InferenceService": {
        "Generate": "generate", "Chat": "chat", "Embed": "embed", "Tokenize": "tokenize",
        "Detokenize": "detokenize",
    },
    "ModelService": {
        "ListModels": "models", "GetModel": "get_model", "LoadAdapter": "load_adapter",
        "UnloadAdapter": "unload_adapter", "ListAdapters": "adapters",
    },
    "AdminService": {
        "GetLoad": "get_load", "Abort": "abort", "ResetPrefixCache": "reset_prefix_cache", "Drain": "drain",
        "WatchKvEvents": "watch_kv_events", "GetRoutes": "get_routes", "SetRoute": "set_route",
        "AddDeployment": "add_deployment", "RemoveDeployment": "remove_deployment",
        "Compare": "compare",
    },
}  # fmt: skip


def test_every_rpc_of_the_contract_has_a_method() -> None:
    for service in service_pb2.DESCRIPTOR.services_by_name.values():
        assert {m.name for m in service.methods} == set(METHODS[service.name])
        for name in METHODS[service.name].values():
            assert callable(getattr(Client, name))
            assert callable(getattr(AsyncClient, name))


@pytest.fixture
async def h(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setattr("twinjet.engines.fake.FakeEngine", FullFakeEngine)
    return await serve({"output": "echo"})


@pytest.fixture(params=[AsyncClient, Client])
async def real(request: pytest.FixtureRequest, h: Harness) -> AsyncIterator[Both]:
    client = request.param(h.server.address, retry=ONCE)
    yield Both(client)
    if isinstance(client, AsyncClient):
        await client.close()
    else:
        await asyncio.to_thread(client.close)


async def test_every_answer_of_the_real_server_is_a_dataclass(h: Harness, real: Both) -> None:
    answers = [
        await real.result(lambda c: c.get_model()),
        *await real.result(lambda c: c.models()),
        *await real.result(lambda c: c.get_load()),
        await real.result(lambda c: c.tokenize("x")),
        await real.result(lambda c: c.embed("x")),
        await real.result(lambda c: c.generate("x", Sampling(max_tokens=2)).completion()),
    ]
    assert await real.result(lambda c: c.load_adapter("a", "/adapters/a")) is False
    with pytest.raises(AlreadyExists):
        await real.result(lambda c: c.load_adapter("a", "/adapters/b"))
    adapters = await real.result(lambda c: c.adapters())
    assert [(a.name, a.path) for a in adapters] == [("a", "/adapters/a")]
    await real.result(lambda c: c.unload_adapter("a"))
    assert await real.result(lambda c: c.adapters()) == []
    assert await real.result(lambda c: c.reset_prefix_cache()) is True
    answers += adapters
    answers.append(await real.result(lambda c: c.drain(0.5)))
    for answer in answers:
        assert dataclasses.is_dataclass(answer)
        for field in dataclasses.fields(answer):
            assert not hasattr(getattr(answer, field.name), "DESCRIPTOR"), field.name
    model = answers[0]
    assert (model.name, model.state, model.loading, model.engine.name) == ("fake", "ready", None, "fake")
    assert model.limits.max_context_tokens == 4096
    assert {"generate", "chat", "adapters", "kv_events"} <= model.capabilities
    assert answers[2].waiting == 0
    assert answers[2].tenants == ()
    assert (await real.result(lambda c: c.get_model())).state == "draining"


async def test_routes_are_read_and_changed(h: Harness, real: Both) -> None:
    before = await real.result(lambda c: c.get_routes())
    assert [(r.model, r.weights) for r in before.routes] == [("fake", {"fake": 1.0})]
    settings = {"engine": "fake", "options": {"output": "echo"}}
    await real.result(lambda c: c.add_deployment("other", settings))
    route = Route("fake", {"fake": 3, "other": 1}, sticky="session")
    now = await real.result(lambda c: c.get_routes())
    assert now.deployments == ("fake", "other")
    revision = await real.result(lambda c: c.set_route(route, revision=now.revision))
    routes = await real.result(lambda c: c.get_routes())
    assert routes == Routes(revision, (route,), ("fake", "other"))
    with pytest.raises(PreconditionFailed) as late:
        await real.result(lambda c: c.set_route(route, revision=before.revision))
    assert (late.value.code, late.value.reason) == ("ABORTED", "REVISION_CHANGED")
    mirrored = Route("fake", {"fake": 1}, mirror=Mirror("other", 0.5))
    await real.result(lambda c: c.set_route(mirrored))
    assert (await real.result(lambda c: c.get_routes())).routes == (mirrored,)
    await real.result(lambda c: c.set_route(Route("fake", {"fake": 1})))
    assert await real.result(lambda c: c.remove_deployment("other", 0)) == Drained(0, 0)
    with pytest.raises(ValueError, match="'always' keeps nothing together"):
        await real.result(lambda c: c.set_route(Route("fake", {"fake": 1}, sticky="always")))


async def test_a_drain_counts_what_it_ended(h: Harness, real: Both) -> None:
    stream = h.inference.Generate(generation_pb2.GenerateRequest(text="!stall"))
    await stream.initial_metadata()
    drained = await real.result(lambda c: c.drain(0.1))
    assert (drained.finished, drained.ended) == (0, 1)


async def test_kv_events_are_watched(h: Harness, real: Both) -> None:
    snapshot, beat = await real.items(lambda c: c.watch_kv_events(heartbeat_s=0.1), most=2)
    assert (snapshot.kind, snapshot.sequence, snapshot.deployment) == ("snapshot_end", len(KV_EVENTS), "fake")
    assert abs(snapshot.time_s - time.time()) < 60
    rest = KvStored((b"\x02",), b"\x01", (7, 8), 2, "salt", "lora", "device")
    assert snapshot.events == (KvCleared(), rest)
    assert (beat.kind, beat.sequence, beat.events) == ("heartbeat", len(KV_EVENTS), ())
    epoch = snapshot.epoch
    (delta,) = await real.items(lambda c: c.watch_kv_events(epoch=epoch, start_sequence=2), most=1)
    assert (delta.kind, delta.sequence, delta.events) == ("delta", 2, (KvRemoved((b"\x01",)),))
    with pytest.raises(DeadlinePassed):
        await real.items(lambda c: c.watch_kv_events(timeout_s=0.5))


async def test_two_deployments_are_compared(h: Harness, real: Both) -> None:
    comparison = Comparison(
        deployment_a="fake", deployment_b="fake", prompts=["a", "b"], output_tokens=2, requests_per_leg=2,
        max_blocks=6, num_answers=2, concurrency=2, ladder=[500.0], ttft_s=30.0, sampling=Sampling(temperature=0.5),
    )  # fmt: skip
    started, *progress, report = await real.items(lambda c: c.compare(comparison))
    assert isinstance(started, CompareStarted) and started.settings_a == started.settings_b
    assert [p.phase for p in progress if p.done == 0] == ["answers", "self", "main", "ladder"]
    assert (
        isinstance(report, CompareReport) and report.outcome != "unknown" and report.words in report.page_html
    )
    assert report.answers.pairs == report.answers.equal_pairs == 2 and report.answers.median_margin is None
    assert [(r.deployment, r.rate) for r in report.rungs] == [("fake", 500.0), ("fake (again)", 500.0)]
    assert report.metrics[0].name == "throughput" and report.metrics[0].ratio is None
    with pytest.raises(BadRequest) as wrong:
        await real.items(lambda c: c.compare(dataclasses.replace(comparison, max_blocks=1)))
    assert [v.field for v in wrong.value.violations] == ["max_blocks"]
    with pytest.raises(BadRequest):
        await real.items(lambda c: c.compare(dataclasses.replace(comparison, concurrency=-1)))


async def test_a_running_request_is_aborted_and_tells_what_had_come(h: Harness, real: Both) -> None:
    options = Options(request_id="mine")

    async def abort() -> None:
        await h.until(lambda: len(h.server.live) == 1)
        await real.result(lambda c: c.abort("mine"))

    aborting = asyncio.create_task(abort())
    with pytest.raises(Cancelled) as caught:
        await real.result(lambda c: c.generate("!stall", options=options).text())
    await aborting
    assert (caught.value.request_id, caught.value.reason) == ("mine", "ABORTED")


ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        inside = name.startswith(("twinjet.client", "twinjet.v1")) or name == "twinjet"
        if top == "twinjet" and not inside:
            raise ImportError(name)
        if top in ("google", "grpc") or top in sys.stdlib_module_names or inside:
            if name.startswith("google.") and not name.startswith(("google.protobuf", "google._upb")):
                raise ImportError(name)
            return None
        if top == "typing_extensions":  # grpcio's own
            return None
        raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import twinjet.client
"""


def test_the_client_needs_grpc_and_protobuf_alone() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_outputs_of_one_stream_keep_apart_and_whole(server: Scripted, both: Both) -> None:
    server.scripts = [[started(), delta("a"), delta("b", 1), finished(1), finished(0), summary()]]
    completion = await both.result(lambda c: c.generate("x").completion())
    assert [o.text for o in completion.outputs] == ["a", "b"]
