"""Texts to token ids and back, so that long ones hold up nobody else: off the loop, and no more of them than counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from twinjet.engines.base import ChatTurn, RenderedChat, Tokenizer
from twinjet.errors import InvalidRequest

INLINE_CHARS = 2048
"""Longer texts are tokenized in a thread, so that other streams go on meanwhile."""
_TURN_CHARS = 32
"""What a template writes around a turn, about: thousands of empty ones are a long text too."""
LONG_CHARS = 256 << 10
"""Of texts longer than this, which take tenths of seconds, one is tokenized at a time."""
_HEAD_CHARS_A_TOKEN = 8
"""A text longer than the context times this is looked at from its beginning: most are refused without the rest."""
_SLACK = 64
"""Tokens by which the beginning of a text may have more of them than it has as a part of the text."""


class Encoder:
    """Tokenizes for one server. One asyncio loop."""

    def __init__(self) -> None:
        self._long = asyncio.Semaphore(1)

    async def encode(
        self, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Give a text's token ids, however many."""
        if len(text) <= INLINE_CHARS:
            return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        async with self._turn(len(text)):
            return tuple(
                await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
            )

    async def prompt(self, tokenizer: Tokenizer, text: str, most: int, field: str) -> tuple[int, ...]:
        """Give a prompt's token ids. Raises InvalidRequest if its beginning alone has more than `most` tokens."""
        if len(text) > most * _HEAD_CHARS_A_TOKEN:
            await asyncio.to_thread(_check_head, tokenizer, text, most, field)
        return await self.encode(tokenizer, text)

    async def chat(
        self,
        tokenizer: Tokenizer,
        turns: Sequence[ChatTurn],
        *,
        continue_final: bool = False,
        parse: bool,
        add_special_tokens: bool = False,
        most: int | None = None,
    ) -> tuple[str, tuple[int, ...]]:
        """Give a conversation as text and as token ids. parse: control tokens in its content count as such.

        most: as for prompt(); None is any. Raises InvalidRequest.
        """

        def encode() -> tuple[str, tuple[int, ...]]:
            if parse:
                rendered = RenderedChat(tokenizer.render_chat(turns, continue_final=continue_final))
            else:
                rendered = tokenizer.render_as_data(turns, continue_final=continue_final)
            if most is not None and len(rendered.text) > most * _HEAD_CHARS_A_TOKEN:
                _check_head(tokenizer, rendered.text, most, "messages")
            return rendered.text, tuple(
                tokenizer.encode_rendered(rendered, add_special_tokens=add_special_tokens)
            )

        num_chars = sum(_TURN_CHARS + len(turn.content) for turn in turns)
        if num_chars <= INLINE_CHARS:
            return encode()
        async with self._turn(num_chars):
            return await asyncio.to_thread(encode)

    async def decode(self, tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Give the text of token ids."""
        if len(ids) <= INLINE_CHARS:
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        async with self._turn(len(ids)):
            return await asyncio.to_thread(tokenizer.decode, ids, skip_special_tokens=skip_special_tokens)

    @asynccontextmanager
    async def _turn(self, num_chars: int) -> AsyncIterator[None]:
        if num_chars <= LONG_CHARS:
            yield
            return
        async with self._long:
            yield


def _check_head(tokenizer: Tokenizer, text: str, most: int, field: str) -> None:
    num_tokens = len(tokenizer.encode(text[: most * _HEAD_CHARS_A_TOKEN], add_special_tokens=False))
    if num_tokens > most + _SLACK:
        raise InvalidRequest.of(
            field,
            f"the prompt has more than {num_tokens - _SLACK} tokens; the model's context is {most}, "
            f"allowed: 1 to {most - 1}",
        )
