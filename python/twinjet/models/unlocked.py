"""Rust tokenizers on long texts, without the interpreter's lock.

Tokenizer.encode and decode hold it to their end, in a thread too: a second and more for megabytes, in which nobody else's
stream goes on. Their batches of one do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer

_LONG: Final = 4096
"""Characters or ids. Handing a shorter text to the library's threads takes longer than it holds up."""


def encode(tokenizer: RustTokenizer, text: str, *, add_special_tokens: bool) -> Encoding:
    """Give what tokenizer.encode() gives; it must neither pad nor truncate."""
    if len(text) < _LONG:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    return encoding


def decode(tokenizer: RustTokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """Give what tokenizer.decode() gives."""
    ids = list(token_ids)
    if len(ids) < _LONG:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
    (text,) = tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)
    return str(text)
