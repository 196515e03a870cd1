"""Strings that an output must not contain, in the process that draws.

What the model's tokens say comes by a file that the server's process has made (twinjet.models.token_texts). What is
made of a request's strings is kept, since n outputs and repeated requests have the same.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from twinjet._core import BadText, TokenTexts


class BadTextSettings(NamedTuple):
    """What the process that draws needs to know. skips_special: special tokens are left out of the text."""

    path: str
    words: tuple[str, ...]
    skips_special: bool


@lru_cache(maxsize=256)
def bad_text(settings: BadTextSettings) -> BadText:
    """Make ready what a request's strings rule out, in the process that draws. Raises OSError, ValueError."""
    return BadText(_token_texts(settings.path), settings.words, skips_special=settings.skips_special)


@lru_cache(maxsize=8)
def _token_texts(path: str) -> TokenTexts:
    return TokenTexts.load(Path(path).read_bytes())
