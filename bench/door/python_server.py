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


class Steps:
    """How many steps were asked for; handlers wait for theirs."""

    def __init__(self) -> None:
        self.num_asked = 0
        self._waiting: list[asyncio.Future[None]] = []

    async def until(self, number: int) -> None:
        # A step may be asked for before the write that answered the last one has returned.
        while self.num_asked < number:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    def ask(self, count: int) -> None:
        self.num_asked += count
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


async def main(door_name: str, num_streams: int, num_tokens: int, num_bytes: int) -> None:
    message = bytes(num_bytes)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    steps = Steps()
    num_arrived = 0

    def on_input() -> None:
        asked = os.read(0, 4096)
        if not asked:
            loop.remove_reader(0)
            ended.set_result(None)
        steps.ask(len(asked))

    async def handle(request: bytes, context: Any) -> None:
        nonlocal num_arrived
        num_arrived += 1
        if num_arrived == num_streams:
            steps.ask(1)  # the first, which the client does not ask for
        for number in range(1, num_tokens + 1):
            await steps.until(number)
            await context.write(message)
        await steps.until(num_tokens + 1)

    door = make_door(ServerSettings(port=0, door=door_name, max_connection_calls=1 << 20))
    handler = grpc.unary_stream_rpc_method_handler(handle)
    door.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bench", {"Stream": handler}),))
    print(door.bind().rpartition(":")[2], flush=True)
    await door.start()
    loop.add_reader(0, on_input)
    await ended
    await door.stop(0)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
