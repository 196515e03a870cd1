"""Text and stop strings of one output, from its tokens as they come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from twinjet.engines.stops import StopScanner

if TYPE_CHECKING:
    from twinjet.models.tokenizer import HfTokenizer
    from twinjet.request import Sampling

logger = logging.getLogger(__name__)

_CONTEXT = 6
"""Tokens of the prompt that the first token's text may depend on."""


class OutputText:
    """Decodes one output.

    num_kept: tokens of the last feed() that belong to the output; those behind a stop string do not.
    stop: the stop string that ended it, None while there is none.
    """

    __slots__ = ("_make", "_min_tokens", "_num_tokens", "_scanner", "_step", "_with_stop", "num_kept", "stop")

    def __init__(self, tokenizer: HfTokenizer, prompt_token_ids: Sequence[int], sampling: Sampling) -> None:
        def make(context: Sequence[int]) -> Callable[[int], str | None]:
            return tokenizer.decode_stream(context, skip_special_tokens=sampling.skip_special_tokens)

        self._make = make
        self._step = make(prompt_token_ids[-_CONTEXT:])
        self._with_stop = sampling.include_stop
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._scanner = StopScanner(sampling.stop, include=sampling.include_stop) if sampling.stop else None
        self.num_kept = 0
        self.stop: str | None = None

    def feed(self, token_ids: Sequence[int], *, is_stop: bool, is_last: bool) -> str:
        """Take new tokens; return what may be shown.

        is_stop: the last one is an end or stop token. is_last: the output has ended.
        """
        self.num_kept = len(token_ids)
        # The text of a stop token is part of the output only if that of stop strings is.
        shown = token_ids[:-1] if is_stop and not self._with_stop else token_ids
        scanner = self._scanner
        if scanner is None:
            return "".join([self._decode(token) for token in shown])
        text = ""
        for i, token in enumerate(shown):
            self._num_tokens += 1
            text += scanner.feed(self._decode(token), may_match=self._num_tokens > self._min_tokens)
            if scanner.matched is not None:
                self.stop, self.num_kept = scanner.matched, i + 1
                return text
        return text + scanner.flush() if is_last else text

    def _decode(self, token: int) -> str:
        if token < 0:
            # The mark of a row that had no admissible token.
            return ""
        try:
            return self._step(token) or ""
        except Exception:  # the library raises nothing narrower
            # Tokens whose bytes are no text in this order leave the library's stream unusable.
            logger.debug("the text decoder was reset at token %d", token, exc_info=True)
            self._step = self._make(())
            return self._step(token) or ""
