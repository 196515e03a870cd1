"""Runs an engine, kills its process mid-stream, starts another one and waits to be killed; see the test."""

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import replace

from twinjet.engines.vllm.front import prestart

prestart.prestart()

from support import GREEDY, OPTIONS, collect, descendants, request  # noqa: E402

from twinjet.engines.base import OutputEvent  # noqa: E402
from twinjet.engines.vllm.front.engine import VllmEngine  # noqa: E402
from twinjet.errors import EngineDied  # noqa: E402


async def started() -> VllmEngine:
    engine = VllmEngine("demo", sys.argv[1], OPTIONS, native_sampler=False, native_block_manager=False)
    await engine.start(lambda progress: None)
    return engine


async def main() -> None:
    engine = await started()
    (process,) = engine._running.context.processes
    prompt = engine.tokenizer.encode("Once upon a time", add_special_tokens=False)
    long = replace(GREEDY, max_tokens=1500, ignore_eos=True)
    flowing = [asyncio.Event() for _ in range(4)]

    async def stream(i: int) -> float:
        try:
            async for event in engine.generate(request(f"s{i}", prompt, long)):
                if isinstance(event, OutputEvent):
                    flowing[i].set()
        except EngineDied:
            return time.monotonic()
        raise AssertionError("the stream ended as if nothing had happened")

    dead = asyncio.create_task(engine.wait_dead())
    streams = [asyncio.create_task(stream(i)) for i in range(4)]
    for event in flowing:
        await event.wait()
    assert not dead.done()
    os.kill(process.pid, signal.SIGKILL)
    killed = time.monotonic()
    ended = await asyncio.gather(*streams)
    reason = await dead
    refused = False
    try:
        await collect(engine, request("late", prompt))
    except EngineDied:
        refused = True
    await engine.stop()
    await engine.stop()
    began = time.monotonic()
    second = await started()
    answer = await collect(second, request("again", prompt))
    print(
        "REPORT "
        + json.dumps(
            {
                "slowest_end_s": max(ended) - killed,
                "reason": reason,
                "refused": refused,
                "restart_s": time.monotonic() - began,
                "tokens": len(answer.only.token_ids),
                "descendants": descendants(os.getpid()),
            }
        ),
        flush=True,
    )
    if sys.argv[2] == "stop":
        await second.stop()
        prestart.stop()
        return
    await asyncio.Event().wait()


asyncio.run(main())
