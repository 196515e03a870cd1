"""The server of door_bench.cc in Python: python_server.py native|grpc STREAMS TOKENS BYTES."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import grpc
import uvloop

from twinjet.config import ServerSettings
from twinjet.server.doors import make_door


async def main(door_name: str, num_streams: int, num_tokens: int, num_bytes: int) -> None:
    message = bytes(num_bytes)
    waiting: list[asyncio.Future[None]] = []
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def release() -> None:
        released = waiting[:]
        waiting.clear()
        for future in released:
            if not future.done():
                future.set_result(None)

    def on_step() -> None:
        if not os.read(0, 1):
            ended.set_result(None)
        release()

    async def step() -> None:
        future = loop.create_future()
        waiting.append(future)
        await future

    arrived = 0

    async def handle(request: bytes, context: Any) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == num_streams:
            arrived = 0
            release()
        else:
            await step()
        for i in range(num_tokens):
            if i > 0:
                await step()
            await context.write(message)
        await step()

    door = make_door(ServerSettings(port=0, door=door_name, max_connection_calls=1 << 20))
    handler = grpc.unary_stream_rpc_method_handler(handle)
    door.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bench", {"Stream": handler}),))
    print(door.bind().rpartition(":")[2], flush=True)
    await door.start()
    loop.add_reader(0, on_step)
    await ended
    await door.stop(0)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
