"""Dynamo's own KV indexer reads what a server publishes over ZMQ."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.protocols import dynamo
from tests.server.full_fake import FullFakeEngine
from tests.server.harness import Serve
from twinjet.engines.base import KvBlockFacts, KvCleared, KvEvent, KvRemoved, KvStored

ANYWHERE = "tcp://127.0.0.1:*"
BLOCK = 16


@pytest.fixture
def door() -> str:
    """One is enough: no event goes through it."""
    dynamo.require()
    return "grpc"


class Indexer:
    """`python -m dynamo.indexer`, over HTTP."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        return await asyncio.to_thread(self._post, path, body)

    def _post(self, path: str, body: Any) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)) as connection:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            return response.status, json.loads(data) if data.startswith(b"{") else data

    async def until_listening(self) -> None:
        async with asyncio.timeout(dynamo.START_S):
            while True:
                try:
                    await self.post("/query", {})
                    return
                except OSError:
                    await asyncio.sleep(0.05)

    async def matched(self, tokens: list[int], **facts: str) -> int:
        """How many tokens of a prompt it knows the replica to hold."""
        status, body = await self.post("/query", {"token_ids": tokens, "model_name": "m"} | facts)
        assert status == 200, body
        return int(body["scores"].get("7", {}).get("0", 0))

    async def until_matched(self, number: int, tokens: list[int], **facts: str) -> None:
        async with asyncio.timeout(dynamo.ANSWER_S):
            while await self.matched(tokens, **facts) != number:
                await asyncio.sleep(0.05)


@contextmanager
def indexer(folder: Path) -> Iterator[Indexer]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "PYTHON"))}
    with (folder / "indexer.log").open("w") as log:
        process = subprocess.Popen(
            [str(dynamo.PYTHON), "-m", "dynamo.indexer", "--port", str(port), "--threads", "1"],
            stdout=log, stderr=log, env=own, cwd=folder,
        )  # fmt: skip
        try:
            yield Indexer(port)
        finally:
            process.kill()
            process.wait()


def chain(first: int, num_blocks: int, parent: bytes = b"", **facts: str) -> KvStored:
    """Blocks with numbers from `first` on, whose tokens follow from the numbers."""
    numbers = range(first, first + num_blocks)
    tokens = [number * BLOCK + i for number in numbers for i in range(BLOCK)]
    medium: Any = facts.pop("medium", "device")
    hashes = [number.to_bytes(16, "big") for number in numbers]
    return KvStored(hashes, parent, tokens, BLOCK, KvBlockFacts(**facts, medium=medium))


async def test_an_indexer_that_comes_late_knows_what_is_held_and_loses_nothing(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinjet.engines.fake.FakeEngine", FullFakeEngine)
    settings = {"endpoint": ANYWHERE, "replay_endpoint": ANYWHERE, "kept_batches": 2}
    h = await serve(deployments={"m": {"engine": "fake", "kv_events": True, "kv_zmq": settings}})
    publisher = h.server.deployments.by_name["m"].kv_publisher
    assert publisher is not None

    def happens(*events: KvEvent) -> None:
        h.engine.kv_journal.put(events)  # type: ignore[attr-defined]

    early = chain(100, 4)
    happens(KvCleared(), early)
    for number in range(5):
        happens(chain(1000 + 10 * number, 2))
    with indexer(tmp_path) as dynamos:
        await dynamos.until_listening()
        status, body = await dynamos.post(
            "/register",
            {
                "instance_id": 7, "endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint,
                "model_name": "m", "block_size": BLOCK,
            },
        )  # fmt: skip
        assert status == 201, body
        # Told long before, and not kept: it comes by the replay that the first batch makes Dynamo ask for.
        async with asyncio.timeout(dynamo.ANSWER_S):
            while not await dynamos.matched([*early.token_ids, 1, 2]):
                happens(chain(5000, 1), KvRemoved(chain(5000, 1).block_hashes))
                await asyncio.sleep(0.05)
        assert await dynamos.matched([*early.token_ids, 1, 2]) == 4 * BLOCK

        longer = chain(104, 2, early.block_hashes[-1])
        happens(longer)
        await dynamos.until_matched(6 * BLOCK, [*early.token_ids, *longer.token_ids])
        happens(KvRemoved(longer.block_hashes[1:]))
        await dynamos.until_matched(5 * BLOCK, [*early.token_ids, *longer.token_ids])

        secret = chain(200, 3, salt="pepper", adapter="ada")
        happens(secret)
        tokens = list(secret.token_ids)
        await dynamos.until_matched(3 * BLOCK, tokens, cache_salt="pepper", lora_name="ada")
        for others in ({}, {"cache_salt": "pepper"}, {"lora_name": "ada"}):
            assert await dynamos.matched(tokens, **others) == 0

        h.engine.die()
        await h.until(lambda: len(h.engines) == 2)
        await dynamos.until_matched(0, list(early.token_ids))
        await h.until_ready()
        happens(chain(300, 2))
        await dynamos.until_matched(2 * BLOCK, list(chain(300, 2).token_ids))
