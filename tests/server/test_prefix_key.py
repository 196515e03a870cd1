"""What an accepted request is told to send back, so that a proxy keeps its conversation at one replica."""

from __future__ import annotations

from typing import Any

from tests.server.harness import Serve, collect
from twinjet.routing.prefix import PREFIX_KEY, prefix_key
from twinjet.v1 import generation_pb2

IDS = [i % 200 for i in range(300)]


async def _told(call: Any) -> str | bytes | None:
    await collect(call)
    metadata: dict[str, str | bytes] = dict(await call.initial_metadata())
    return metadata.get(PREFIX_KEY)


async def test_a_request_is_told_the_key_of_its_prompt(serve: Serve) -> None:
    h = await serve()

    async def told(**request: Any) -> str | bytes | None:
        return await _told(
            h.inference.Generate(generation_pb2.GenerateRequest(sampling={"max_tokens": 1}, **request))
        )

    assert await told(token_ids=IDS) == prefix_key(IDS)
    assert await told(token_ids=IDS, options={"cache_salt": "s"}) == prefix_key(IDS, "s")
    assert await told(token_ids=IDS[:15]) is None


async def test_a_conversation_keeps_its_key_while_it_grows(serve: Serve) -> None:
    h = await serve()

    async def told(turns: list[dict[str, str]]) -> str | bytes | None:
        return await _told(
            h.inference.Chat(generation_pb2.ChatRequest(messages=turns, sampling={"max_tokens": 1}))
        )

    said = "a question of some length. " * 20
    turns = [{"role": "user", "content": said}]
    longer = [*turns, {"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    key = await told(turns)
    assert key
    assert await told(longer) == key
    assert await told([{"role": "user", "content": "B" + said}]) != key
