"""Texts to token ids: long ones hold up nobody else, and what is far too long is not tokenized whole."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Sequence
from typing import Any, cast
from urllib.parse import quote

import pytest

from twinjet.engines.base import ChatTurn, RenderedChat, Tokenizer
from twinjet.engines.fake import FakeTokenizer
from twinjet.errors import InvalidRequest, NotFound, Overloaded, Violation
from twinjet.server.encoding import INLINE_CHARS, LONG_CHARS, MAX_HELD_CHARS, Encoder
from twinjet.server.status import to_failure


class Sparse(FakeTokenizer):
    """A token for each hundred characters."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0] * (len(text) // 100)


class Slow(FakeTokenizer):
    """Tells how many texts it has at once, and keeps each until it is let go."""

    def __init__(self) -> None:
        self.num_now = self.num_most = 0
        self.go = threading.Event()
        self.lock = threading.Lock()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self.lock:
            self.num_now += 1
            self.num_most = max(self.num_most, self.num_now)
        assert self.go.wait(30)
        with self.lock:
            self.num_now -= 1
        return [len(text)]


def _tokenizer(made: Any) -> Tokenizer:
    return cast("Tokenizer", made)


async def test_a_long_text_of_few_tokens_is_tokenized_whole() -> None:
    ids = await Encoder().prompt(_tokenizer(Sparse()), "x" * 20_000, 250, "text", caller="a")
    assert len(ids) == 200


@pytest.mark.parametrize("num_chars", [801, 5000])
async def test_a_beginning_with_too_many_tokens_is_enough(num_chars: int) -> None:
    with pytest.raises(InvalidRequest, match="more than 736 tokens; the model's context is 100"):
        await Encoder().prompt(_tokenizer(FakeTokenizer()), "x" * num_chars, 100, "text", caller="a")


async def test_of_long_texts_one_is_tokenized_at_a_time_and_shorter_ones_meanwhile() -> None:
    encoder, slow = Encoder(), Slow()
    long = [
        asyncio.create_task(encoder.encode(_tokenizer(slow), "x" * (LONG_CHARS + i), caller="a"))
        for i in (1, 2, 3)
    ]
    async with asyncio.timeout(30):
        while slow.num_now < 1:
            await asyncio.sleep(0.001)
        assert (
            len(await encoder.encode(_tokenizer(FakeTokenizer()), "x" * LONG_CHARS, caller="a"))
            == LONG_CHARS + 1
        )
        slow.go.set()
        assert await asyncio.gather(*long) == [(LONG_CHARS + i,) for i in (1, 2, 3)]
    assert slow.num_most == 1


async def test_no_more_long_text_is_kept_than_there_is_room_for_and_shorter_ones_still_pass() -> None:
    encoder, slow = Encoder(), Slow()

    async def keep(num_chars: int, caller: str) -> None:
        with encoder.hold(num_chars, caller):
            await asyncio.to_thread(slow.go.wait, 30)

    most = MAX_HELD_CHARS - MAX_HELD_CHARS // 9
    first = asyncio.create_task(keep(most - LONG_CHARS, "a"))
    await asyncio.sleep(0)
    long = "x" * (LONG_CHARS + 1)
    for ask in (
        encoder.encode(_tokenizer(slow), long, caller="a"),
        encoder.prompt(_tokenizer(slow), long, 100, "text", caller="a"),
        encoder.chat(_tokenizer(slow), [ChatTurn("user", long)], caller="a", parse=False, most=100_000),
    ):
        with pytest.raises(Overloaded) as refused:
            await ask
        assert refused.value.retry_after_s > 0
    fake = _tokenizer(FakeTokenizer())
    assert len(await encoder.encode(fake, "x" * LONG_CHARS, caller="a")) == LONG_CHARS + 1
    # What it leaves to others is not all theirs either.
    second = asyncio.create_task(keep(MAX_HELD_CHARS // 9, "b"))
    await asyncio.sleep(0)
    assert len(await encoder.encode(fake, "x" * LONG_CHARS, caller="c")) == LONG_CHARS + 1
    with pytest.raises(Overloaded):
        await encoder.encode(fake, long + long, caller="c")
    slow.go.set()
    await asyncio.gather(first, second)
    assert await encoder.encode(_tokenizer(slow), long, caller="a") == (len(long),)


@pytest.mark.parametrize(("num_chars", "is_inline"), [(100, True), (INLINE_CHARS + 1, False)])
async def test_what_is_made_of_many_ids_is_made_beside_the_loop(num_chars: int, is_inline: bool) -> None:
    def make(ids: Sequence[int]) -> tuple[int, int]:
        return len(ids), threading.get_ident()

    encoder, fake, text = Encoder(), _tokenizer(FakeTokenizer()), "x" * num_chars
    made = [await encoder.encode_as(make, fake, text, caller="a", add_special_tokens=True)]
    rendered, chat = await encoder.chat_as(make, fake, [ChatTurn("user", text)], caller="a", parse=False)
    made.append(chat)
    assert [num_ids for num_ids, _ in made] == [num_chars + 1, len(rendered)]
    assert all((thread == threading.get_ident()) is is_inline for _, thread in made)


class Where(FakeTokenizer):
    """Tells on which thread it rendered."""

    thread: int | None = None

    def render_as_data(self, messages: Sequence[ChatTurn], *, continue_final: bool) -> RenderedChat:
        self.thread = threading.get_ident()
        return super().render_as_data(messages, continue_final=continue_final)


@pytest.mark.parametrize(("num_turns", "is_inline"), [(3, True), (4096, False)])
async def test_thousands_of_empty_turns_are_a_long_text(num_turns: int, is_inline: bool) -> None:
    where = Where()
    await Encoder().chat(
        _tokenizer(where), [ChatTurn("user", "")] * num_turns, caller="a", parse=False, most=100_000
    )
    assert (where.thread == threading.get_ident()) is is_inline


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest([Violation(f"field{i}", "🌶" * 1000) for i in range(100)]),
        NotFound("model", "🌶" * 1000, "x"),
        NotFound("model", "\ud800" * 1000, "x"),
    ],
    ids=["violations", "name", "surrogates"],
)
def test_whatever_an_error_repeats_it_fits_into_trailers(error: Any) -> None:
    failure = to_failure(error)
    ((_, details),) = failure.trailing_metadata
    assert len(quote(failure.message)) + len(base64.b64encode(details)) < 8000
