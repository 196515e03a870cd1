"""What a model's tokens say, in a file for the processes that draw (twinjet.sampling.bad_text)."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from twinjet._core import TokenTexts, Vocabulary
from twinjet.private_folder import PrivateFolder
from twinjet.sampling.bad_text import BadTextSettings


class TokenTextsFile:
    """A model's token texts as a file, which a thread begins to make at once and which lives until it is removed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._path: Future[str] = Future()
        self._folder: PrivateFolder | None = None
        self._thread = threading.Thread(target=self._make, args=(vocabulary,), name="token texts")
        self._thread.start()

    def settings(self, words: tuple[str, ...], *, skips_special: bool) -> BadTextSettings:
        """Give the settings for a request's strings. Raises OSError if the file cannot be written."""
        return BadTextSettings(self._path.result(), words, skips_special)

    def remove(self) -> None:
        """Remove the file; idempotent."""
        self._thread.join()
        if self._folder is not None:
            self._folder.remove()

    def _make(self, vocabulary: Vocabulary) -> None:
        try:
            self._folder = PrivateFolder("token-texts")
            path = self._folder.path / "texts"
            path.write_bytes(TokenTexts(vocabulary).save())
            self._path.set_result(str(path))
        except OSError as error:
            self._path.set_exception(error)
