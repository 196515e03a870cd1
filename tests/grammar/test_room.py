"""The room: refusals with reasons, limits that hold, and work that ends with its request."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from twinjet.errors import DeadlinePassed, InvalidRequest, Overloaded
from twinjet.grammar.limits import GrammarLimits
from twinjet.grammar.room import GrammarRoom
from twinjet.grammar.turns import Waste
from twinjet.grammar.vocabulary import Vocabulary
from twinjet.grammar.workers import Workers
from twinjet.request import Constraint

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 300} for i in range(3000)}}
LIMITS = GrammarLimits(
    cpu_s=4.0, wall_s=300.0, soon_s=300.0, memory_bytes=1 << 30, workers=2, waiting=2, refused_cpu_s=300.0
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(vocabulary: Vocabulary) -> AsyncIterator[Workers]:
    """One process for all rooms here: it takes seconds to start."""
    made = Workers()
    room = GrammarRoom(LIMITS, made)
    await room.prepare(Constraint("regex", "a"), vocabulary)
    await room.close()
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def rooms(workers: Workers) -> AsyncIterator[Callable[[GrammarLimits], GrammarRoom]]:
    """Makes rooms with limits."""
    made: list[GrammarRoom] = []

    def make(limits: GrammarLimits) -> GrammarRoom:
        made.append(GrammarRoom(limits, workers))
        return made[-1]

    yield make
    for room in made:
        await room.close()


@pytest_asyncio.fixture(loop_scope="module")
async def room(rooms: Callable[[GrammarLimits], GrammarRoom]) -> GrammarRoom:
    """A room, and no children of other rooms."""
    made = rooms(LIMITS)
    await _until(lambda: not _children(made))
    return made


def _schema(schema: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(schema))


def _children(room: GrammarRoom) -> list[psutil.Process]:
    return psutil.Process(room.workers.pid).children()


async def _until(condition: Any, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("constraint", "why"),
    [
        (Constraint("regex", "(a"), "parenthesis is not closed"),
        (Constraint("ebnf", "root ::= other"), 'Rule "other" is not defined'),
        (Constraint("ebnf", "root ::= root"), "no token of this model can begin"),
        (Constraint("ebnf", 'root ::= a a a a a a a a a a\na ::= "" | [a-z] a | a a'), "too ambiguous"),
        # A random walk ends early here; long tokens soon take seconds each.
        (Constraint("regex", "((((a{1,1000}){1,1000}){1,1000}){1,1000})"), "too ambiguous"),
        (Constraint("structural_tag", "{}"), "structural_tag: Invalid"),
        (Constraint("json_schema", '{"const": "\\ud800"}'), "half of a surrogate pair"),
        (Constraint("json_schema", '{"properties": {"\\udfff": {}}}'), "half of a surrogate pair"),
        (Constraint("ebnf", "root ::= \ufffd"), "is not a valid grammar"),
        (_schema({"$ref": "#"}), "leads back to itself"),
        (Constraint("json_schema", '{"type": "array", "items":' * 100 + "{}" + "}" * 100), "deep"),
        (_schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**18}), "minItems"),
    ],
    ids=lambda v: repr(v)[:50],
)
async def test_a_wrong_constraint_is_refused_with_its_reason(
    room: GrammarRoom, vocabulary: Vocabulary, constraint: Constraint, why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        await room.prepare(constraint, vocabulary)
    assert caught.value.violations[0].field == f"sampling.constraint.{constraint.kind}"
    assert "\n" not in caught.value.violations[0].message
    assert "Check failed" not in caught.value.violations[0].message


async def test_a_constraint_is_compiled_once_and_its_file_lives_as_long_as_it_is_held(
    rooms: Callable[[GrammarLimits], GrammarRoom], vocabulary: Vocabulary
) -> None:
    forgetful, room = rooms(GrammarLimits(cache_bytes=0)), rooms(LIMITS)
    first = await forgetful.prepare(Constraint("regex", "[ab]+"), vocabulary)
    path = first.path
    assert os.access(path, os.R_OK)
    del first
    assert not os.access(path, os.R_OK), "nothing is kept in a cache of no bytes"
    both = await asyncio.gather(*(room.prepare(Constraint("regex", "[ab]+"), vocabulary) for _ in range(2)))
    again = await room.prepare(Constraint("regex", "[ab]+"), vocabulary)
    assert both[0] is both[1] is again


async def test_a_compilation_ends_with_its_deadline(room: GrammarRoom, vocabulary: Vocabulary) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlinePassed):
        await room.prepare(_schema(SLOW), vocabulary, deadline=began + 0.5)
    assert time.monotonic() - began < 2
    await _until(lambda: not _children(room))


async def test_a_compilation_ends_with_its_cancellation_but_not_while_another_waits_for_it(
    room: GrammarRoom, vocabulary: Vocabulary
) -> None:
    tasks = [asyncio.create_task(room.prepare(_schema(SLOW), vocabulary)) for _ in range(2)]
    await _until(lambda: len(_children(room)) == 1)
    (child,) = _children(room)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert child.is_running()
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    await _until(lambda: not _children(room))


MANY_NAMES = {"enum": [f"{i:05d}" * 20 for i in range(2000)]}


@pytest.mark.parametrize(
    ("limits", "schema", "why"),
    [
        (replace(LIMITS, cpu_s=1.0), SLOW, "takes more than 1 s"),
        (replace(LIMITS, memory_bytes=8 << 20), MANY_NAMES, "takes more than 8 MiB"),
        # Out of memory after the compilation.
        (replace(LIMITS, memory_bytes=64 << 20), MANY_NAMES, "takes more than 64 MiB"),
    ],
    ids=["time", "compiling", "writing"],
)
async def test_time_and_memory_are_bounded_and_the_refusal_is_remembered(
    rooms: Callable[[GrammarLimits], GrammarRoom],
    vocabulary: Vocabulary,
    limits: GrammarLimits,
    schema: Any,
    why: str,
) -> None:
    room = rooms(limits)
    with pytest.raises(InvalidRequest, match=why):
        await room.prepare(_schema(schema), vocabulary)
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=why):
        await room.prepare(_schema(schema), vocabulary)
    assert time.monotonic() - began < 0.5


async def test_a_waiter_gets_the_grammar_though_the_first_one_left(
    room: GrammarRoom, vocabulary: Vocabulary
) -> None:
    constraint = Constraint("regex", "[a-c]{3,40}x")
    first, second = (asyncio.create_task(room.prepare(constraint, vocabulary)) for _ in range(2))
    await _until(lambda: any(flight.num_waiters == 2 for flight in room._flights.values()))
    first.cancel()
    made = await second
    assert await asyncio.to_thread(Path(made.path).is_file)


async def test_a_tenant_has_its_share_of_workers_and_a_bounded_line(
    room: GrammarRoom, vocabulary: Vocabulary
) -> None:
    def slow(i: int) -> Constraint:
        return _schema({**SLOW, "title": str(i)})

    hostile = [asyncio.create_task(room.prepare(slow(i), vocabulary, tenant="h")) for i in range(3)]
    await _until(lambda: "h" in room._turns._tenants and len(room._turns._tenants["h"].waiting) == 2)
    with pytest.raises(Overloaded) as caught:
        await room.prepare(slow(9), vocabulary, tenant="h")
    assert caught.value.retry_after_s > 0
    made = await asyncio.wait_for(room.prepare(Constraint("regex", "b"), vocabulary, tenant="n"), 10)
    assert made.num_bytes > 0
    assert not any(task.done() for task in hostile)
    for task in hostile:
        task.cancel()
    await asyncio.gather(*hostile, return_exceptions=True)
    await _until(lambda: not _children(room))


async def test_a_tenant_that_wastes_workers_is_refused_for_a_while_and_no_other_is(
    rooms: Callable[[GrammarLimits], GrammarRoom], vocabulary: Vocabulary
) -> None:
    room = rooms(replace(LIMITS, cpu_s=1.0, refused_cpu_s=0.5))
    known = Constraint("regex", "[a-f]+")
    made = await room.prepare(known, vocabulary, tenant="h")
    with pytest.raises(InvalidRequest, match="takes more than 1 s"):
        await room.prepare(_schema(SLOW), vocabulary, tenant="h")
    with pytest.raises(Overloaded, match="refused constraints took more") as caught:
        await room.prepare(Constraint("regex", "[a-g]+"), vocabulary, tenant="h")
    assert 5 < caught.value.retry_after_s <= 12
    assert caught.value.quotas[0].subject == "tenant:h"
    assert await room.prepare(known, vocabulary, tenant="h") is made
    await room.prepare(Constraint("regex", "[a-g]+"), vocabulary, tenant="n")


async def test_who_waits_with_a_tenant_that_may_not_is_served_all_the_same(
    rooms: Callable[[GrammarLimits], GrammarRoom], vocabulary: Vocabulary
) -> None:
    room = rooms(replace(LIMITS, refused_cpu_s=0.1))
    room._waste.charge("h", 100.0, was_refused=True)
    constraint = Constraint("regex", "[a-h]+")
    hostile, normal = (asyncio.create_task(room.prepare(constraint, vocabulary, tenant=t)) for t in "hn")
    assert (await normal).num_bytes > 0
    with pytest.raises(Overloaded):
        await hostile


async def test_waste_comes_back_with_time() -> None:
    now = [100.0]
    waste = Waste(2.0, clock=lambda: now[0])
    waste.charge("a", 2.0, was_refused=True)
    waste.charge("a", 0.9, was_refused=False)
    waste.check("a")
    waste.charge("a", 2.0, was_refused=False)
    with pytest.raises(Overloaded) as caught:
        waste.check("a")
    waste.check("b")
    now[0] += caught.value.retry_after_s - 0.01
    with pytest.raises(Overloaded):
        waste.check("a")
    now[0] += 0.02
    waste.check("a")


async def test_long_work_gets_only_processor_time_that_nobody_else_wants(
    rooms: Callable[[GrammarLimits], GrammarRoom], vocabulary: Vocabulary
) -> None:
    room = rooms(replace(LIMITS, soon_s=0.5))
    await _until(lambda: not _children(room))
    task = asyncio.create_task(room.prepare(_schema(SLOW), vocabulary))
    await _until(lambda: len(_children(room)) == 1)
    (child,) = _children(room)
    await _until(lambda: child.nice() == LIMITS.niceness)
    assert os.sched_getscheduler(child.pid) == os.SCHED_OTHER
    await _until(lambda: os.sched_getscheduler(child.pid) == os.SCHED_IDLE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_of_a_tenant_whose_constraints_were_refused_stands_behind_from_the_beginning(
    rooms: Callable[[GrammarLimits], GrammarRoom], vocabulary: Vocabulary
) -> None:
    room = rooms(LIMITS)
    await _until(lambda: not _children(room))
    room._waste.charge("h", 1.0, was_refused=True)
    tasks = [
        asyncio.create_task(room.prepare(_schema(SLOW | {"title": t}), vocabulary, tenant=t)) for t in "hn"
    ]
    await _until(lambda: len(_children(room)) == 2)
    first, second = sorted(_children(room), key=lambda child: child.pid)
    await _until(lambda: os.sched_getscheduler(first.pid) == os.SCHED_IDLE)
    assert os.sched_getscheduler(second.pid) == os.SCHED_OTHER
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_machine_that_is_too_busy_is_no_fault_of_the_constraint(
    rooms: Callable[[GrammarLimits], GrammarRoom], vocabulary: Vocabulary
) -> None:
    room = rooms(replace(LIMITS, wall_s=0.3))
    with pytest.raises(Overloaded, match=r"not compiled within 0\.3 s"):
        await room.prepare(_schema(SLOW), vocabulary)


async def test_what_would_hold_up_the_engine_is_refused(
    rooms: Callable[[GrammarLimits], GrammarRoom], vocabulary: Vocabulary
) -> None:
    room = rooms(replace(LIMITS, cpu_s=60.0))
    strings = {f"p{i}": {"type": "string", "maxLength": 8} for i in range(150)}
    with pytest.raises(InvalidRequest, match="more than 1 s to compile and more than 16 MiB"):
        await room.prepare(_schema({"type": "object", "properties": strings}), vocabulary)


async def test_a_worker_that_was_killed_is_started_again_and_closing_leaves_nothing(
    vocabulary: Vocabulary,
) -> None:
    room = GrammarRoom()
    await room.prepare(Constraint("regex", "a"), None)
    pid = room.workers.pid
    assert pid is not None
    os.kill(pid, 9)
    await _until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")
    await room.prepare(Constraint("regex", "b"), None)
    again, folder = room.workers.pid, room.folder
    assert again not in (None, pid)
    await room.close()
    assert not psutil.pid_exists(again)
    assert not folder.exists()


async def test_finished_texts_are_checked_against_their_schema(room: GrammarRoom) -> None:
    schema = '{"type": "object", "required": ["a"]}'
    assert await room.verify(schema, '{"a": 1}', is_exact=True)
    assert not await room.verify(schema, "{}", is_exact=True)
    assert not await room.verify(schema, '{"a": 1', is_exact=True)
    assert not await room.verify(schema, '{"a": 1}<|im_end|>', is_exact=True)
    assert await room.verify(schema, '{"a": 1}<|im_end|>', is_exact=False)
    hostile = json.dumps({"type": "string", "pattern": "^(a+)+$"})
    assert await room.verify(hostile, json.dumps("a" * 40 + "!"), is_exact=True), "it cannot be told in time"
