"""The dispatcher with a small in-memory engine: hand-over, order, ends of every kind, and what they leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.scheduler.helpers import StepEngine, make_info, make_request, settle
from twinjet.engines.base import EngineInfo, OutputEvent, PromptEvent
from twinjet.errors import (
    AlreadyExists,
    DeadlinePassed,
    EngineDied,
    NotFound,
    Overloaded,
    RequestAborted,
    RequestFailed,
    Unavailable,
)
from twinjet.request import EngineRequest
from twinjet.scheduler import DispatchedEvent, Dispatcher, QueuedEvent, SchedulerSettings, TenantSettings


class Client:
    """Reads one stream in a task; keeps its events and its error."""

    def __init__(self, dispatcher: Dispatcher, request: EngineRequest, *, report_queue: bool = False) -> None:
        self.events: list[object] = []
        self.error: BaseException | None = None
        self.stream = dispatcher.run(request, report_queue=report_queue)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self.stream:
                self.events.append(event)
        except Exception as error:  # noqa: BLE001
            self.error = error

    @property
    def tokens(self) -> int:
        return sum(len(e.token_ids) for e in self.events if isinstance(e, OutputEvent))


def assert_no_trace(dispatcher: Dispatcher, engine: StepEngine) -> None:
    load = dispatcher.load()
    assert (load.waiting, load.running, load.waiting_tokens) == (0, 0, 0)
    assert not load.tenants
    assert not load.request_ids
    assert load.kv_blocks_used in (None, 0)
    assert not engine.running


@pytest.fixture
def engine() -> StepEngine:
    return StepEngine()


def make_dispatcher(engine: StepEngine, info: EngineInfo | None = None, **settings: object) -> Dispatcher:
    dispatcher = Dispatcher(SchedulerSettings.model_validate({"early_tokens": 0, **settings}))
    dispatcher.attach(engine, info or make_info(max_num_seqs=2))  # type: ignore[arg-type]
    return dispatcher


async def test_a_request_streams_the_engines_events_unchanged_after_one_dispatched_event(
    engine: StepEngine,
) -> None:
    dispatcher = make_dispatcher(engine)
    client = Client(dispatcher, make_request("a", max_tokens=3))
    await settle()
    await engine.step(3)
    await client.task
    assert client.error is None
    assert client.events[0] == DispatchedEvent(0, pytest.approx(0, abs=1.0))
    assert client.events[1] == PromptEvent(0)
    assert client.tokens == 3
    assert len(client.events) == 5
    await asyncio.wait_for(dispatcher.wait_idle(), 5)
    assert_no_trace(dispatcher, engine)


async def test_no_more_run_than_the_engine_has_sequences(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine)
    clients = [Client(dispatcher, make_request(f"r{i}", max_tokens=2)) for i in range(5)]
    await settle()
    assert engine.started == ["r0", "r1"]
    assert dispatcher.load().waiting == 3
    await engine.step(2)
    assert engine.started == ["r0", "r1", "r2", "r3"]
    await engine.step(4)
    assert [c.tokens for c in clients] == [2] * 5
    assert_no_trace(dispatcher, engine)


async def test_the_next_request_is_handed_over_just_before_a_slot_is_free(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, make_info(max_num_seqs=1), early_tokens=1)
    clients = [Client(dispatcher, make_request(f"r{i}", max_tokens=3)) for i in range(3)]
    await settle()
    await engine.step()
    assert engine.started == ["r0"]
    await engine.step()
    assert engine.started == ["r0", "r1"]
    assert len(engine.running) == 2
    await engine.step(8)
    assert [c.tokens for c in clients] == [3] * 3
    assert_no_trace(dispatcher, engine)


async def test_a_slot_is_free_with_the_last_token_though_the_reader_stops(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, make_info(max_num_seqs=1))
    slow = dispatcher.run(make_request("slow", max_tokens=1, n=2))
    events = [await anext(slow), await anext(slow)]
    waiting = Client(dispatcher, make_request("next", max_tokens=1))
    await engine.step()
    events += [await anext(slow), await anext(slow)]
    await settle()
    assert dispatcher.load().request_ids == ("next",)
    with pytest.raises(NotFound):
        await dispatcher.abort("slow")
    await engine.step()
    assert waiting.tokens == 1
    dispatcher.detach(EngineDied())
    with pytest.raises(StopAsyncIteration):
        await anext(slow)
    assert_no_trace(dispatcher, engine)


async def test_fcfs_hands_everything_to_the_engine_at_once(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, policy="fcfs", max_waiting=1)
    clients = [Client(dispatcher, make_request(f"r{i}", max_tokens=1)) for i in range(9)]
    await settle()
    assert len(engine.running) == 9
    await engine.step()
    assert all(c.error is None and c.tokens == 1 for c in clients)
    assert_no_trace(dispatcher, engine)


async def test_a_queued_request_reports_its_place_when_asked(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, report_interval_s=0.001)
    clients = [Client(dispatcher, make_request(f"r{i}", max_tokens=2), report_queue=True) for i in range(5)]
    await settle()
    positions = [[e.position for e in c.events if isinstance(e, QueuedEvent)] for c in clients]
    assert positions == [[], [], [0], [1], [2]]
    await engine.step(2)
    await asyncio.wait_for(_until(lambda: len(clients[4].events) > 1), 5)
    assert [e.position for e in clients[4].events if isinstance(e, QueuedEvent)] == [2, 0]
    for _ in range(6):
        await engine.step()
    assert all(c.tokens == 2 for c in clients)
    assert clients[4].events[2].queue_position_at_arrival == 2  # type: ignore[attr-defined]


async def _until(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("queued", "cancel"),
        ("running", "cancel"),
        ("dispatched", "aclose"),
        ("dispatched", "forget"),
        ("between", "aclose"),
        ("between", "forget"),
    ],
)
async def test_leaving_a_stream_leaves_no_trace(engine: StepEngine, where: str, how: str) -> None:
    dispatcher = make_dispatcher(engine, make_info(max_num_seqs=1, num_blocks=64))
    blocker: AsyncIterator[object] | None = None
    if where == "queued":
        blocker = dispatcher.run(make_request("blocker"))
        await anext(blocker)
    stream = dispatcher.run(make_request("a"))
    reads = {"queued": 0, "dispatched": 1, "running": 2, "between": 2}[where]
    for _ in range(reads):
        await anext(stream)
    if how == "cancel":
        task = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    if how == "forget":
        del stream
        await settle()
    else:
        await stream.aclose()  # type: ignore[attr-defined]
    if blocker is not None:
        await blocker.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(dispatcher.wait_idle(), 5)
    assert_no_trace(dispatcher, engine)


async def test_a_deadline_in_the_queue_never_reaches_the_engine(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, make_info(max_num_seqs=1))
    Client(dispatcher, make_request("a"))
    late = Client(dispatcher, make_request("late", deadline=time.monotonic() + 0.02))
    await asyncio.wait_for(late.task, 5)
    assert isinstance(late.error, DeadlinePassed)
    assert engine.started == ["a"]
    assert dispatcher.load().waiting == 0
    assert dispatcher.load().expired == 1
    await engine.step(8)
    assert_no_trace(dispatcher, engine)


async def test_a_deadline_while_running_aborts_in_the_engine(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine)
    late = Client(dispatcher, make_request("late", deadline=time.monotonic() + 0.02))
    await settle()
    await engine.step()
    await asyncio.wait_for(late.task, 5)
    assert isinstance(late.error, DeadlinePassed)
    assert late.tokens == 1
    assert engine.aborted == ["late"]
    assert_no_trace(dispatcher, engine)


async def test_a_deadline_stops_the_engine_even_if_nobody_reads(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine)
    stream = dispatcher.run(make_request("late", deadline=time.monotonic() + 0.02))
    await anext(stream)
    await anext(stream)
    await engine.step()
    await asyncio.wait_for(_until(lambda: dispatcher.load().running == 0), 5)
    with pytest.raises(DeadlinePassed):
        await anext(stream)
    assert engine.aborted == ["late"]
    assert_no_trace(dispatcher, engine)


async def test_abort_ends_a_running_and_a_waiting_stream(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, make_info(max_num_seqs=1))
    running = Client(dispatcher, make_request("running"))
    waiting = Client(dispatcher, make_request("waiting"))
    await settle()
    await dispatcher.abort("waiting")
    await dispatcher.abort("running")
    await asyncio.gather(running.task, waiting.task)
    assert isinstance(running.error, RequestAborted)
    assert isinstance(waiting.error, RequestAborted)
    assert engine.started == engine.aborted == ["running"]
    with pytest.raises(NotFound):
        await dispatcher.abort("running")
    assert_no_trace(dispatcher, engine)


async def test_detach_ends_everything_with_its_error_and_the_next_engine_serves(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, make_info(max_num_seqs=1, num_blocks=64))
    clients = [Client(dispatcher, make_request(f"r{i}")) for i in range(3)]
    await settle()
    await engine.step()
    error = EngineDied()
    running, waiting = dispatcher.load().running, dispatcher.load().waiting
    dispatcher.detach(error)
    await asyncio.wait_for(asyncio.gather(*(c.task for c in clients)), 5)
    assert running > 0
    assert waiting > 0
    for client in clients[:running]:
        assert isinstance(client.error, EngineDied)
        assert client.error.was_running
    assert [c.error for c in clients[running:]] == [error] * waiting
    with pytest.raises(Unavailable) as refused:
        await anext(dispatcher.run(make_request("r0")))
    assert refused.value.reason == "LOADING"
    assert refused.value.retry_after_s > 0
    second = StepEngine()
    dispatcher.attach(second, make_info(max_num_seqs=1))  # type: ignore[arg-type]
    client = Client(dispatcher, make_request("r0", max_tokens=1))
    await settle()
    await second.step()
    assert client.tokens == 1
    assert_no_trace(dispatcher, second)


async def test_drain_refuses_new_requests_and_serves_queued_ones(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, make_info(max_num_seqs=1))
    clients = [Client(dispatcher, make_request(f"r{i}", max_tokens=1)) for i in range(2)]
    await settle()
    dispatcher.drain()
    with pytest.raises(Unavailable) as refused:
        await anext(dispatcher.run(make_request("new")))
    assert refused.value.reason == "DRAINING"
    await engine.step(2)
    assert [c.tokens for c in clients] == [1, 1]
    await asyncio.wait_for(dispatcher.wait_idle(), 5)


async def test_a_failing_request_raises_the_engines_error_and_gives_back_its_slot(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, make_info(max_num_seqs=1, num_blocks=64))
    client = Client(dispatcher, make_request("a"))
    await settle()
    engine.failure = RequestFailed("no")
    await engine.step()
    assert client.error is engine.failure
    assert_no_trace(dispatcher, engine)


async def test_a_full_queue_and_quotas_refuse_with_a_retry_delay(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(
        engine,
        make_info(max_num_seqs=1),
        max_waiting=2,
        tenants={"small": TenantSettings(max_streams=1), "poor": TenantSettings(tokens_per_minute=6)},
    )
    clients = [Client(dispatcher, make_request("s1", tenant="small"))]
    await settle()
    with pytest.raises(Overloaded) as refused:
        await anext(dispatcher.run(make_request("s2", tenant="small")))
    assert refused.value.quotas[0].subject == "tenant:small"
    clients.append(Client(dispatcher, make_request("p1", tenant="poor")))
    await settle()
    with pytest.raises(Overloaded) as refused:
        await anext(dispatcher.run(make_request("p2", tenant="poor")))
    assert refused.value.quotas[0].subject == "tenant:poor"
    assert refused.value.retry_after_s == pytest.approx(20, rel=0.01)
    clients.append(Client(dispatcher, make_request("x1")))
    await settle()
    delays = []
    for i in range(3):
        with pytest.raises(Overloaded) as refused:
            await anext(dispatcher.run(make_request(f"y{i}")))
        assert refused.value.quotas == ()
        delays.append(refused.value.retry_after_s)
    assert delays == sorted(delays)
    assert delays[0] > 0
    with pytest.raises(AlreadyExists):
        await anext(dispatcher.run(make_request("x1")))
    await engine.step(3 * 8)
    assert [c.tokens for c in clients] == [8, 8, 8]
    assert dispatcher.load().refused == 5
    assert_no_trace(dispatcher, engine)


async def test_an_outside_cancellation_wins_over_an_abort_of_the_same_moment(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine)
    client = Client(dispatcher, make_request("a"))
    await settle()
    client.task.cancel()
    await dispatcher.abort("a")
    with pytest.raises(asyncio.CancelledError):
        await client.task
    await asyncio.wait_for(dispatcher.wait_idle(), 5)
    assert_no_trace(dispatcher, engine)


async def test_a_waiting_request_cancelled_as_a_slot_frees_harms_nobody(engine: StepEngine) -> None:
    dispatcher = make_dispatcher(engine, make_info(max_num_seqs=1))
    running = Client(dispatcher, make_request("running", max_tokens=1))
    await settle()
    cancelled = Client(dispatcher, make_request("cancelled"))
    waiting = Client(dispatcher, make_request("waiting", max_tokens=1))
    await settle()
    # Both become ready to run in one turn of the loop: first the one that frees the slot.
    engine.running["running"].put_nowait(True)
    cancelled.task.cancel()
    await settle()
    assert cancelled.task.cancelled()
    assert (running.error, running.tokens) == (None, 1)
    await engine.step()
    await waiting.task
    assert (waiting.error, waiting.tokens) == (None, 1)
    assert_no_trace(dispatcher, engine)
