"""CoreLink with an engine core that the test plays itself, over its real sockets; no vLLM needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import zmq

from tests.engines.vllm.support import GREEDY, request
from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front.core_link import CoreLink, Endpoints
from twinjet.engines.vllm.front.grammar_check import GrammarCheck
from twinjet.engines.vllm.front.load import LoadReader
from twinjet.errors import EngineDied
from twinjet.models.tokenizer import HfTokenizer

FACTS = Facts(
    version="0.32.0", device="cpu", source="m", tokenizer="", max_model_len=100, vocab_size=49152,
    max_logprobs=5, max_num_seqs=4, has_adapters=False, has_prefix_cache=True, has_priority=True,
    default_sampling={}, eos=1, generation_eos=(), settings={},
)  # fmt: skip


def output(
    request_id: str, tokens: list[int], finish: int | None = None, stop: Any = None, cached: int | None = None
) -> list[Any]:
    prefill = None if cached is None else {"num_cached_tokens": cached}
    return [request_id, tokens, None, None, None, finish, stop, None, None, None, None, prefill, None, 0,
            None, None, None, None]  # fmt: skip


@dataclass
class Core:
    """The engine core's end of the sockets."""

    input: zmq.Socket[bytes]
    output: zmq.Socket[bytes]
    link: CoreLink
    stats: LoadReader
    tokenizer: HfTokenizer
    deaths: list[str] = field(default_factory=list)

    def receive(self) -> tuple[bytes, Any]:
        assert self.input.poll(2000), "nothing came"
        kind, payload = self.input.recv_multipart()
        return kind, msgspec.msgpack.decode(payload)

    def send(self, outputs: list[Any], stats: Any = None, utility: Any = None) -> None:
        self.output.send(msgspec.msgpack.encode([0, outputs, stats, 1.0, utility, None, None, None, None]))

    async def delivered(self, stream: Any) -> Any:
        await asyncio.wait_for(stream.ready.wait(), 2)
        return stream.get_nowait()


@pytest_asyncio.fixture
async def core(demo_model_path: Path) -> AsyncIterator[Core]:
    endpoints = Endpoints()
    context = zmq.Context()
    dealer, push = context.socket(zmq.DEALER), context.socket(zmq.PUSH)
    dealer.setsockopt(zmq.IDENTITY, b"\x00\x00")
    dealer.connect(endpoints.address("input"))
    push.connect(endpoints.address("output"))
    dealer.send(b"ready")
    assert endpoints.input.poll(2000)
    endpoints.input.recv_multipart()
    stats, tokenizer = LoadReader(64), HfTokenizer(demo_model_path)
    link = CoreLink(endpoints, FACTS, tokenizer, stats, GrammarCheck(b"", forked=False))
    played = Core(dealer, push, link, stats, tokenizer)
    link.watch(asyncio.get_running_loop(), played.deaths.append)
    yield played
    await asyncio.to_thread(link.shutdown)
    context.destroy(linger=0)


async def submit(core: Core, text: str = "one", **changed: Any) -> Any:
    wanted = request("r", core.tokenizer.encode(text, add_special_tokens=False), replace(GREEDY, **changed))
    return await core.link.submit(wanted, 0, None, native=False)


async def test_a_request_goes_out_and_its_tokens_come_back_merged(core: Core) -> None:
    stream = await submit(core)
    kind, message = core.receive()
    assert kind == b"\x00"
    assert (message[0], message[16]) == (stream.request_id, "r")
    words = core.tokenizer.encode("two three four", add_special_tokens=False)
    core.send([output(stream.request_id, words[:1], cached=3)])
    core.send([output(stream.request_id, words[1:], finish=1)])
    first = await core.delivered(stream)
    while first.finish_reason is None:
        more = await core.delivered(stream)
        first.token_ids += more.token_ids
        first.finish_reason = more.finish_reason
    assert first.token_ids == words
    assert first.num_cached_tokens == 3
    assert core.deaths == []


async def test_an_abort_goes_out_and_what_still_comes_is_left_out(core: Core) -> None:
    stream = await submit(core)
    core.receive()
    await core.link.abort([stream.request_id])
    assert core.receive() == (b"\x01", [stream.request_id])
    core.send([output(stream.request_id, [5])])
    core.send([], stats={"num_running_reqs": 4})
    await until(lambda: core.stats.read().running == 4)
    assert stream.get_nowait() is None


async def test_rows_of_unknown_requests_are_left_out(core: Core) -> None:
    stream = await submit(core)
    core.send([output("x-ffff", [5]), output("no key", [5]), output(stream.request_id, [7], finish=1)])
    assert (await core.delivered(stream)).token_ids == [7]


async def until(holds: Any) -> None:
    async with asyncio.timeout(2):
        while not holds():
            await asyncio.sleep(0)


async def test_statistics_and_preemptions(core: Core) -> None:
    stats = {
        "num_running_reqs": 2,
        "num_waiting_reqs": 1,
        "num_skipped_waiting_reqs": 3,
        "kv_cache_usage": 0.5,
    }
    row = output("x-1", [1])
    row[7] = [{"type": 3, "timestamp": 1.0}, {"type": 2, "timestamp": 1.0}]
    core.send([row], stats=stats)
    await until(lambda: core.stats.read().running == 2)
    load = core.stats.read()
    assert (load.waiting, load.kv_blocks_used, load.preemptions) == (4, 32, 1)


async def test_calls_give_results_and_failures(core: Core) -> None:
    good = asyncio.create_task(core.link.call("get_supported_tasks", 1, "x"))
    bad = asyncio.create_task(core.link.call("add_lora"))
    await asyncio.sleep(0)
    kind, (client, number, method, arguments) = core.receive()
    assert (kind, client, method, arguments) == (b"\x03", 0, "get_supported_tasks", [1, "x"])
    _, (_, other, _, _) = core.receive()
    core.send([], utility=[other, "it went wrong", None])
    core.send([], utility=[number, None, [None, ["generate"]]])
    core.send([], utility=[987654, None, [None, 1]])
    assert await good == ["generate"]
    with pytest.raises(Exception, match="it went wrong"):
        await bad


@pytest.mark.parametrize("message", [b"ENGINE_CORE_DEAD", b"\x99\x00", b""])
async def test_a_death_or_an_unreadable_message_ends_it(core: Core, message: bytes) -> None:
    waiting = asyncio.create_task(core.link.call("anything"))
    await asyncio.sleep(0)
    core.output.send(message)
    with pytest.raises(EngineDied):
        await asyncio.wait_for(waiting, 2)
    assert len(core.deaths) == 1


async def test_many_messages_leave_the_loop_its_turns(core: Core) -> None:
    stream = await submit(core)
    for _ in range(400):
        core.send([output(stream.request_id, [7])])
    turns, count = 0, 0
    async with asyncio.timeout(5):
        while count < 400:
            turns += 1
            found = stream.get_nowait()
            count += len(found.token_ids) if found is not None else 0
            await asyncio.sleep(0)
    assert turns >= 400 / 16


async def test_nothing_is_sent_after_the_end(core: Core) -> None:
    waiting = asyncio.create_task(core.link.call("anything"))
    await asyncio.sleep(0)
    await asyncio.to_thread(core.link.shutdown)
    with pytest.raises(EngineDied):
        await waiting
    with pytest.raises(EngineDied):
        await submit(core)


def _nothing() -> None:
    pass


def test_an_engine_that_ends_before_the_handshake_is_noticed() -> None:
    endpoints = Endpoints()
    # Forking with the threads of ZeroMQ around is not sound.
    process = get_context("spawn").Process(target=_nothing)
    process.start()
    try:
        with pytest.raises(EngineDied, match="ended with code"):
            endpoints.shake_hands(process)
    finally:
        process.join()
        endpoints.close()
        endpoints.close()
