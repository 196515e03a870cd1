"""Guided decoding inside our sampler: grammars compiled by the server's grammar room, matched in the workers.

The engine applies its own grammar mask after the logits processor, where it could forbid the token that was
drawn. So the mask goes into the draw instead. A compiled grammar travels with the request; the vocabulary,
which is megabytes, travels once as a file that workers read.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from twinjet.engines.tensorrt_llm.worker.grammar import GrammarHandle
from twinjet.errors import InvalidRequest
from twinjet.grammar.compilation import compile_text, written
from twinjet.grammar.vocabulary import GrammarUnavailable
from twinjet.request import Constraint

_FILE = "tokenizer_info.json"


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
            kind, text = written(constraint.kind, constraint.value, constraint.choices)
            compiled = compile_text(self._compiler, kind, text, is_compact=False)
        except (RuntimeError, ValueError, TypeError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else "not a valid grammar"
            raise InvalidRequest.of(f"sampling.constraint.{constraint.kind}", first_line) from error
        return GrammarHandle(str(self._path), compiled.serialize_json())
