"""KV events over ZMQ: what a subscriber is told, what a replay gives, and what the engine's death does to it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import zmq.asyncio

from tests.engines.test_kv_journal import random_events
from tests.server.full_fake import FullFakeEngine
from tests.server.harness import Harness, Serve
from twinjet.config import Config, KvZmqSettings
from twinjet.engines.base import KvBlockFacts, KvRemoved, KvStored
from twinjet.engines.kv_journal import KvJournal
from twinjet.engines.supervisor import State
from twinjet.errors import ConfigError
from twinjet.protocols.openengine.kv import sources
from twinjet.server.kv_zmq import KvPublisher, Translator
from twinjet.v1 import routing_pb2

ANYWHERE = "tcp://127.0.0.1:*"
END = (1 << 64) - 1
MEDIA = {None: None, "device": "GPU", "host": "CPU", "disk": "STORAGE"}


@pytest.fixture
def door() -> str:
    """One is enough: no event goes through it."""
    return "grpc"


class Subscriber:
    """Reads batches and keeps the blocks that they tell of, by number and medium."""

    def __init__(self, publisher: KvPublisher, topic: str = "") -> None:
        context = zmq.asyncio.Context.instance()
        self._live = context.socket(zmq.SUB)
        self._live.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._live.connect(publisher.endpoint)
        self._replay = context.socket(zmq.DEALER)
        self._replay.connect(publisher.replay_endpoint)
        self.sequences: list[int] = []
        self.topics: set[bytes] = set()
        self.blocks: dict[tuple[int, str | None], tuple[Any, ...]] = {}

    async def read(self, timeout_s: float = 10.0) -> Any:
        """Take the next batch in; gives its events."""
        async with asyncio.timeout(timeout_s):
            topic, sequence, data = await self._live.recv_multipart()
        self.topics.add(topic)
        number = int.from_bytes(sequence, "big")
        # Before a replay the beginning is missing, and after one it may have told what is still on its way.
        return self._take(number, data) if self.sequences and number > self.sequences[-1] else []

    async def replay(self, first: int) -> list[Any]:
        """Take in what a replay gives; its batches' events."""
        await self._replay.send_multipart((b"", first.to_bytes(8, "big")))
        told = []
        async with asyncio.timeout(10):
            while True:
                empty, topic, sequence, data = await self._replay.recv_multipart()
                assert empty == b""
                if (number := int.from_bytes(sequence, "big")) == END:
                    assert (topic, data) == (b"", b"")
                    return told
                self.topics.add(topic)
                told.append(self._take(number, data))

    def _take(self, sequence: int, data: bytes) -> Any:
        time_s, events, rank = msgspec.msgpack.decode(data)
        assert time_s > 0 and rank == 0
        self.sequences.append(sequence)
        for event in events:
            match event["type"]:
                case "BlockStored":
                    self._store(event)
                case "BlockRemoved":
                    for number in event["block_hashes"]:
                        del self.blocks[number, event["medium"]]
                case "AllBlocksCleared":
                    self.blocks.clear()
        return events

    def _store(self, event: Any) -> None:
        parent, size = event["parent_block_hash"], event["block_size"]
        for i, number in enumerate(event["block_hashes"]):
            tokens = tuple(event["token_ids"][i * size : (i + 1) * size])
            keys = event["extra_keys"][i]
            self.blocks[number, event["medium"]] = (parent, tokens, event["lora_name"], keys)
            parent = number

    def close(self) -> None:
        self._live.close(linger=0)
        self._replay.close(linger=0)


def number(block_hash: bytes) -> int:
    return int.from_bytes(block_hash[-8:], "big")


def held(journal: KvJournal) -> dict[tuple[int, str | None], tuple[Any, ...]]:
    """What a subscriber should know of a journal."""
    blocks = {}
    for block_hash, block in journal._blocks.items():
        salt, adapter = block.facts.salt, block.facts.adapter
        keys = [k for k in (adapter, salt if not block.parent_hash else "") if k] or None
        parent = number(block.parent_hash) if block.parent_hash else None
        where = (number(block_hash), MEDIA[block.facts.medium])
        blocks[where] = (parent, tuple(block.token_ids), adapter or None, keys)
    return blocks


class StandIn:
    """A supervisor with a ready engine that tells KV events."""

    def __init__(self) -> None:
        self.state = State.READY
        self.engine = self
        self.kv_journal = KvJournal()
        self.capabilities = {"kv_events"}

    def describe(self) -> StandIn:
        return self


@pytest.fixture
async def opened() -> AsyncIterator[Any]:
    made: list[Any] = []

    def make(topic: str = "", kept_batches: int = 10_000) -> tuple[KvPublisher, StandIn, Subscriber]:
        settings = KvZmqSettings(
            endpoint=ANYWHERE, replay_endpoint=ANYWHERE, topic=topic, kept_batches=kept_batches
        )
        publisher = KvPublisher("m", settings, "full_attention")
        publisher.open()
        supervisor = StandIn()
        publisher.changed(supervisor)  # type: ignore[arg-type]
        made.extend([publisher, Subscriber(publisher, topic)])
        return publisher, supervisor, made[-1]

    yield make
    for closable in reversed(made):
        closable.close()


async def joined(publisher: KvPublisher, supervisor: StandIn, subscriber: Subscriber) -> None:
    """A subscriber that missed the beginning gets a live batch, and then asks for what came before."""
    while True:
        supervisor.kv_journal.put([KvStored((b"probe",), b"", (1, 2), 2), KvRemoved((b"probe",))])
        try:
            await subscriber.read(0.1)
            break
        except TimeoutError:
            continue
    await subscriber.replay(0)


async def caught_up(supervisor: StandIn, subscriber: Subscriber) -> None:
    while subscriber.blocks != held(supervisor.kv_journal):
        await subscriber.read()


def test_a_batch_is_written_as_vllm_writes_it() -> None:
    facts = KvBlockFacts("pepper", "ada", "device")
    translator = Translator("full_attention")
    first, second = b"\xff" * 24 + (1).to_bytes(8, "big"), (2).to_bytes(8, "big")
    stored = KvStored((first, second), b"", (5, 6, 7, 8), 2, facts)
    assert translator.batch(3.5, [stored, KvRemoved((second, b"unknown"))]) == [
        3.5,
        [
            {
                "type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": None,
                "token_ids": (5, 6, 7, 8), "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": "ada",
                "extra_keys": [("ada", "pepper"), ("ada",)], "cache_salt": "pepper",
                "group_idx": 0, "kv_cache_spec_kind": "full_attention",
            },
            {"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU", "group_idx": 0},
        ],
        0,
    ]  # fmt: skip


def test_a_block_that_moves_is_removed_where_it_was() -> None:
    translator = Translator(None)
    here, there = KvBlockFacts(medium="device"), KvBlockFacts(medium="host")
    translator.batch(1.0, [KvStored((b"a", b"b"), b"", (1, 2), 1, here)])
    _, events, _ = translator.batch(2.0, [KvStored((b"b",), b"a", (2,), 1, there)])
    assert [(e["type"], e["block_hashes"], e["medium"]) for e in events] == [
        ("BlockRemoved", [98], "GPU"),
        ("BlockStored", [98], "CPU"),
    ]
    _, events, _ = translator.batch(3.0, [KvRemoved((b"a", b"b"))])
    assert [(e["type"], e["block_hashes"], e["medium"]) for e in events] == [
        ("BlockRemoved", [97], "GPU"),
        ("BlockRemoved", [98], "CPU"),
    ]


@pytest.mark.parametrize("seed", range(6))
async def test_who_comes_late_and_asks_for_the_beginning_holds_what_the_engine_holds(
    opened: Any, seed: int
) -> None:
    """kept_batches: from one, where a replay is nearly always all there is, to more than there are."""
    rng = random.Random(seed)
    publisher, supervisor, _ = opened(kept_batches=rng.choice([1, 3, 10, 1000]))
    names: set[bytes] = set()
    counter = [0]
    subscribers: list[Subscriber] = []
    with contextlib.ExitStack() as closing:
        for _ in range(60):
            if events := random_events(rng, names, counter):
                supervisor.kv_journal.put(events)
            if rng.random() < 0.3:
                await asyncio.sleep(0)
            if rng.random() < 0.05:
                subscribers.append(closing.enter_context(contextlib.closing(Subscriber(publisher))))
                await joined(publisher, supervisor, subscribers[-1])
                assert subscribers[-1].blocks == held(supervisor.kv_journal)
            if rng.random() < 0.05:
                supervisor.state = State.RESTARTING
                publisher.changed(supervisor)  # type: ignore[arg-type]
                supervisor.state, supervisor.kv_journal = State.READY, KvJournal()
                names.clear()
                publisher.changed(supervisor)  # type: ignore[arg-type]
        for subscriber in subscribers:
            await caught_up(supervisor, subscriber)
            assert subscriber.sequences == sorted(set(subscriber.sequences))


async def test_a_replay_gives_the_batches_that_were_missed(opened: Any) -> None:
    publisher, supervisor, subscriber = opened(topic="kv@1")
    await joined(publisher, supervisor, subscriber)
    last = subscriber.sequences[-1]
    for i in range(4):
        supervisor.kv_journal.put([KvStored((b"%d" % i,), b"", (i,), 1)])
    missed = [await subscriber.read() for _ in range(4)]
    assert subscriber.sequences[-4:] == [last + 1, last + 2, last + 3, last + 4]
    assert await subscriber.replay(last + 2) == missed[1:]
    assert await subscriber.replay(last + 5) == []
    assert subscriber.topics == {b"kv@1"}


async def test_what_is_no_request_for_a_replay_is_let_be(
    opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    publisher, supervisor, subscriber = opened()
    for wrong in ((b"",), (b"", b"1234567"), (b"x", bytes(8)), (b"", bytes(8), b"")):
        await subscriber._replay.send_multipart(wrong)
    await joined(publisher, supervisor, subscriber)
    assert caplog.text.count("a request for KV events' replay") == 4


async def test_a_server_tells_of_every_engine_that_it_starts(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinjet.engines.fake.FakeEngine", FullFakeEngine)
    zmq_settings = {"endpoint": ANYWHERE, "replay_endpoint": ANYWHERE}
    deployment = {"engine": "fake", "kv_events": True, "kv_zmq": zmq_settings}
    h = await serve(deployments={"m": deployment})
    subscriber = Subscriber(_publisher(h))
    (source,) = sources(h.server.deployments)
    assert f"tcp://{source.endpoint_addr.host}:{source.endpoint_addr.port}" == _publisher(h).endpoint
    journal = h.engine.kv_journal  # type: ignore[attr-defined]
    journal.put([KvStored((b"new",), b"", (7, 8), 2)])
    await subscriber.replay(0)
    assert subscriber.blocks == held(journal)
    assert subscriber.blocks
    num_before = len(subscriber.sequences)
    h.engine.die()
    await h.until(lambda: len(h.engines) == 2)
    await h.until_ready()
    await subscriber.replay(subscriber.sequences[-1] + 1)
    assert subscriber.blocks == held(h.engine.kv_journal)  # type: ignore[attr-defined]
    assert len(subscriber.blocks) == 1
    assert subscriber.sequences == list(range(len(subscriber.sequences)))
    assert len(subscriber.sequences) > num_before
    subscriber.close()


def _publisher(h: Harness) -> KvPublisher:
    publisher = h.server.deployments.by_name["m"].kv_publisher
    assert publisher is not None
    return publisher


async def test_an_engine_without_events_is_told_of_in_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    await serve(deployments={"m": {"engine": "fake", "kv_events": True, "kv_zmq": {"endpoint": "tcp://*:0"}}})
    assert "m tells no KV events" in caplog.text


async def test_an_endpoint_that_is_taken_ends_the_start_and_refuses_an_addition(serve: Serve) -> None:
    socket = zmq.Context.instance().socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    settings = {"endpoint": "tcp://*:0", "replay_endpoint": f"tcp://127.0.0.1:{port}"}
    deployment = {"engine": "fake", "kv_events": True, "kv_zmq": settings}
    try:
        with pytest.raises(ConfigError, match=r"deployments.m.kv_zmq.replay_endpoint: cannot use .*in use"):
            await serve(deployments={"m": deployment})
        h = await serve()
        request = routing_pb2.AddDeploymentRequest(name="other")
        request.settings.update(deployment)
        with pytest.raises(grpc.aio.AioRpcError, match=r"kv_zmq.replay_endpoint: cannot use .*in use"):
            await h.admin.AddDeployment(request)
        assert list(h.server.deployments.by_name) == ["fake"]
    finally:
        socket.close(linger=0)


async def test_a_publisher_connects_to_who_listens(tmp_path: Path) -> None:
    """As llm-d's picker does, to which all replicas connect."""
    listener = zmq.asyncio.Context.instance().socket(zmq.SUB)
    listener.setsockopt(zmq.SUBSCRIBE, b"kv@")
    port = listener.bind_to_random_port("tcp://127.0.0.1")
    publisher = KvPublisher("m", KvZmqSettings(endpoint=f"tcp://127.0.0.1:{port}", topic="kv@me"), None)
    publisher.open()
    supervisor = StandIn()
    publisher.changed(supervisor)  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        while not await listener.poll(50):
            supervisor.kv_journal.put([KvStored((b"a",), b"", (1,), 1)])
    topic, _, data = await listener.recv_multipart()
    assert topic == b"kv@me"
    assert msgspec.msgpack.decode(data)[1]
    assert publisher.listens_at is None
    publisher.close()
    listener.close(linger=0)


@pytest.mark.parametrize(
    ("deployment", "message"),
    [
        ({"kv_zmq": {"endpoint": ANYWHERE}}, "kv_zmq.endpoint needs kv_events = true"),
        ({"kv_events": True, "kv_zmq": {"replay_endpoint": ANYWHERE}}, "replay_endpoint needs endpoint"),
        ({"kv_events": True, "kv_zmq": {"endpoint": "udp://h:1"}}, "is no ZMQ endpoint"),
    ],
)
def test_settings_that_cannot_be_are_named(deployment: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"deployments": {"m": {"engine": "fake"} | deployment}})
