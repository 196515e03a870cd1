"""CoreLink with an engine core that the test plays itself, over its real sockets; no vLLM needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import zmq
from tokenizers import Tokenizer, decoders, models

from tests.engines.vllm.support import GREEDY, request
from twinjet.engines import pushed
from twinjet.engines.base import Finish, OutputEvent, PromptEvent
from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front.core_link import CoreLink, Endpoints
from twinjet.engines.vllm.front.load import LoadReader
from twinjet.errors import EngineDied, RequestFailed
from twinjet.models.tokenizer import HfTokenizer

EOS = 2

FACTS = Facts(
    version="0.32.0", device="cpu", source="m", tokenizer="", max_model_len=100, vocab_size=49152,
    max_logprobs=5, max_num_seqs=4, has_adapters=False, has_prefix_cache=True, has_priority=True,
    default_sampling={}, eos=EOS, generation_eos=(), settings={},
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

    async def receive(self) -> tuple[bytes, Any]:
        """The next message, which leaves when the loop has turned."""
        async with asyncio.timeout(30):
            while not self.input.poll(0):
                await asyncio.sleep(0.001)
        kind, payload = self.input.recv_multipart()
        return kind, msgspec.msgpack.decode(payload)

    def send(self, outputs: list[Any], stats: Any = None, utility: Any = None) -> None:
        self.output.send(msgspec.msgpack.encode([0, outputs, stats, 1.0, utility, None, None, None, None]))


@contextlib.contextmanager
def running() -> Iterator[Any]:
    """What stands for a process that does not end."""
    sentinel, other = os.pipe()
    try:
        yield SimpleNamespace(sentinel=sentinel, exitcode=None)
    finally:
        os.close(sentinel)
        os.close(other)


IN_LOOP = pytest.mark.parametrize("core", ["python"], indirect=True)
"""With a vocabulary that is a function of Python, and so is read from in the event loop."""
ANYWHERE = pytest.mark.parametrize("core", ["native", "python"], indirect=True)


def wordpiece(folder: Path) -> HfTokenizer:
    words = ["[UNK]", *"abcdefghijk"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return HfTokenizer(folder)


@pytest_asyncio.fixture
async def core(request: pytest.FixtureRequest, demo_model_path: Path, tmp_path: Path) -> AsyncIterator[Core]:
    """param: whether the vocabulary is "native" or one of "python"."""
    is_native = getattr(request, "param", "native") == "native"
    tokenizer = HfTokenizer(demo_model_path) if is_native else wordpiece(tmp_path)
    assert tokenizer.vocabulary.is_native == is_native
    endpoints = Endpoints()
    context = zmq.Context()
    handshake, dealer, push = map(context.socket, (zmq.DEALER, zmq.DEALER, zmq.PUSH))
    dealer.setsockopt(zmq.IDENTITY, b"\x00\x00")
    dealer.connect(endpoints.address("input"))
    push.connect(endpoints.address("output"))
    handshake.connect(endpoints.address("handshake"))
    for status in ("HELLO", "READY"):
        handshake.send(msgspec.msgpack.encode({"status": status}))
    dealer.send(msgspec.msgpack.encode({"max_model_len": 100}))
    with running() as process:
        ready = await asyncio.to_thread(endpoints.shake_hands, process)
    assert ready == {"max_model_len": 100}
    assert set(msgspec.msgpack.decode(handshake.recv())) == {"addresses", "parallel_config"}
    stats = LoadReader(64)
    link = CoreLink(endpoints, FACTS, tokenizer, stats)
    played = Core(dealer, push, link, stats, tokenizer)
    link.watch(asyncio.get_running_loop(), played.deaths.append)
    yield played
    await asyncio.to_thread(link.shutdown)
    context.destroy(linger=0)


class Requests:
    """Stands for the engine: requests go through the link as VllmEngine hands them over."""

    def __init__(self, core: Core) -> None:
        self.tokenizer = core.tokenizer
        self._link = core.link
        self.cancel = core.link.cancel

    def describe(self) -> Any:
        return SimpleNamespace(eos_token_ids=(EOS,))

    def submit(self, wanted: Any, run: Any) -> None:
        self._link.submit(wanted, run, None, native=True, bad_text=None)


class Reader:
    """Reads one request in a task of its own."""

    def __init__(self, core: Core, request_id: str = "r", **changed: Any) -> None:
        self.wanted = request(request_id, [5, 6], replace(GREEDY, max_tokens=999, **changed))
        self.events: list[Any] = []
        self.task = asyncio.create_task(self._read(Requests(core)))

    async def _read(self, engine: Any) -> None:
        async with contextlib.aclosing(pushed.read(engine, self.wanted)) as events:
            async for event in events:
                self.events.append(event)

    def outputs(self, index: int = 0) -> list[OutputEvent]:
        return [e for e in self.events if isinstance(e, OutputEvent) and e.output_index == index]

    def token_ids(self, index: int = 0) -> list[int]:
        return [token for event in self.outputs(index) for token in event.token_ids]

    def text(self) -> str:
        return "".join(event.text for event in self.outputs())


async def sent(core: Core) -> list[Any]:
    """The next request that the engine core gets."""
    kind, message = await core.receive()
    assert kind == b"\x00"
    fields: list[Any] = message
    return fields


async def test_a_request_goes_out_and_its_tokens_come_back(core: Core) -> None:
    reader = Reader(core)
    message = await sent(core)
    assert (message[1], message[16]) == ([5, 6], "r")
    words = core.tokenizer.encode("two three four", add_special_tokens=False)
    core.send([output(message[0], words[:1], cached=3)])
    core.send([output(message[0], words[1:], finish=1)])
    await asyncio.wait_for(reader.task, 2)
    assert reader.events[0] == PromptEvent(3)
    assert reader.token_ids() == words
    assert reader.text() == core.tokenizer.decode(words, skip_special_tokens=True)
    assert reader.outputs()[-1].finish == Finish("length")
    assert core.deaths == []
    assert core.link._reader.num_open == 0


async def test_tokens_come_while_the_loop_stands(core: Core) -> None:
    reader = Reader(core)
    message = await sent(core)
    stream = core.link._requests["r"].run._stream
    core.send([output(message[0], [5], cached=3)])
    core.send([output(message[0], [6, 7], finish=1)])
    deadline = time.monotonic() + 30
    while not stream.is_over and time.monotonic() < deadline:
        pass  # without a turn of the loop
    assert stream.num_output_tokens == 3
    await asyncio.wait_for(reader.task, 2)
    assert reader.token_ids() == [5, 6, 7]


@ANYWHERE
async def test_outputs_are_requests_of_their_own(core: Core) -> None:
    reader = Reader(core, n=2, temperature=1.0)
    first, second = await sent(core), await sent(core)
    core.send([output(second[0], [8], finish=1, cached=0), output(first[0], [7], finish=1, cached=0)])
    await asyncio.wait_for(reader.task, 2)
    assert (reader.token_ids(0), reader.token_ids(1)) == ([7], [8])
    assert sum(isinstance(event, PromptEvent) for event in reader.events) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_the_prompt_is_told_once_and_first_however_outputs_come(
    core: Core, order: tuple[int, int]
) -> None:
    reader = Reader(core, n=2, temperature=1.0)
    ids = [(await sent(core))[0] for _ in range(2)]
    for index in order:
        core.send([output(ids[index], [7 + index], cached=index)], stats={"num_running_reqs": index + 1})
        await until(lambda index=index: core.stats.read().running == index + 1)
        await asyncio.sleep(0)
    for index in order:
        core.send([output(ids[index], [17 + index], finish=1)])
    await asyncio.wait_for(reader.task, 2)
    assert reader.events[0] == PromptEvent(0)
    assert sum(isinstance(event, PromptEvent) for event in reader.events) == 1
    assert (reader.token_ids(0), reader.token_ids(1)) == ([7, 17], [8, 18])


async def test_a_stop_string_aborts_in_the_engine_and_cuts_the_tokens(core: Core) -> None:
    words = core.tokenizer.encode("two three four", add_special_tokens=False)
    stop = core.tokenizer.decode(words[:-1], skip_special_tokens=True)[-3:]
    reader = Reader(core, stop=(stop,))
    message = await sent(core)
    core.send([output(message[0], words, cached=0)])
    await asyncio.wait_for(reader.task, 2)
    assert reader.token_ids() == words[:-1]
    assert reader.outputs()[-1].finish == Finish("stop", stop)
    assert await core.receive() == (b"\x01", [message[0]])
    core.send([output(message[0], words)], stats={"num_running_reqs": 4})
    await until(lambda: core.stats.read().running == 4)


@ANYWHERE
async def test_irregular_ends_fail_their_request_alone(core: Core) -> None:
    masked, broken, fine = (Reader(core, name) for name in ("masked", "broken", "fine"))
    ids = [(await sent(core))[0] for _ in range(3)]
    core.send(
        [
            output(ids[0], [-1], finish=0, stop=-1),
            output(ids[1], [], finish=3),
            output(ids[2], [8], finish=1, cached=0),
        ]
    )
    await asyncio.wait_for(fine.task, 2)
    for reader, reason in ((masked, "NO_ADMISSIBLE_TOKEN"), (broken, "ENGINE_ERROR")):
        with pytest.raises(RequestFailed) as raised:
            await asyncio.wait_for(reader.task, 2)
        assert raised.value.reason == reason
        assert reader.token_ids() == []
    assert fine.token_ids() == [8]


@ANYWHERE
async def test_an_engine_core_that_is_told_to_end_is_dead_at_once(core: Core) -> None:
    """It ends its requests as if somebody had asked for it, refuses calls, and its process is at its end only later."""
    readers = [Reader(core, name) for name in ("first", "second")]
    ids = [(await sent(core))[0] for _ in readers]
    call = asyncio.create_task(core.link.call("anything"))
    _, (_, number, _, _) = await core.receive()
    core.send([], utility=[number, "Server shutting down", None])
    with pytest.raises(EngineDied):
        await call
    assert not core.deaths
    core.send([output(request_id, [], finish=2) for request_id in ids])
    for reader in readers:
        with pytest.raises(EngineDied):
            await asyncio.wait_for(reader.task, 2)
    assert core.deaths == ["it was told to end"]


@ANYWHERE
async def test_log_probabilities_have_as_many_rivals_as_were_asked_for(core: Core) -> None:
    """A batch's arrays are as wide as its widest request, and a long prompt's come in parts."""
    reader = Reader(core, logprobs=1, prompt_logprobs=1)
    message = await sent(core)
    part = output(message[0], [])
    part[3] = logprobs([[6, 1, 2]], [3])
    core.send([part])
    first = output(message[0], [9], cached=0, finish=1)
    first[2] = logprobs([[9, 4, 9]], [2])
    core.send([first])
    await asyncio.wait_for(reader.task, 2)
    prompt = reader.events[0]
    assert [(x.chosen.token_id, x.chosen.rank) for x in prompt.logprobs] == [(6, 3)]
    assert [[top.token_id for top in x.top] for x in prompt.logprobs] == [[1]]
    (entry,) = reader.outputs()[0].logprobs
    assert (entry.chosen.token_id, entry.chosen.rank, [top.token_id for top in entry.top]) == (9, 2, [4])


def logprobs(ids: list[list[int]], ranks: list[int]) -> list[Any]:
    def array(kind: str, shape: list[int], data: bytes) -> list[Any]:
        return [kind, shape, msgspec.msgpack.Ext(3, data)]

    shape = [len(ids), len(ids[0])]
    values = [-0.5 * (i + 1) for _ in ids for i in range(shape[1])]
    flat = [i for row in ids for i in row]
    return [
        array("<i4", shape, struct.pack(f"<{len(flat)}i", *flat)),
        array("<f4", shape, struct.pack(f"<{len(values)}f", *values)),
        array("<i8", [len(ranks)], struct.pack(f"<{len(ranks)}q", *ranks)),
        None,
    ]


async def test_a_preempted_request_tells_of_its_prompt_once(core: Core) -> None:
    reader = Reader(core)
    message = await sent(core)
    core.send([output(message[0], [7], cached=1)])
    core.send([output(message[0], [8], cached=2, finish=1)])
    await asyncio.wait_for(reader.task, 2)
    assert [event for event in reader.events if isinstance(event, PromptEvent)] == [PromptEvent(1)]


@ANYWHERE
async def test_a_reader_that_leaves_aborts(core: Core) -> None:
    reader = Reader(core)
    message = await sent(core)
    core.send([output(message[0], [7], cached=0)])
    await until(lambda: reader.token_ids() == [7])
    reader.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader.task
    assert await core.receive() == (b"\x01", [message[0]])
    assert core.link._reader.num_open == 0
    core.send([output(message[0], [7])], stats={"num_running_reqs": 4})
    await until(lambda: core.stats.read().running == 4)


async def test_rows_of_unknown_requests_are_left_out(core: Core) -> None:
    reader = Reader(core)
    message = await sent(core)
    core.send([output("x-ffff", [5]), output("no key", [5]), output(message[0], [7], finish=1, cached=0)])
    await asyncio.wait_for(reader.task, 2)
    assert reader.token_ids() == [7]


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


@ANYWHERE
async def test_calls_give_results_and_failures(core: Core) -> None:
    good = asyncio.create_task(core.link.call("get_supported_tasks", 1, "x"))
    bad = asyncio.create_task(core.link.call("add_lora"))
    await asyncio.sleep(0)
    kind, (client, number, method, arguments) = await core.receive()
    assert (kind, client, method, arguments) == (b"\x03", 0, "get_supported_tasks", [1, "x"])
    _, (_, other, _, _) = await core.receive()
    core.send([], utility=[other, "it went wrong", None])
    core.send([], utility=[number, None, [None, ["generate"]]])
    core.send([], utility=[987654, None, [None, 1]])
    assert await good == ["generate"]
    with pytest.raises(Exception, match="it went wrong"):
        await bad


@ANYWHERE
@pytest.mark.parametrize("message", [b"ENGINE_CORE_DEAD", b"\x99\x00", b""])
async def test_a_death_or_an_unreadable_message_ends_it(core: Core, message: bytes) -> None:
    waiting = asyncio.create_task(core.link.call("anything"))
    await asyncio.sleep(0)
    core.output.send(message)
    with pytest.raises(EngineDied):
        await asyncio.wait_for(waiting, 2)
    assert len(core.deaths) == 1


@IN_LOOP
async def test_many_messages_leave_the_loop_its_turns(core: Core) -> None:
    reader = Reader(core, ignore_eos=True)
    message = await sent(core)
    for number in range(400):
        core.send([output(message[0], [7])], stats={"num_running_reqs": number})
    turns = 0
    async with asyncio.timeout(5):
        while core.stats.read().running < 399:
            turns += 1
            await asyncio.sleep(0)
    assert turns >= 400 / 16
    reader.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader.task


async def test_nothing_is_sent_after_the_end(core: Core) -> None:
    waiting = asyncio.create_task(core.link.call("anything"))
    await asyncio.sleep(0)
    await asyncio.to_thread(core.link.shutdown)
    with pytest.raises(EngineDied):
        await waiting
    with pytest.raises(EngineDied):
        await Reader(core).task


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


@pytest.mark.parametrize("kind", [zmq.DEALER, None])
def test_what_is_no_engine_core_is_told(kind: int | None) -> None:
    endpoints = Endpoints()
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    path = endpoints.address("output")
    with running() as process, socket.socket(socket.AF_UNIX) as stranger:
        try:
            if kind is None:
                stranger.connect(path.removeprefix("ipc://"))
                stranger.send(b"GET / HTTP/1.1\r\n")
                told = "does not speak ZMTP"
            else:
                dealer.connect(path)  # which does not talk to a PULL
                told = "did not start"
            with pytest.raises(EngineDied, match=told):
                endpoints.shake_hands(process)
        finally:
            context.destroy(linger=0)
            endpoints.close()


async def test_what_is_sent_in_one_turn_leaves_in_order(core: Core) -> None:
    requests = Requests(core)
    reader = Reader(core, "first")
    await asyncio.sleep(0)  # it has submitted
    requests.cancel("first")
    message = await sent(core)
    assert await core.receive() == (b"\x01", [message[0]])
    reader.task.cancel()
    await asyncio.gather(reader.task, return_exceptions=True)


async def test_a_core_that_takes_no_messages_is_dead(core: Core) -> None:
    core.input.close(linger=0)
    readers = []
    async with asyncio.timeout(30):
        while not core.deaths:
            readers.append(Reader(core, f"r{len(readers)}"))
            await asyncio.sleep(0.01)
    assert "does not take messages" in core.deaths[0]
    last = Reader(core, "last")
    with pytest.raises(EngineDied):
        await last.task
    for reader in readers:
        reader.task.cancel()
    await asyncio.gather(*(r.task for r in readers), return_exceptions=True)


@IN_LOOP
async def test_a_large_step_comes_in_parts_and_other_things_in_between(core: Core) -> None:
    count, cancelled = 600, 599
    readers = [Reader(core, f"r{i}") for i in range(count)]
    ids = [(await sent(core))[0] for _ in range(count)]
    turns: list[int] = []

    def look() -> None:
        """See in each turn of the loop how many have their token, and cancel one before its part comes."""
        turns.append(sum(bool(reader.events) for reader in readers))
        if turns[-1] and not readers[cancelled].events:
            core.link.cancel(f"r{cancelled}")
        if turns[-1] < count - 1:
            asyncio.get_running_loop().call_soon(look)

    core.send([output(request_id, [7], cached=0) for request_id in ids])
    look()
    async with asyncio.timeout(30):
        while turns[-1] < count - 1:
            await asyncio.sleep(0.001)
    assert len({n for n in turns if 0 < n < count - 1}) > 1
    core.send([output(request_id, [8], finish=1) for request_id in ids])
    async with asyncio.timeout(30):
        await asyncio.gather(*(reader.task for reader in readers[:cancelled]))
    assert all(reader.token_ids() == [7, 8] for reader in readers[:cancelled])
    assert readers[cancelled].token_ids() == []
    readers[cancelled].task.cancel()
    await asyncio.gather(readers[cancelled].task, return_exceptions=True)
