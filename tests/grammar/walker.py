"""Random walks through a compiled grammar, over a model's vocabulary and without the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import xgrammar

from twinjet.grammar.compilation import compile_text, written
from twinjet.grammar.vocabulary import Vocabulary, tokenizer_info


class Walker:
    """Draws outputs of a grammar at random, with a leaning towards their ends."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._info = tokenizer_info(vocabulary.path)
        self._tokens: list[bytes] = list(self._info.decoded_vocab)
        self._ends = set(vocabulary.end_token_ids)
        self._compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        self._bitmask = xgrammar.allocate_token_bitmask(1, self._info.vocab_size)
        self._is_space = np.array([not t.strip() for t in self._tokens])
        self._is_closer = np.array([t[:1] in (b'"', b"}", b"]", b",", b":") for t in self._tokens])
        self._is_end = np.array([t in (b'"', b"}", b"]", b'"}', b'"]', b"}}", b":") for t in self._tokens])
        self._is_text = np.array([_is_text(t) for t in self._tokens])
        self._is_short = np.array([len(t) <= 2 for t in self._tokens])

    def compile(self, kind: str, value: str) -> Any:
        return compile_text(self._compiler, *written(kind, value, ()), is_compact=False)

    def walk(self, compiled: Any, random: np.random.Generator, most: int = 200) -> str | None:
        """Give one complete output, or None if it was not complete after so many tokens or came to a dead end."""
        matcher = xgrammar.GrammarMatcher(compiled)
        text = b""
        for step in range(most):
            matcher.fill_next_token_bitmask(self._bitmask)
            bits = np.unpackbits(self._bitmask.numpy().view(np.uint8), bitorder="little")
            (ids,) = np.nonzero(bits[: self._info.vocab_size])
            if not len(ids):
                # A dead end of the compiler's, which the server tells as NO_ADMISSIBLE_TOKEN.
                return None
            can_end = bool(self._ends & set(ids.tolist()))
            going_on = ids[~self._is_space[ids] & ~np.isin(ids, list(self._ends))]
            # The compiler's "any character" takes in bytes that no text has, such as those of lone surrogates.
            if len(whole := going_on[self._is_text[going_on]]):
                going_on = whole
            if can_end and (not len(going_on) or random.random() < 0.4):
                return text.decode()
            if not len(going_on):
                going_on = ids
            token = self._choose(going_on, random, step)
            assert matcher.accept_token(token)
            text += self._tokens[token]
        return None

    def _choose(self, ids: Any, random: np.random.Generator, step: int) -> int:
        leaning = random.random()
        pools = [self._is_short] if leaning < 0.6 else []
        if step > 40 or leaning < 0.35:
            pools = [self._is_end, self._is_closer] if step > 60 else [self._is_closer]
        for pool in pools:
            if len(chosen := ids[pool[ids]]):
                ids = chosen
                break
        return int(ids[random.integers(len(ids))])


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
