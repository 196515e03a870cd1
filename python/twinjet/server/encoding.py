"""Texts to token ids and back, so that long ones hold up nobody else: off the loop, the shortest first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from twinjet.engines.base import ChatTurn, RenderedChat, Tokenizer
from twinjet.errors import InvalidRequest
from twinjet.shortest_first import ShortestFirst

INLINE_CHARS = 2048
"""Longer texts are tokenized in a thread, so that other streams go on meanwhile."""
_TURN_CHARS = 32
"""What a template writes around a turn, about: thousands of empty ones are a long text too."""
LONG_CHARS = 64 << 10
"""Texts longer than this, which take hundredths of seconds, leave half of the threads to others."""
_HEAD_CHARS_A_TOKEN = 8
"""A text longer than the context times this is looked at from its beginning: most are refused without the rest."""
_SLACK = 64
"""Tokens by which the beginning of a text may have more of them than it has as a part of the text."""


class Encoder:
    """Tokenizes for one server. One asyncio loop."""

    def __init__(self) -> None:
        self._threads = ShortestFirst(LONG_CHARS)

    async def encode(
        self, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Give a text's token ids, however many."""
        if len(text) <= INLINE_CHARS:
            return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        work = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return tuple(await self._threads.run(len(text), work))

    async def prompt(self, tokenizer: Tokenizer, text: str, most: int, field: str) -> tuple[int, ...]:
        """Give a prompt's token ids. Raises InvalidRequest if its beginning alone has more than `most` tokens."""
        num_chars = most * _HEAD_CHARS_A_TOKEN
        if len(text) > num_chars:
            await self._threads.run(num_chars, partial(_check_head, tokenizer, text, most, field))
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
        return await self._threads.run(num_chars, encode)

    async def decode(self, tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Give the text of token ids."""
        if len(ids) <= INLINE_CHARS:
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        work = partial(tokenizer.decode, ids, skip_special_tokens=skip_special_tokens)
        return await self._threads.run(len(ids), work)


def _check_head(tokenizer: Tokenizer, text: str, most: int, field: str) -> None:
    num_tokens = len(tokenizer.encode(text[: most * _HEAD_CHARS_A_TOKEN], add_special_tokens=False))
    if num_tokens > most + _SLACK:
        raise InvalidRequest.of(
            field,
            f"the prompt has more than {num_tokens - _SLACK} tokens; the model's context is {most}, "
            f"allowed: 1 to {most - 1}",
        )
