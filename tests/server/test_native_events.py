"""What waits for the asyncio loop while that is busy: bounded in number, and taken in portions."""

from __future__ import annotations

import asyncio
import select
from typing import Any

import grpc
import pytest

from twinjet.server import native_door

if not native_door.is_available():
    pytest.skip("this build has no native door", allow_module_level=True)

from twinjet import _core

_CALL, _REFUSED = 0, 5
_LIMIT = 300
_NUM_CALLS = 800


async def test_events_come_in_portions_and_refusals_as_a_number() -> None:
    door = _core.Door(bounded_paths=["/p.S/M"], max_open=_LIMIT)
    port = door.listen("127.0.0.1", 0, False)
    door.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask: Any = channel.unary_unary("/p.S/M")
            calls = [ask(b"x") for _ in range(_NUM_CALLS)]
            while door.totals()["calls_failed"] < _NUM_CALLS - _LIMIT:
                await asyncio.sleep(0.01)
            portions = []
            while select.select([door.fileno()], [], [], 0)[0]:
                portions.append(door.take()[0])
            # A call, its message and its end for each that is open; one for all that were refused.
            assert sum(map(len, portions)) == 3 * _LIMIT + 1
            assert max(map(len, portions)) <= 257
            events = [event for portion in portions for event in portion]
            refused = [event for event in events if event[0] == _REFUSED]
            assert refused == [(_REFUSED, _NUM_CALLS - _LIMIT, "/p.S/M")]
            for kind, _, payload in events:
                if kind == _CALL:
                    payload[0].write(b"y")
                    payload[0].finish(0, "", ())
            ends = await asyncio.gather(*(call.code() for call in calls))
            assert ends.count(grpc.StatusCode.OK) == _LIMIT
            assert ends.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == _NUM_CALLS - _LIMIT
    finally:
        await asyncio.to_thread(door.stop, 0)
