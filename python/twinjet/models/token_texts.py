"""What a model's tokens say, in a file for the processes that draw (twinjet.sampling.bad_text)."""

from __future__ import annotations

import asyncio
import os
import tempfile
import weakref
from pathlib import Path

from twinjet._core import TokenTexts, Vocabulary
from twinjet.sampling.bad_text import BadTextSettings


class TokenTextsFile:
    """A model's token texts as a file that lives as long as this object, or until it is removed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._path = ""
        self._lock = asyncio.Lock()
        self._remove: weakref.finalize[[str], TokenTextsFile] | None = None

    async def settings(self, words: tuple[str, ...], *, skips_special: bool) -> BadTextSettings | None:
        """Give the settings for a request's strings; None if it has none. Makes the file for the first ones."""
        if not words:
            return None
        async with self._lock:
            if not self._path:
                self._path = await asyncio.to_thread(_write, self._vocabulary)
                self._remove = weakref.finalize(self, _remove, self._path)
        return BadTextSettings(self._path, words, skips_special)

    def remove(self) -> None:
        """Remove the file; idempotent."""
        if self._remove is not None:
            self._remove()


def _write(vocabulary: Vocabulary) -> str:
    handle, path = tempfile.mkstemp(prefix="twinjet-token-texts-")
    with os.fdopen(handle, "wb") as file:
        file.write(TokenTexts(vocabulary).save())
    return path


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)
