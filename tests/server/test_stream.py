"""The buffer between an engine and a slow reader, against the plain list of what was put in."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinjet.engines.base import EngineEvent, Finish, OutputEvent, PromptEvent
from twinjet.errors import EngineDied, SlowReader
from twinjet.server.stream import StreamBuffer, StreamWriter

_deltas = st.builds(
    OutputEvent,
    output_index=st.integers(0, 3),
    text=st.text(max_size=4),
    token_ids=st.lists(st.integers(0, 9), max_size=3).map(tuple),
)
_reads = st.just("read")


@given(st.lists(st.one_of(_deltas, _reads), max_size=60))
async def test_whatever_the_reader_does_each_output_arrives_whole_and_in_order(
    steps: list[OutputEvent | str],
) -> None:
    buffer = StreamBuffer(1 << 20)
    reader = buffer.__aiter__()
    put: dict[int, list[object]] = defaultdict(lambda: ["", []])
    got: dict[int, list[object]] = defaultdict(lambda: ["", []])
    num_waiting: dict[int, int] = defaultdict(int)

    def account(totals: dict[int, list[object]], event: EngineEvent) -> None:
        assert isinstance(event, OutputEvent)
        totals[event.output_index][0] += event.text  # type: ignore[operator]
        totals[event.output_index][1] += list(event.token_ids)  # type: ignore[operator]

    for step in steps:
        if isinstance(step, OutputEvent):
            buffer.put(step)
            account(put, step)
            num_waiting[step.output_index] = 1
        elif sum(num_waiting.values()):
            event = await anext(reader)
            account(got, event)  # type: ignore[arg-type]
            num_waiting[event.output_index] = 0  # type: ignore[union-attr]
    buffer.close()
    num_left = 0
    async for event in reader:
        account(got, event)  # type: ignore[arg-type]
        num_left += 1
    assert num_left == sum(num_waiting.values()), "more than one delta waited for an output"
    assert dict(got) == dict(put)


async def test_the_reason_of_the_last_delta_survives_merging() -> None:
    buffer = StreamBuffer(1 << 20)
    buffer.put(PromptEvent(0))
    buffer.put(OutputEvent(0, "a", (1,)))
    buffer.put(OutputEvent(0, "b", (2,), finish=Finish("length")))
    buffer.close()
    assert [e async for e in buffer] == [
        PromptEvent(0),
        OutputEvent(0, "ab", [1, 2], [], Finish("length")),
    ]


async def test_what_came_before_an_error_is_read_before_it() -> None:
    buffer = StreamBuffer(1 << 20)
    buffer.put(OutputEvent(0, "a", (1,)))
    buffer.close(EngineDied())
    reader = buffer.__aiter__()
    assert (await anext(reader)).text == "a"  # type: ignore[union-attr]
    with pytest.raises(EngineDied):
        await anext(reader)


async def test_too_much_that_waits_is_an_error_and_reading_makes_room() -> None:
    told: list[SlowReader] = []
    buffer = StreamBuffer(100, told.append)
    reader = buffer.__aiter__()
    for _ in range(5):
        buffer.put(OutputEvent(0, "x" * 50, (1,)))
        await anext(reader)
    buffer.put(OutputEvent(0, "x" * 50, (1,)))
    with pytest.raises(SlowReader):
        buffer.put(OutputEvent(1, "x" * 50, (1,)))
    assert len(told) == 1


async def test_a_blocked_write_can_be_interrupted() -> None:
    blocked = asyncio.Event()

    async def write(_: object) -> None:
        blocked.set()
        await asyncio.Event().wait()

    writer = StreamWriter(write, limit_s=60)
    task = asyncio.create_task(writer.write("x"))
    await blocked.wait()
    writer.interrupt(SlowReader("enough"))
    with pytest.raises(SlowReader, match="enough"):
        await task
    with pytest.raises(SlowReader, match="enough"):
        await writer.write("y")
