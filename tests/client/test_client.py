"""Both clients against a scripted server on a real socket; each test runs with both."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from grpc import StatusCode

import twinjet.client
from tests.client.scripted import Fails, Scripted, Stalls, delta, finished, started, summary, whole
from twinjet.client import (
    AccessDenied,
    AlreadyExists,
    AsyncClient,
    BadRequest,
    Cancelled,
    Client,
    Constraint,
    DeadlinePassed,
    Delta,
    Finished,
    IncompleteStream,
    Message,
    NotFound,
    NotSupported,
    Options,
    Overloaded,
    PreconditionFailed,
    RetryPolicy,
    Sampling,
    ServerFailure,
    Started,
    Summary,
    TwinjetClientError,
    Unavailable,
)
from twinjet.client._channel import CHANNEL_OPTIONS
from twinjet.v1 import generation_pb2

QUICK = RetryPolicy(attempts=3, first_delay_s=0.01, max_delay_s=5.0)

Run = Callable[[Callable[[Any], Any]], Awaitable[Any]]


@pytest.fixture(params=["aio", "sync"])
async def run(request: pytest.FixtureRequest, server: Scripted) -> AsyncIterator[Run]:
    """Await or run something of a client: run(lambda c: c.tokenize("x")); streams are read to a list."""
    options: dict[str, Any] = {"retry": QUICK, "token": "secret"}
    if request.param == "aio":
        async with AsyncClient(server.address, **options) as client:

            async def with_aio(use: Callable[[Any], Any]) -> Any:
                result = use(client)
                if hasattr(result, "__aiter__"):
                    return [item async for item in result]
                return await result

            yield with_aio
    else:
        with Client(server.address, **options) as blocking:

            async def with_sync(use: Callable[[Any], Any]) -> Any:
                def work() -> Any:
                    result = use(blocking)
                    return (
                        list(result) if hasattr(result, "__next__") or hasattr(result, "pieces") else result
                    )

                return await asyncio.to_thread(work)

            yield with_sync


async def test_events_come_typed_and_in_order(server: Scripted, run: Run) -> None:
    server.scripts = [[started(cached_prompt_tokens=0), delta("he"), delta("llo"), finished(), summary()]]
    events = await run(lambda c: c.generate("x"))
    assert [type(e) for e in events] == [Started, Delta, Delta, Finished, Summary]
    assert events[0].cached_prompt_tokens == 0
    assert events[1] == Delta(0, "he", (2,), ())
    assert (events[3].reason, events[3].stopped_by, events[3].is_eos) == ("stop", 2, True)
    assert events[4].seed == 2**64 - 1
    assert events[4].usage.cached_prompt_tokens is None
    assert (events[4].timings.queue_s, events[4].timings.total_s) == (0.5, 2.0)
    assert events[4].timings.per_token_s is None


async def test_text_pieces_and_completion(server: Scripted, run: Run) -> None:
    server.scripts = [whole("he", "", "llo")]
    assert await run(lambda c: c.chat("x").text()) == "hello"
    assert await run(lambda c: c.chat("x").pieces()) == ["he", "llo"]
    logprobs = [
        generation_pb2.TokenLogprobs(
            chosen=generation_pb2.Logprob(token_id=1, logprob=-1.5, text="b"),
            top=[generation_pb2.Logprob(token_id=1, logprob=-1.5, rank=1, text="b")],
        )
    ]
    server.scripts = [
        [
            started(), delta("a", 1), delta("b", 0, logprobs=logprobs), delta("c", 1), finished(1, reason=2),
            finished(0, stop_string="!"), summary(),
        ]
    ]  # fmt: skip
    completion = await run(lambda c: c.generate([1, 2]).completion())
    assert [o.text for o in completion.outputs] == ["b", "ac"]
    assert completion.text == "b"
    assert completion.outputs[0].finished.stopped_by == "!"
    assert completion.outputs[1].finished.reason == "length"
    assert completion.outputs[0].logprobs[0].chosen.rank is None
    assert completion.outputs[0].logprobs[0].top[0].rank == 1
    assert completion.outputs[1].token_ids == (1, 1)


async def test_everything_said_reaches_the_server(server: Scripted, run: Run) -> None:
    sampling = Sampling(
        temperature=0.0, top_k=0, n=2, stop=("a", "b"), logit_bias={3: -1.0}, seed=7, skip_special_tokens=False,
        constraint=Constraint("choice", choices=("x", "y")),
    )  # fmt: skip
    options = Options(request_id="mine", priority=0, tenant="t", report_queue=True)
    await run(lambda c: c.generate([5, 6], sampling, model="m", options=options))
    sent = server.requests[-1]
    assert (sent.model, sent.text, list(sent.token_ids)) == ("m", "", [5, 6])
    assert sent.sampling.HasField("temperature")
    assert sent.sampling.temperature == 0.0
    assert sent.sampling.HasField("top_k")
    assert not sent.sampling.HasField("top_p")
    assert list(sent.sampling.stop) == ["a", "b"]
    assert dict(sent.sampling.logit_bias) == {3: -1.0}
    assert list(sent.sampling.constraint.choice.values) == ["x", "y"]
    assert sent.options.HasField("priority")
    assert (sent.options.request_id, sent.options.tenant, sent.options.report_queue) == ("mine", "t", True)
    assert server.metadata[-1]["authorization"] == "Bearer secret"

    turns = [Message("system", "s"), Message("assistant", "a")]
    await run(lambda c: c.chat(turns, continue_final_message=True))
    sent = server.requests[-1]
    assert [(m.role, m.content) for m in sent.messages] == [("system", "s"), ("assistant", "a")]
    assert sent.continue_final_message
    assert not sent.HasField("sampling")


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (Constraint("json_object"), ("json_object", True)),
        (Constraint("json_schema", "{}"), ("json_schema", "{}")),
        (Constraint("regex", "a+"), ("regex", "a+")),
        (Constraint("ebnf", 'root ::= "a"'), ("ebnf", 'root ::= "a"')),
    ],
)
async def test_each_kind_of_constraint(
    server: Scripted, run: Run, constraint: Constraint, expected: tuple[str, object]
) -> None:
    await run(lambda c: c.generate("x", Sampling(constraint=constraint)))
    sent = server.requests[-1].sampling.constraint
    kind = sent.WhichOneof("kind")
    assert (kind, getattr(sent, kind)) == expected


async def test_unary_calls(server: Scripted, run: Run) -> None:
    server.scripts = [[]]
    tokens = await run(lambda c: c.tokenize("ab", add_special_tokens=False))
    assert (tokens.token_ids, tokens.text, tokens.max_context_tokens) == ((1, 2), "ab", 8)
    assert server.requests[-1].HasField("add_special_tokens")
    await run(lambda c: c.tokenize([Message("user", "hi")]))
    assert (server.requests[-1].text, server.requests[-1].messages[0].content) == ("", "hi")
    assert await run(lambda c: c.detokenize([1, 2])) == "ab"
    embedded = await run(lambda c: c.embed(["a", [1, 2]], dimensions=2))
    assert embedded.vectors == ((0.5, 1.0), (0.5, 1.0))
    assert embedded.usage.prompt_tokens == 4
    assert [(i.text, list(i.token_ids)) for i in server.requests[-1].inputs] == [("a", []), ("", [1, 2])]
    assert [m.name for m in await run(lambda c: c.models())] == ["m"]
    assert (await run(lambda c: c.get_model("other"))).name == "other"
    load = (await run(lambda c: c.get_load()))[0]
    assert (load.waiting, load.running, load.engine_running) == (0, 3, None)
    await run(lambda c: c.abort("r1"))
    assert server.requests[-1].request_id == "r1"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (StatusCode.INVALID_ARGUMENT, BadRequest),
        (StatusCode.NOT_FOUND, NotFound),
        (StatusCode.ALREADY_EXISTS, AlreadyExists),
        (StatusCode.UNIMPLEMENTED, NotSupported),
        (StatusCode.PERMISSION_DENIED, AccessDenied),
        (StatusCode.UNAUTHENTICATED, AccessDenied),
        (StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (StatusCode.UNAVAILABLE, Unavailable),
        (StatusCode.DEADLINE_EXCEEDED, DeadlinePassed),
        (StatusCode.CANCELLED, Cancelled),
        (StatusCode.FAILED_PRECONDITION, PreconditionFailed),
        (StatusCode.ABORTED, PreconditionFailed),
        (StatusCode.INTERNAL, ServerFailure),
        (StatusCode.DATA_LOSS, ServerFailure),
    ],
)
async def test_each_status_has_its_exception(
    server: Scripted, run: Run, code: StatusCode, kind: type[TwinjetClientError]
) -> None:
    server.scripts = [[started(), Fails(code, "why not", reason="SOME_REASON")]]
    with pytest.raises(TwinjetClientError) as caught:
        await run(lambda c: c.generate("x"))
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.reason) == (code.name, "SOME_REASON")
    assert caught.value.message == "why not"
    with pytest.raises(kind):
        await run(lambda c: c.generate("x").text())


async def test_details_are_read(server: Scripted, run: Run) -> None:
    bad = {"sampling.top_p": "7 is out of range", "text": "is empty"}
    server.scripts = [[Fails(StatusCode.INVALID_ARGUMENT, reason="INVALID", violations=bad)]]
    with pytest.raises(BadRequest) as refused:
        await run(lambda c: c.tokenize("x"))
    assert {v.field: v.message for v in refused.value.violations} == bad
    server.scripts = [[Fails(StatusCode.UNIMPLEMENTED, reason="NO", metadata={"capability": "embed"})]]
    with pytest.raises(NotSupported) as lacking:
        await run(lambda c: c.embed(["x"]))
    assert lacking.value.capability == "embed"


@pytest.mark.parametrize(
    "failure",
    [
        Fails(StatusCode.UNAVAILABLE),
        Fails(StatusCode.UNAVAILABLE, reason="LOADING", retry_after_s=0.02),
        Fails(StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_after_s=0.02),
    ],
)
async def test_what_never_began_is_tried_again(server: Scripted, run: Run, failure: Fails) -> None:
    server.scripts = [[failure], [failure], whole("hello")]
    assert await run(lambda c: c.generate("x").text()) == "hello"
    assert server.num_calls == 3
    server.requests.clear()
    server.scripts = [[failure], []]
    assert (await run(lambda c: c.tokenize("x"))).token_ids == (1, 2)
    assert server.num_calls == 2


async def test_tries_are_bounded(server: Scripted, run: Run) -> None:
    server.scripts = [[Fails(StatusCode.UNAVAILABLE)]]
    with pytest.raises(Unavailable):
        await run(lambda c: c.generate("x"))
    assert server.num_calls == QUICK.attempts


@pytest.mark.parametrize(
    "failure",
    [
        Fails(StatusCode.RESOURCE_EXHAUSTED),
        Fails(StatusCode.RESOURCE_EXHAUSTED, retry_after_s=60.0),
        Fails(StatusCode.UNAVAILABLE, retry_after_s=60.0),
        Fails(StatusCode.UNAVAILABLE, reason="ENGINE_DIED_RUNNING"),
        Fails(StatusCode.INTERNAL, retry_after_s=0.01),
        Fails(StatusCode.INVALID_ARGUMENT),
        Fails(StatusCode.ALREADY_EXISTS),
    ],
)
async def test_what_would_not_help_is_not_tried_again(server: Scripted, run: Run, failure: Fails) -> None:
    server.scripts = [[failure]]
    with pytest.raises(TwinjetClientError) as caught:
        await run(lambda c: c.generate("x"))
    assert caught.value.code == failure.code.name
    assert server.num_calls == 1


async def test_what_has_begun_is_never_tried_again(server: Scripted, run: Run) -> None:
    server.scripts = [[started(), Fails(StatusCode.UNAVAILABLE, retry_after_s=0.01)]]
    with pytest.raises(Unavailable) as caught:
        await run(lambda c: c.generate("x"))
    assert caught.value.retry_after_s == pytest.approx(0.01)
    assert server.num_calls == 1


async def test_the_servers_delay_is_waited_for(server: Scripted, run: Run) -> None:
    server.scripts = [[Fails(StatusCode.UNAVAILABLE, retry_after_s=0.5)], whole("hello")]
    began = time.monotonic()
    assert await run(lambda c: c.generate("x").text()) == "hello"
    assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("model", ["m", "m" * 200])
async def test_health_ends_a_wait_early(server: Scripted, run: Run, model: str) -> None:
    server.scripts = [[Fails(StatusCode.UNAVAILABLE, retry_after_s=5.0)], whole("hello")]
    server.health = [b"\x08\x02", b"\x08\x01"]
    began = time.monotonic()
    assert await run(lambda c: c.generate("x", model=model).text()) == "hello"
    assert time.monotonic() - began < 4.0
    assert server.watched == [b"\x0a\x01m" if model == "m" else b""]


async def test_a_wait_lasts_where_health_stays_bad_or_is_not_told(server: Scripted, run: Run) -> None:
    for health in ([b"\x08\x02"], None):
        server.requests.clear()
        server.scripts = [[Fails(StatusCode.UNAVAILABLE, retry_after_s=0.5)], whole("hello")]
        server.health = health
        began = time.monotonic()
        assert await run(lambda c: c.generate("x").text()) == "hello"
        assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("kind", ["aio", "sync"])
async def test_a_server_that_is_away_is_looked_for_every_second(kind: str) -> None:
    """Each try to connect is cut at once, as by a port where nobody listens yet, but so that it can be counted."""
    tries: list[float] = []
    enough = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tries.append(time.monotonic())
        writer.transport.abort()
        if len(tries) == 6:
            enough.set()

    listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    policy = RetryPolicy(attempts=100, first_delay_s=0.1, max_delay_s=0.1)
    async with listener:
        if kind == "aio":
            async with AsyncClient(address, retry=policy) as client:
                asking = asyncio.create_task(client.tokenize("x"))
                await asyncio.wait_for(enough.wait(), 30)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        else:
            with Client(address, retry=policy, timeout_s=8.0) as blocking:
                asking = asyncio.create_task(asyncio.to_thread(blocking.tokenize, "x"))
                await asyncio.wait_for(enough.wait(), 30)
            await asyncio.gather(asking, return_exceptions=True)
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert max(gaps) < 2.0
    # gRPC's own bound, two minutes, shows only after more tries than a test has time for.
    assert dict(CHANNEL_OPTIONS)["grpc.max_reconnect_backoff_ms"] == 1000


async def test_no_try_begins_that_the_deadline_would_cut(server: Scripted, run: Run) -> None:
    server.scripts = [[Fails(StatusCode.UNAVAILABLE, retry_after_s=4.0)]]
    began = time.monotonic()
    with pytest.raises(Unavailable):
        await run(lambda c: c.generate("x", timeout_s=2.0))
    assert time.monotonic() - began < 2.0
    assert server.num_calls == 1


async def test_tries_share_one_deadline(server: Scripted, run: Run) -> None:
    server.scripts = [[Fails(StatusCode.UNAVAILABLE, retry_after_s=0.3)], whole("hello")]
    await run(lambda c: c.generate("x", timeout_s=10.0))
    first_s, second_s = server.time_left_s
    assert first_s is not None
    assert second_s is not None
    assert second_s < first_s - 0.25


async def test_a_deadline_ends_a_silent_stream(server: Scripted, run: Run) -> None:
    server.scripts = [[started(), Stalls()]]
    with pytest.raises(DeadlinePassed):
        await run(lambda c: c.generate("x", timeout_s=0.3))
    assert await asyncio.to_thread(server.cancelled.wait, 5.0)


async def test_a_stream_cut_short_is_not_taken_for_whole(server: Scripted, run: Run) -> None:
    for script in ([started(), delta("a"), finished()], [], [started(), summary(), delta("more")]):
        server.scripts = [script]
        with pytest.raises(IncompleteStream):
            await run(lambda c: c.generate("x").text())


async def test_a_failure_behind_the_summary_is_a_failure(server: Scripted, run: Run) -> None:
    server.scripts = [[*whole("a"), Fails(StatusCode.INTERNAL)]]
    with pytest.raises(ServerFailure):
        await run(lambda c: c.generate("x").text())


async def test_events_of_a_newer_contract_are_passed_over(server: Scripted, run: Run) -> None:
    unknown = generation_pb2.GenerateResponse.FromString(b"\xfa\x01\x00")
    server.scripts = [[started(), unknown, delta("a"), finished(), summary()]]
    assert await run(lambda c: c.generate("x").text()) == "a"


async def test_leaving_an_async_stream_cancels_the_call(server: Scripted) -> None:
    server.scripts = [[started(), Stalls()]]
    async with AsyncClient(server.address) as client:
        async with client.generate("x") as stream:
            async for event in stream:
                assert isinstance(event, Started)
                break
        assert await asyncio.to_thread(server.cancelled.wait, 5.0)


async def test_cancelling_the_reading_task_cancels_the_call(server: Scripted) -> None:
    server.scripts = [[started(), Stalls()]]
    async with AsyncClient(server.address) as client:
        has_begun = asyncio.Event()

        async def read() -> None:
            async for _ in client.generate("x"):
                has_begun.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(has_begun.wait(), 5.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.cancelled.wait, 5.0)


def test_leaving_a_blocking_stream_cancels_the_call(server: Scripted) -> None:
    server.scripts = [[started(), Stalls()]]
    with Client(server.address) as client:
        with client.generate("x") as stream:
            assert isinstance(next(iter(stream)), Started)
        assert server.cancelled.wait(5.0)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with Client("127.0.0.1:1", retry=RetryPolicy(attempts=2, first_delay_s=0.01)) as client:
        with pytest.raises(Unavailable) as caught:
            client.generate("x").text()
        assert caught.value.reason == ""


def test_unreadable_details_are_no_details() -> None:
    class Odd(grpc.RpcError):
        def code(self) -> StatusCode:
            return StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "proxy"

        def trailing_metadata(self) -> list[tuple[str, bytes]]:
            return [("grpc-status-details-bin", b"\xff\xff\xff")]

    from twinjet.client._errors import from_rpc_error

    error = from_rpc_error(Odd())
    assert (type(error), error.violations, error.retry_after_s) == (Unavailable, (), None)


def test_all_names_what_the_package_exports() -> None:
    exported = {n for n, v in vars(twinjet.client).items() if isinstance(v, type) and not n.startswith("_")}
    assert exported - set(twinjet.client.__all__) == set()
    for name in twinjet.client.__all__:
        assert hasattr(twinjet.client, name)


def test_the_two_clients_offer_the_same() -> None:
    def surface(kind: type) -> set[str]:
        return {n for n in vars(kind) if not n.startswith("_")}

    assert surface(AsyncClient) == surface(Client)
    assert dataclasses.is_dataclass(Options)
