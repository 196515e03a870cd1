"""Guided decoding inside our sampler: grammars compiled by the server's grammar room, matched in the workers.

The engine applies its own grammar mask after the logits processor, where it could forbid the token that was
drawn. So the mask goes into the draw instead. A compiled grammar travels with the request; the vocabulary,
which is megabytes, travels once as a file that workers read.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twinjet.errors import InvalidRequest
from twinjet.grammar.handle import end_tokens, load_grammar
from twinjet.grammar.vocabulary import GrammarUnavailable
from twinjet.request import Constraint

_FILE = "tokenizer_info.json"


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
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def bitmask(self) -> npt.NDArray[np.int32] | None:
        """Give the tokens allowed next, int32 [1, ceil(vocab_size / 32)]; None once the grammar has ended."""
        if self._matcher.is_terminated():
            return None
        self._matcher.fill_next_token_bitmask(self._bitmask)
        rows: npt.NDArray[np.int32] = self._bitmask.numpy()
        return rows

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False if the grammar does not allow it."""
        return bool(self._matcher.is_terminated() or self._matcher.accept_token(token_id))


class GrammarCompiler:
    """Compiles what start-up tries, and constraints that come without a compiled grammar.

    Raises GrammarUnavailable if xgrammar is missing, too old or does not know the tokenizer's kind.
    """

    def __init__(
        self, hf_tokenizer: Any, *, vocab_size: int, stop_token_ids: tuple[int, ...], folder: Path
    ) -> None:
        try:
            self._xgrammar = importlib.import_module("xgrammar")
        except ImportError as error:
            raise GrammarUnavailable(f"xgrammar cannot be imported: {error}") from error
        if not hasattr(self._xgrammar.CompiledGrammar, "deserialize_json"):
            raise GrammarUnavailable("this xgrammar cannot serialise grammars")
        try:
            info = self._xgrammar.TokenizerInfo.from_huggingface(
                hf_tokenizer, vocab_size=vocab_size, stop_token_ids=list(stop_token_ids)
            )
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise GrammarUnavailable(f"xgrammar does not know this tokenizer: {error}") from error
        self._path = folder / _FILE
        self._path.write_text(info.serialize_json())
        self._compiler = self._xgrammar.GrammarCompiler(info, max_threads=1)

    def compile(self, constraint: Constraint) -> GrammarHandle:
        """Compile; thread-safe. Raises InvalidRequest if the grammar is wrong."""
        try:
            compiled = self._compile(constraint)
        except (RuntimeError, ValueError, TypeError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else "not a valid grammar"
            raise InvalidRequest.of(f"sampling.constraint.{constraint.kind}", first_line) from error
        return GrammarHandle(str(self._path), compiled.serialize_json())

    def _compile(self, constraint: Constraint) -> Any:
        match constraint.kind:
            case "json_schema":
                return self._compiler.compile_json_schema(constraint.value)
            case "json_object":
                return self._compiler.compile_json_schema('{"type": "object"}')
            case "regex":
                return self._compiler.compile_regex(constraint.value)
            case "ebnf":
                return self._compiler.compile_grammar(constraint.value)
            case "choice":
                return self._compiler.compile_grammar(choice_grammar(constraint.choices))


def choice_grammar(choices: tuple[str, ...]) -> str:
    """Write alternatives as a GBNF grammar; JSON's escapes are a subset of GBNF's."""
    return "root ::= " + " | ".join(json.dumps(choice) for choice in choices)


@lru_cache(maxsize=4)
def _tokenizer_info(path: str) -> Any:
    xgrammar = importlib.import_module("xgrammar")
    return xgrammar.TokenizerInfo.deserialize_json(Path(path).read_text())
