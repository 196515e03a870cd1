"""Tokens to text, a token at a time, so that the pieces join to what decoding all at once gives.

Decodes a short window twice, with and without the new token, since a token's text depends on the ones before
it (leading spaces, characters of several tokens). Text that ends in U+FFFD may be half a character and waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from twinjet.engines.base import Tokenizer

_PROMPT_TAIL = 6
_LONGEST_WAIT = 8
"""Tokens; no character is longer, so U+FFFD after that many is really in the output."""


class IncrementalDecoder:
    """Decodes one output. prompt_token_ids: for the text's context, its tail is used."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt_token_ids[-_PROMPT_TAIL:])
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)

    def feed(self, token_id: int) -> str:
        """Take one token; return the text that is now certain."""
        self._window.append(token_id)
        return self._advance(final=len(self._window) - self._num_shown >= _LONGEST_WAIT)

    def flush(self) -> str:
        """Return the text that was still waiting."""
        return self._advance(final=True) if len(self._window) > self._num_shown else ""

    def _advance(self, *, final: bool) -> str:
        text = self._decode(self._window)
        if not final and (text.endswith("\ufffd") or len(text) <= len(self._shown)):
            return ""
        new = text[len(self._shown) :]
        self._window = self._window[self._num_shown :] or self._window
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)
