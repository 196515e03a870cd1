"""Tickets: what the dispatcher does for requests whose tokens it never sees, on the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.scheduler.helpers import make_request
from twinjet.engines.fake import FakeEngine
from twinjet.engines.text import make_stream
from twinjet.errors import DeadlinePassed, EngineDied, Overloaded, RequestAborted, SlowReader
from twinjet.request import EngineRequest
from twinjet.scheduler import Dispatcher, SchedulerSettings, TenantSettings
from twinjet.scheduler.ticket import Ticket
from twinjet.v1 import generation_pb2 as pb

EMPTY = (0, 0, 0)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine("fake", {"max_num_seqs": 2, "step_s": 0.001})
    await engine.start(lambda _: None)
    yield engine
    await engine.stop()


def make_dispatcher(engine: FakeEngine, **settings: Any) -> Dispatcher:
    dispatcher = Dispatcher(SchedulerSettings.model_validate({"early_tokens": 0, **settings}))
    dispatcher.attach(engine, engine.describe())
    return dispatcher


def request(name: str, **options: Any) -> EngineRequest:
    return make_request(name, prompt=(97, 98, 99), **{"ignore_eos": True} | options)


def begin(dispatcher: Dispatcher, wanted: EngineRequest, **options: Any) -> Ticket:
    facts = {k: options.pop(k) for k in ("max_pending_bytes",) if k in options}
    stream = make_stream(FakeEngine().tokenizer.vocabulary, wanted.sampling, (256,), **facts)
    return dispatcher.open(wanted, stream, **options)


async def read_all(ticket: Ticket) -> list[str]:
    events = []
    try:
        while messages := await ticket.read():
            events += [pb.GenerateResponse.FromString(m).WhichOneof("event") or "" for m in messages]
    finally:
        ticket.close()
    return events


async def assert_no_trace(dispatcher: Dispatcher, engine: FakeEngine) -> None:
    await asyncio.wait_for(dispatcher.wait_idle(), 5)
    load, inside = dispatcher.load(), await engine.load()
    assert (load.waiting, load.running, load.kv_blocks_used) == EMPTY
    assert not load.tenants
    assert (inside.waiting, inside.running, inside.kv_blocks_used) == EMPTY


async def test_events_come_in_order_and_nothing_is_left(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine)
    tickets = [begin(dispatcher, request(f"r{i}", max_tokens=5, n=1 + i % 2)) for i in range(6)]
    for i, events in enumerate(await asyncio.gather(*map(read_all, tickets))):
        assert events[0] == "started"
        assert events.count("started") == 1
        assert events.count("finished") == 1 + i % 2
        assert events[-1] == "finished"
    assert [t.stream.num_output_tokens for t in tickets] == [5, 10] * 3
    await assert_no_trace(dispatcher, engine)


async def test_tokens_are_booked_into_ledger_shares_and_rates(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine)
    ticket = begin(dispatcher, request("a", max_tokens=100, tenant="t"))
    while ticket.stream.num_output_tokens < 40:
        await ticket.read()
    dispatcher.collect()
    load = dispatcher.load()
    assert load.kv_blocks_used is not None
    assert load.kv_blocks_used >= (3 + 40) // 16
    assert load.tenants["t"].served_tokens >= 40
    assert load.output_tokens_per_s > 0
    await read_all(ticket)
    await assert_no_trace(dispatcher, engine)


async def test_tokens_are_booked_to_the_address_of_who_names_no_tenant(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine)
    asked = {"x": 40, "y": 20}
    tickets = [begin(dispatcher, request(name, max_tokens=n, client=name)) for name, n in asked.items()]
    named = request("z", max_tokens=10, tenant="z", client="x")
    await asyncio.gather(*map(read_all, [*tickets, begin(dispatcher, named)]))
    core = dispatcher._core
    assert {name: core._clients[name].counter for name in asked} == {n: 3 + 2 * asked[n] for n in asked}
    assert core._anonymous.served == sum(3 + 2 * n for n in asked.values())
    assert core._tenants["z"].served == 3 + 2 * 10
    await assert_no_trace(dispatcher, engine)


async def test_tokens_that_nobody_has_collected_are_booked_when_their_request_leaves(
    engine: FakeEngine,
) -> None:
    dispatcher = make_dispatcher(engine)
    stalled = tuple(b"!stall")
    leaves = begin(dispatcher, make_request("leaves", prompt=stalled, max_tokens=100, client="leaves"))
    stays = begin(dispatcher, make_request("stays", prompt=stalled, max_tokens=100, client="stays"))
    dispatcher.pump.step([(leaves.key, (97,) * 5, None, None, (0, None), None)], 0.0)
    leaves.close()
    clients = dispatcher._core._clients
    assert clients["leaves"].counter == len(stalled) + 2 * 5
    assert clients["stays"].counter == len(stalled)
    stays.close()
    await assert_no_trace(dispatcher, engine)


async def test_the_slot_is_free_with_the_last_token_though_nobody_reads(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine, max_running=1)
    slow = begin(dispatcher, request("slow", max_tokens=3))
    assert await asyncio.wait_for(read_all(begin(dispatcher, request("next", max_tokens=1))), 5)
    assert (await read_all(slow))[-1] == "finished"
    await assert_no_trace(dispatcher, engine)


async def test_closing_leaves_the_queue_or_the_engine(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine, max_running=1)
    running = begin(dispatcher, request("running", max_tokens=4000))
    waiting = begin(dispatcher, request("waiting"))
    await running.read()
    waiting.close()
    running.close()
    running.close()
    await assert_no_trace(dispatcher, engine)


async def test_an_abort_comes_after_what_was_there_before(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine)
    ticket = begin(dispatcher, request("a", max_tokens=4000))
    await ticket.read()
    while ticket.stream.num_pending_bytes == 0:
        await asyncio.sleep(0)
    await dispatcher.abort("a")
    assert (await engine.load()).running == 0
    assert await ticket.read()
    with pytest.raises(RequestAborted):
        await ticket.read()
    ticket.close()
    await assert_no_trace(dispatcher, engine)


async def test_deadlines_end_tickets_that_wait_and_that_run(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine, max_running=1, predict_deadlines=False)
    now = asyncio.get_running_loop().time()
    tickets = [
        begin(dispatcher, request(name, max_tokens=4000, deadline=now + 0.1)) for name in ("runs", "waits")
    ]
    for ticket, where in zip(tickets, ("while it ran", "in the queue"), strict=True):
        with pytest.raises(DeadlinePassed, match=where):
            await asyncio.wait_for(read_all(ticket), 5)
    await assert_no_trace(dispatcher, engine)


async def test_a_death_tells_who_ran_from_who_waited(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine, max_running=1)
    ran = begin(dispatcher, request("ran", max_tokens=4000))
    waited = begin(dispatcher, request("waited"))
    await ran.read()
    dispatcher.detach(EngineDied())
    for ticket, was_running in ((ran, True), (waited, False)):
        with pytest.raises(EngineDied) as caught:
            await read_all(ticket)
        assert caught.value.was_running is was_running
    await asyncio.wait_for(dispatcher.wait_idle(), 5)


async def test_a_thousand_that_wait_for_a_dead_engine_all_hear_of_it(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine, max_running=1, max_waiting=0)
    tickets = [begin(dispatcher, request(f"r{i}", max_tokens=4000)) for i in range(1500)]
    engine.die()
    for ticket in tickets:
        with pytest.raises(EngineDied):
            await read_all(ticket)
    await asyncio.wait_for(dispatcher.wait_idle(), 5)


async def test_a_reader_far_behind_is_told_and_ended(engine: FakeEngine) -> None:
    told: list[SlowReader] = []
    dispatcher = make_dispatcher(engine)
    ticket = begin(dispatcher, request("a", max_tokens=4000), max_pending_bytes=100, on_overflow=told.append)
    async with asyncio.timeout(5):
        while not told:
            await asyncio.sleep(0.001)
    with pytest.raises(SlowReader, match="100 bytes"):
        await read_all(ticket)
    await assert_no_trace(dispatcher, engine)


async def test_places_in_the_queue_are_told_until_the_engine_has_it(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(engine, max_running=1, report_interval_s=0.01)
    first = begin(dispatcher, request("first", max_tokens=4000))
    second = begin(dispatcher, request("second", max_tokens=2), report_queue=True)
    (place,) = await asyncio.wait_for(second.read(), 5)
    assert pb.GenerateResponse.FromString(place).queued.position == 0
    first.close()
    events = await asyncio.wait_for(read_all(second), 5)
    assert next(event for event in events if event != "queued") == "started"
    await assert_no_trace(dispatcher, engine)


async def test_what_would_be_refused_anyway_is_refused_before_the_prompt_is_known(engine: FakeEngine) -> None:
    dispatcher = make_dispatcher(
        engine, max_running=1, max_waiting=1, tenants={"small": TenantSettings(max_streams=1)}
    )
    tickets = [begin(dispatcher, request("a", tenant="small", max_tokens=4000))]
    with pytest.raises(Overloaded, match="1 concurrent streams"):
        dispatcher.check("new", "small", "")
    dispatcher.check("new", "other", "")
    tickets.append(begin(dispatcher, request("b")))
    with pytest.raises(Overloaded, match="queue is full"):
        dispatcher.check("new", "other", "")
    assert dispatcher.load().refused == 2
    for ticket in tickets:
        ticket.close()
    await assert_no_trace(dispatcher, engine)
