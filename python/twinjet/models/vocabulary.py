"""Reads a tokenizer's vocabulary for the native detokenizer (csrc/stream/vocabulary.h).

Byte-level BPE, SentencePiece with byte fallback, and metaspace are joined natively; a tokenizer that joins its
tokens in another way is asked itself, which costs microseconds a token instead of nanoseconds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer as RustTokenizer

from twinjet._core import Vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Joining:
    name: Literal["byte_level", "byte_fallback", "metaspace"]
    mark: str = ""
    strip_left: int = 0


def read_vocabulary(tokenizer: RustTokenizer) -> Vocabulary:
    """Give what each token says. Its text joins as tokenizer.decode() joins it."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    special = [token_id for token_id, token in added.items() if token.special]
    joining = _joining(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None)
    num_tokens = 1 + max((*vocab.values(), *added), default=-1)
    if joining is None:
        logger.info(
            "tokens are joined to text by the tokenizers library: its decoder has no native counterpart"
        )
        return function_vocabulary(
            lambda ids, skip_special: tokenizer.decode(ids, skip_special_tokens=skip_special),
            num_tokens,
            special,
        )
    tokens: list[str | None] = [None] * num_tokens
    for text, token_id in vocab.items():
        tokens[token_id] = text
    for token_id, token in added.items():
        tokens[token_id] = token.content
    return Vocabulary(joining.name, tokens, special=special, mark=joining.mark, strip_left=joining.strip_left)


def function_vocabulary(
    decode: Callable[[Sequence[int], bool], str], num_tokens: int, special: Sequence[int] = ()
) -> Vocabulary:
    """Give a vocabulary that asks decode(token ids, skip special tokens) for every text."""
    return Vocabulary.of_function(num_tokens, decode, special=list(special))


def _joining(decoder: dict[str, Any] | None) -> _Joining | None:
    """Say how a decoder, as tokenizer.json writes it, joins tokens; None if only it can do so."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    match steps:
        case [{"type": "ByteLevel"}]:
            return _Joining("byte_level")
        case [{"type": "Metaspace", "replacement": mark} as step] if step.get("prepend_scheme") != "never":
            return _Joining("metaspace", mark)
        case [
            {"type": "Replace", "pattern": {"String": mark}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]:
            return _Joining("byte_fallback", mark)
        case [
            {"type": "Replace", "pattern": {"String": mark}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": start, "stop": 0},
        ]:
            return _Joining("byte_fallback", mark, start)
    return None
