"""Requests whose deployment is lost before they have said anything go on at another one, and say it once."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import pytest

from tests.server.harness import Harness, Serve, collect, details, kinds, text_of
from twinjet.engines.fake import FakeEngine
from twinjet.request import EngineRequest
from twinjet.server import failover
from twinjet.v1 import generation_pb2, routing_pb2, sampling_pb2

FAKE: dict[str, Any] = {"engine": "fake"}
TO_B = {"m": {"weights": {"a": 1}, "fallback": ["b"]}}


def _request(text: str = "x", max_tokens: int = 4, **options: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        model="m",
        text=text,
        sampling=sampling_pb2.SamplingParams(max_tokens=max_tokens),
        options=generation_pb2.RequestOptions(**options),
    )


def _engine(h: Harness, name: str) -> FakeEngine:
    """The first engine of a deployment."""
    return next(e for e in h.engines if isinstance(e, FakeEngine) and e._name == name)


def _received(engine: FakeEngine) -> list[EngineRequest]:
    """What an engine is given from now on."""
    seen: list[EngineRequest] = []
    submit = engine.submit

    def recording(request: EngineRequest, run: Any) -> None:
        seen.append(request)
        submit(request, run)

    engine.submit = recording  # type: ignore[method-assign]
    return seen


def _hold(engine: FakeEngine) -> asyncio.Event:
    """Keep an engine from making a step until the event is set."""
    may_go = asyncio.Event()

    async def pause(step_s: float) -> None:
        await may_go.wait()

    engine._pause = pause  # type: ignore[method-assign]
    return may_go


def _die_in_step(engine: FakeEngine, number: int) -> None:
    """Let an engine die when it begins a step."""
    steps, pause = [0], engine._pause

    async def counting(step_s: float) -> None:
        steps[0] += 1
        if steps[0] == number:
            engine.die()
        await pause(step_s)

    engine._pause = counting  # type: ignore[method-assign]


async def _moved(h: Harness, state: str, source: str = "a", target: str = "b") -> float:
    labels = {"model": "m", "source": source, "target": target, "state": state}
    return h.server.metrics.registry.get_sample_value("twinjet_requests_moved_total", labels) or 0.0


async def _error(call: Any, messages: list[generation_pb2.GenerateResponse] | None = None) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call, messages)
    return caught.value


def _check_whole(messages: list[generation_pb2.GenerateResponse], max_tokens: int) -> None:
    """One answer, told once, from its beginning to its end."""
    found = [kind for kind in kinds(messages) if kind != "queued"]
    assert found[0] == "started" and found.count("started") == 1
    assert found[-2:] == ["finished", "summary"] and set(found[1:-2]) <= {"delta"}
    assert sum(len(m.delta.token_ids) for m in messages) == max_tokens
    assert messages[-1].summary.usage.output_tokens == max_tokens


async def test_requests_that_wait_or_run_without_a_token_go_on_elsewhere(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE | {"options": {"max_num_seqs": 2}}, "b": FAKE}, routes=TO_B)
    a, b = _engine(h, "a"), _engine(h, "b")
    _hold(a)
    at_a, at_b = _received(a), _received(b)
    calls = [asyncio.create_task(collect(h.inference.Generate(_request(f"p{i}")))) for i in range(8)]
    await h.until(lambda: h.server.deployments.by_name["a"].dispatcher.totals().waiting == 6)
    assert len(at_a) == 2
    a.die()
    answers = await asyncio.gather(*calls)
    assert {m[0].started.deployment for m in answers} == {"b"}
    for messages in answers:
        _check_whole(messages, 4)
    assert len(at_b) == 8
    assert (await _moved(h, "running"), await _moved(h, "waiting")) == (2, 6)
    await h.until(lambda: len(h.server.live) == 0)


async def test_seed_deadline_and_address_are_those_of_the_first_attempt(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE, "b": FAKE}, routes=TO_B)
    a, b = _engine(h, "a"), _engine(h, "b")
    _hold(a)
    at_a, at_b = _received(a), _received(b)
    call = asyncio.create_task(collect(h.inference.Generate(_request(), timeout=60)))
    await h.until(lambda: len(at_a) == 1)
    a.die()
    messages = await call
    (first,), (second,) = at_a, at_b
    assert second.sampling == first.sampling and second.deadline == first.deadline is not None
    assert second.client_address == first.client_address == "ipv4:127.0.0.1"
    assert messages[-1].summary.seed == first.sampling.seed
    again = _request()
    again.sampling.seed = first.sampling.seed
    assert text_of(await collect(h.inference.Generate(again))) == text_of(messages)


async def test_a_deadline_that_passes_on_the_way_ends_the_request(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE, "b": FAKE}, routes=TO_B)
    _hold(_engine(h, "a"))
    _hold(_engine(h, "b"))
    at_b = _received(_engine(h, "b"))
    call = asyncio.create_task(_error(h.inference.Generate(_request(), timeout=1.5)))
    await h.until(lambda: len(h.server.live) > 0)
    _engine(h, "a").die()
    await h.until(lambda: len(at_b) == 1 or call.done())
    assert (await call).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await h.until(lambda: len(h.server.live) == 0)


async def test_a_conversation_goes_on_elsewhere(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE, "b": FAKE}, routes=TO_B)
    _hold(_engine(h, "a"))
    chat = generation_pb2.ChatRequest(
        model="m", messages=[generation_pb2.ChatMessage(role="user", content="hello")]
    )
    chat.sampling.max_tokens = 4
    call = asyncio.create_task(collect(h.inference.Chat(chat)))
    await h.until(lambda: len(h.server.live) > 0)
    _engine(h, "a").die()
    _check_whole(await call, 4)


async def test_places_in_the_queue_are_told_before_and_after(serve: Serve) -> None:
    h = await serve(deployments={n: FAKE | {"options": {"max_num_seqs": 1}} for n in "ab"}, routes=TO_B)
    a, b = _engine(h, "a"), _engine(h, "b")
    _hold(a)
    may_go = _hold(b)
    calls = [
        asyncio.create_task(collect(h.inference.Generate(_request(report_queue=True)))) for _ in range(3)
    ]
    totals = {n: h.server.deployments.by_name[n].dispatcher.totals for n in "ab"}
    await h.until(lambda: totals["a"]().waiting == 2)
    a.die()
    await h.until(lambda: totals["b"]().waiting == 2)
    may_go.set()
    for messages in await asyncio.gather(*calls):
        _check_whole(messages, 4)
        found = kinds(messages)
        assert "queued" not in found[found.index("started") :]


async def test_what_has_begun_stays_and_ends(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE, "b": FAKE}, routes=TO_B)
    at_b = _received(_engine(h, "b"))
    messages: list[generation_pb2.GenerateResponse] = []
    error = await _error(h.inference.Generate(_request("!die:3", max_tokens=50)), messages)
    assert details(error)["ErrorInfo"].reason == "ENGINE_DIED_RUNNING"
    assert kinds(messages)[0] == "started" and "summary" not in kinds(messages)
    assert not at_b and await _moved(h, "running") == 0


async def test_a_request_that_ends_engines_ends_two_and_then_all_like_it_stay(serve: Serve) -> None:
    h = await serve(
        deployments=dict.fromkeys("abcd", FAKE),
        routes={"m": {"weights": {"a": 1}, "fallback": ["b", "c", "d"]}},
    )
    deployments = h.server.deployments.by_name
    error = await _error(h.inference.Generate(_request("!die")))
    found = details(error)
    assert found["ErrorInfo"].reason == "ENGINE_DIED_RUNNING" and "RetryInfo" not in found
    assert await _moved(h, "running") == 1
    assert deployments["c"].supervisor.num_restarts == deployments["d"].supervisor.num_restarts == 0
    # Requests that an engine had do not move now; those that waited do.
    await h.admin.SetRoute(
        routing_pb2.SetRouteRequest(route=routing_pb2.Route(model="m", weights={"c": 1.0}, fallback=["d"]))
    )
    c = _engine(h, "c")
    _hold(c)
    at_c = _received(c)
    call = asyncio.create_task(_error(h.inference.Generate(_request())))
    await h.until(lambda: len(at_c) == 1)
    c.die()
    assert details(await call)["ErrorInfo"].reason == "ENGINE_DIED_RUNNING"


async def test_the_suspension_ends(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE, "b": FAKE}, routes=TO_B)
    now = [100.0]
    moves = failover.Failover(h.server.deployments, h.server.metrics, clock=lambda: now[0])
    moves.suspend()
    assert moves.is_suspended
    now[0] += failover.SUSPENSION_S
    assert not moves.is_suspended


async def test_without_another_deployment_the_loss_is_told(serve: Serve) -> None:
    h = await serve(
        deployments={"a": FAKE | {"options": {"max_num_seqs": 1}}}, routes={"m": {"weights": {"a": 1}}}
    )
    a = _engine(h, "a")
    _hold(a)
    calls = [asyncio.create_task(_error(h.inference.Generate(_request()))) for _ in range(2)]
    await h.until(lambda: h.server.deployments.by_name["a"].dispatcher.totals().waiting == 1)
    a.die()
    reasons = {details(await call)["ErrorInfo"].reason for call in calls}
    assert reasons == {"ENGINE_DIED_RUNNING", "ENGINE_DIED"}


async def test_a_deployment_that_cannot_take_it_is_passed_over(serve: Serve) -> None:
    small = FAKE | {"options": {"max_context_tokens": 8}}
    h = await serve(
        deployments={"a": FAKE, "small": small, "b": FAKE},
        routes={"m": {"weights": {"a": 1}, "fallback": ["small", "b"]}},
    )
    for target, told in (("b", None), ("small", "ENGINE_DIED_RUNNING")):
        if target == "small":
            await h.until_ready()
            await h.admin.SetRoute(
                routing_pb2.SetRouteRequest(
                    route=routing_pb2.Route(model="m", weights={"b": 1.0}, fallback=["small"])
                )
            )
        first = _engine(h, "a" if target == "b" else "b")
        _hold(first)
        seen = _received(first)
        call = asyncio.create_task(collect(h.inference.Generate(_request("a long prompt"))))
        await h.until(lambda seen=seen: len(seen) == 1)
        first.die()
        if told is None:
            assert (await call)[0].started.deployment == target
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert details(caught.value)["ErrorInfo"].reason == told


async def test_a_removed_deployment_hands_over_what_it_has_not_begun(serve: Serve) -> None:
    h = await serve(
        deployments={"a": FAKE | {"options": {"max_num_seqs": 1}}, "b": FAKE},
        routes={"m": {"weights": {"a": 1}}},
    )
    _hold(_engine(h, "a"))
    calls = [asyncio.create_task(collect(h.inference.Generate(_request()))) for _ in range(3)]
    await h.until(lambda: h.server.deployments.by_name["a"].dispatcher.totals().waiting == 2)
    await h.admin.SetRoute(
        routing_pb2.SetRouteRequest(route=routing_pb2.Route(model="m", weights={"b": 1.0}))
    )
    remove = routing_pb2.RemoveDeploymentRequest(name="a")
    remove.grace.FromMilliseconds(1)
    await h.admin.RemoveDeployment(remove)
    for messages in await asyncio.gather(*calls):
        assert messages[0].started.deployment == "b"
        _check_whole(messages, 4)


async def test_a_copy_is_made_once(serve: Serve) -> None:
    h = await serve(
        deployments=dict.fromkeys("abc", FAKE),
        routes={"m": {"weights": {"a": 1}, "fallback": ["b"], "mirror": "c", "mirror_share": 1.0}},
    )
    _hold(_engine(h, "a"))
    at_c = _received(_engine(h, "c"))
    call = asyncio.create_task(collect(h.inference.Generate(_request())))
    await h.until(lambda: len(h.server.live) > 0)
    _engine(h, "a").die()
    _check_whole(await call, 4)
    assert h.server.mirror.counts["copied"] == len(at_c) == 1


async def test_a_client_that_leaves_on_the_way_leaves_nothing(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE, "b": FAKE}, routes=TO_B)
    _hold(_engine(h, "a"))
    _hold(_engine(h, "b"))
    at_b = _received(_engine(h, "b"))
    call = h.inference.Generate(_request())
    task = asyncio.create_task(collect(call))
    await h.until(lambda: len(h.server.live) > 0)
    _engine(h, "a").die()
    await h.until(lambda: len(at_b) == 1)
    call.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await h.until(lambda: len(h.server.live) == 0)
    await h.until(lambda: not h.server.deployments.by_name["b"].dispatcher.load().request_ids)


@pytest.mark.parametrize("seed", range(4))
async def test_whenever_engines_die_nothing_is_said_twice(serve: Serve, seed: int) -> None:
    """Three of four deployments die at random steps under load: whole answers, or beginnings of them."""
    rng = random.Random(seed)
    options = {"max_num_seqs": 3, "prefill_token_s": 0.0005}
    names = "abcd"
    h = await serve(
        deployments={n: FAKE | {"options": options} for n in names},
        routes={"m": {"weights": dict.fromkeys(names, 1.0)}},
    )
    for name in rng.sample(names, 3):
        _die_in_step(_engine(h, name), rng.randint(1, 12))
    prompts = [f"prompt {i}" for i in range(40)]
    tokens = [rng.randint(1, 8) for _ in prompts]
    heard: list[list[generation_pb2.GenerateResponse]] = [[] for _ in prompts]

    async def ask(i: int) -> bool:
        request = _request(prompts[i], tokens[i])
        request.sampling.seed = i
        try:
            await collect(h.inference.Generate(request), heard[i])
        except grpc.aio.AioRpcError as error:
            assert details(error)["ErrorInfo"].reason == "ENGINE_DIED_RUNNING"
            return False
        return True

    done = await asyncio.gather(*(ask(i) for i in range(len(prompts))))
    reference = await serve(deployments={"a": FAKE}, routes={"m": {"weights": {"a": 1}}})
    for i, is_whole in enumerate(done):
        request = _request(prompts[i], tokens[i])
        request.sampling.seed = i
        expected = text_of(await collect(reference.inference.Generate(request)))
        said = text_of(heard[i])
        if is_whole:
            _check_whole(heard[i], tokens[i])
            assert said == expected
            continue
        found = kinds(heard[i])
        assert expected.startswith(said) and "summary" not in found and found.count("started") <= 1
    # Only what ran in the three when they died is lost; each was handed no more than its next request early.
    assert len(done) - sum(done) <= 3 * 2 * options["max_num_seqs"]
