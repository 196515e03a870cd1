"""A compiled grammar in the process that matches it: reads the file that a worker wrote."""

from __future__ import annotations

import importlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from twinjet.grammar.compilation import compile_text
from twinjet.grammar.vocabulary import tokenizer_info


@lru_cache(maxsize=64)
def load_grammar(path: str, vocabulary_path: str) -> Any:
    """Give xgrammar's CompiledGrammar; the same object for the same file. Thread-safe.

    A grammar that compiles sooner than its compiled form is read comes as text, and is compiled here; a worker has
    done the same before, within its limits. Raises OSError if the file is gone.
    """
    xgrammar = importlib.import_module("xgrammar")
    info = tokenizer_info(vocabulary_path)
    # The compiled form stands as it is in the file: parsing it here would hold up the process's other threads.
    source, _, compiled = Path(path).read_text().partition("\n")
    if compiled:
        return xgrammar.CompiledGrammar.deserialize_json(compiled, info)
    content = json.loads(source)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    return compile_text(compiler, content["kind"], content["text"], is_compact=content["is_compact"])


def grammar_text(path: str) -> tuple[str, str]:
    """Give what a grammar was compiled from: ("schema" | "regex" | "ebnf", text)."""
    with open(path) as file:
        content = json.loads(file.readline())
    return content["kind"], content["text"]


def end_tokens(
    vocabulary_path: str, end_token_ids: tuple[int, ...], stop_token_ids: tuple[int, ...]
) -> list[int]:
    """Which tokens may follow a complete grammar: the model's own ends, and stop tokens that are no text.

    A stop token that is text stays text: the grammar may produce it, and the engine then ends the output.
    """
    special = set(tokenizer_info(vocabulary_path).special_token_ids)
    return sorted(set(end_token_ids) | {t for t in stop_token_ids if t in special})
