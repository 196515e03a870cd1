"""Texts to token ids and back, so that long ones hold up nobody else: off the loop, in turns of their callers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from twinjet.addresses import take_off
from twinjet.engines.base import ChatTurn, RenderedChat, Tokenizer
from twinjet.errors import InvalidRequest, Overloaded
from twinjet.fair_threads import FairThreads

_Made = TypeVar("_Made")

INLINE_CHARS = 2048
"""Longer texts are tokenized in a thread, so that other streams go on meanwhile."""
_TURN_CHARS = 32
"""What a template writes around a turn, about: thousands of empty ones are a long text too."""
LONG_CHARS = 64 << 10
"""Texts longer than this, which take hundredths of seconds, leave half of the threads to others."""
_HEAD_CHARS_A_TOKEN = 8
"""A text longer than the context times this is looked at from its beginning: most are refused without the rest."""
MAX_HELD_CHARS = 128 << 20
"""Characters of texts that wait to be tokenized, of long ones and of shorter ones: they take some bytes of memory each."""
_RETRY_AFTER_S = 1.0
_SLACK = 64
"""Tokens by which the beginning of a text may have more of them than it has as a part of the text."""


class _Held:
    """Characters that are kept, of all and of each caller that has any."""

    def __init__(self) -> None:
        self.total = 0
        self.of_caller: Counter[str] = Counter()


class Encoder:
    """Tokenizes for one server. One asyncio loop.

    caller: who is asking, a tenant or an address: see FairThreads, and hold() for what one may keep here.
    """

    def __init__(self) -> None:
        self._threads = FairThreads(LONG_CHARS)
        self._short, self._long = _Held(), _Held()

    async def encode(
        self, tokenizer: Tokenizer, text: str, *, caller: str, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Give a text's token ids, however many."""
        return await self.encode_as(
            tuple, tokenizer, text, caller=caller, add_special_tokens=add_special_tokens
        )

    async def encode_as(
        self,
        make: Callable[[Sequence[int]], _Made],
        tokenizer: Tokenizer,
        text: str,
        *,
        caller: str,
        add_special_tokens: bool,
    ) -> _Made:
        """Give what is made of a text's token ids; of many, on the thread on which they come to be."""

        def work() -> _Made:
            return make(tokenizer.encode(text, add_special_tokens=add_special_tokens))

        if len(text) <= INLINE_CHARS:
            return work()
        with self.hold(len(text), caller):
            return await self._threads.run(len(text), work, caller)

    async def prompt(
        self, tokenizer: Tokenizer, text: str, most: int, field: str, *, caller: str
    ) -> tuple[int, ...]:
        """Give a prompt's token ids. Raises InvalidRequest if its beginning alone has more than `most` tokens."""
        num_chars = most * _HEAD_CHARS_A_TOKEN
        if len(text) > num_chars:
            with self.hold(len(text), caller):
                work = partial(_check_head, tokenizer, text, most, field)
                await self._threads.run(num_chars, work, caller)
        return await self.encode(tokenizer, text, caller=caller)

    async def chat(
        self,
        tokenizer: Tokenizer,
        turns: Sequence[ChatTurn],
        *,
        caller: str,
        continue_final: bool = False,
        parse: bool,
        most: int,
    ) -> tuple[int, ...]:
        """Give a conversation as token ids. parse: control tokens in its content count as such.

        most: as for prompt(). Raises InvalidRequest.
        """
        _, ids = await self.chat_as(
            tuple, tokenizer, turns, caller=caller, continue_final=continue_final, parse=parse, most=most
        )
        return ids

    async def chat_as(
        self,
        make: Callable[[Sequence[int]], _Made],
        tokenizer: Tokenizer,
        turns: Sequence[ChatTurn],
        *,
        caller: str,
        continue_final: bool = False,
        parse: bool,
        add_special_tokens: bool = False,
        most: int | None = None,
    ) -> tuple[str, _Made]:
        """Give a conversation as text, and what is made of its token ids, as encode_as() does. most: None is any."""

        def encode() -> tuple[str, _Made]:
            if parse:
                rendered = RenderedChat(tokenizer.render_chat(turns, continue_final=continue_final))
            else:
                rendered = tokenizer.render_as_data(turns, continue_final=continue_final)
            if most is not None:
                _check_head(tokenizer, rendered.text, most, "messages")
            return rendered.text, make(
                tokenizer.encode_rendered(rendered, add_special_tokens=add_special_tokens)
            )

        num_chars = sum(_TURN_CHARS + len(turn.content) for turn in turns)
        if num_chars <= INLINE_CHARS:
            return encode()
        with self.hold(num_chars, caller):
            return await self._threads.run(num_chars, encode, caller)

    @contextmanager
    def hold(self, num_chars: int, caller: str) -> Iterator[None]:
        """Count text that is kept until it has been tokenized. Raises Overloaded where that is too much.

        Long texts have a bound of their own: who sends many of them keeps nobody's shorter ones out. Of either bound
        one caller leaves a ninth to others.
        """
        held = self._long if num_chars > LONG_CHARS else self._short
        if (
            held.total + num_chars > MAX_HELD_CHARS
            or held.of_caller[caller] + num_chars > MAX_HELD_CHARS - MAX_HELD_CHARS // 9
        ):
            raise Overloaded("too much text waits to be tokenized", retry_after_s=_RETRY_AFTER_S)
        held.total += num_chars
        held.of_caller[caller] += num_chars
        try:
            yield
        finally:
            held.total -= num_chars
            take_off(held.of_caller, caller, num_chars)

    async def decode(
        self, tokenizer: Tokenizer, ids: Sequence[int], *, caller: str, skip_special_tokens: bool
    ) -> str:
        """Give the text of token ids."""
        if len(ids) <= INLINE_CHARS:
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        work = partial(tokenizer.decode, ids, skip_special_tokens=skip_special_tokens)
        return await self._threads.run(len(ids), work, caller)


def tokens_at_least(tokenizer: Tokenizer, text: str, most: int) -> int:
    """Give how many tokens a text has at least, by its beginning; 0 for one that is not long enough to be looked at so."""
    num_chars = most * _HEAD_CHARS_A_TOKEN
    if len(text) <= num_chars:
        return 0
    return max(len(tokenizer.encode(text[:num_chars], add_special_tokens=False)) - _SLACK, 0)


def _check_head(tokenizer: Tokenizer, text: str, most: int, field: str) -> None:
    num_tokens = tokens_at_least(tokenizer, text, most)
    if num_tokens > most:
        raise InvalidRequest.of(
            field,
            f"the prompt has more than {num_tokens} tokens; the model's context is {most}, "
            f"allowed: 1 to {most - 1}",
        )
