"""A model's tokens as the grammar compiler wants them, written to a file that every process reads once.

Special tokens are left out of the text: a grammar could otherwise be met by the letters of `<|im_start|>`, which the
server then drops from the text. Imports xgrammar only when it is used.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


class GrammarUnavailable(Exception):
    """xgrammar cannot be used here; the text says why."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """path: the file. key: names its content. end_token_ids: end an output once its grammar is complete.

    is_compact: JSON without any white space.
    """

    path: str
    key: str
    end_token_ids: tuple[int, ...] = ()
    is_compact: bool = False


def write_vocabulary(
    hf_tokenizer: Any,
    *,
    vocab_size: int,
    end_token_ids: tuple[int, ...],
    folder: Path,
    is_compact: bool = False,
) -> Vocabulary:
    """Write a Hugging Face tokenizer's vocabulary into a folder; takes about half a second.

    Raises GrammarUnavailable if xgrammar is missing, too old or does not know the tokenizer's kind.
    """
    try:
        xgrammar = importlib.import_module("xgrammar")
    except ImportError as error:
        raise GrammarUnavailable(f"xgrammar cannot be imported: {error}") from error
    if not hasattr(xgrammar.CompiledGrammar, "deserialize_json"):
        raise GrammarUnavailable("this xgrammar cannot serialise grammars")
    try:
        found = xgrammar.TokenizerInfo.from_huggingface(
            hf_tokenizer, vocab_size=vocab_size, stop_token_ids=list(end_token_ids)
        )
        tokens = list(found.decoded_vocab)
        for token_id in _special_ids(hf_tokenizer):
            if token_id < len(tokens):
                tokens[token_id] = b""
        info = xgrammar.TokenizerInfo(
            tokens,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=vocab_size,
            stop_token_ids=list(end_token_ids),
            add_prefix_space=False,
        )
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise GrammarUnavailable(f"xgrammar does not know this tokenizer: {error}") from error
    text = info.serialize_json()
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / f"vocabulary-{key}.json"
    path.write_text(text)
    return Vocabulary(str(path), key, end_token_ids, is_compact)


def _special_ids(hf_tokenizer: Any) -> set[int]:
    added = getattr(hf_tokenizer, "added_tokens_decoder", {})
    return set(hf_tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


@lru_cache(maxsize=8)
def tokenizer_info(path: str) -> Any:
    """Read a vocabulary's file as xgrammar's TokenizerInfo, once in each process."""
    xgrammar = importlib.import_module("xgrammar")
    return xgrammar.TokenizerInfo.deserialize_json(Path(path).read_text())
