"""A grammar in the worker: what travels there, and the matcher that follows an output through it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twinjet.grammar.effort import Effort
from twinjet.grammar.handle import end_tokens, load_grammar


@dataclass(frozen=True, slots=True)
class GrammarHandle:
    """A compiled grammar on its way to a worker: by its file where the server's grammar room made it.

    end_token_ids: what may follow a complete grammar, besides special tokens among stop_token_ids.
    """

    tokenizer_path: str
    compiled: str = ""
    path: str = ""
    end_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def matcher(self) -> Matcher:
        """Begin a match; in the worker."""
        xgrammar = importlib.import_module("xgrammar")
        if self.path:
            compiled = load_grammar(self.path, self.tokenizer_path)
            ends = end_tokens(self.tokenizer_path, self.end_token_ids, self.stop_token_ids)
            return Matcher(xgrammar, compiled, compiled.tokenizer_info.vocab_size, ends)
        info = _tokenizer_info(self.tokenizer_path)
        return Matcher(
            xgrammar, xgrammar.CompiledGrammar.deserialize_json(self.compiled, info), info.vocab_size
        )


class Matcher:
    """Follows one output through a grammar."""

    def __init__(
        self, xgrammar: Any, compiled: Any, vocab_size: int, end_token_ids: list[int] | None = None
    ) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=end_token_ids)
        self._effort = Effort()
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def bitmask(self) -> npt.NDArray[np.int32] | None:
        """Give the tokens allowed next, int32 [1, ceil(vocab_size / 32)]; None once the grammar has ended.

        None of them where matching takes too long; see grammar.effort.
        """
        if self._matcher.is_terminated():
            return None
        if self._effort.is_spent():
            self._bitmask.fill_(0)
        else:
            self._effort.allow_mask()
            with self._effort.counted():
                self._matcher.fill_next_token_bitmask(self._bitmask)
        rows: npt.NDArray[np.int32] = self._bitmask.numpy()
        return rows

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False if the grammar does not allow it."""
        with self._effort.counted():
            return bool(self._matcher.is_terminated() or self._matcher.accept_token(token_id))


@lru_cache(maxsize=4)
def _tokenizer_info(path: str) -> Any:
    xgrammar = importlib.import_module("xgrammar")
    return xgrammar.TokenizerInfo.deserialize_json(Path(path).read_text())
