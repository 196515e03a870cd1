"""Finds stop strings in text that arrives in pieces, and holds back what may still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Feed it the text of one output; it gives back what may be shown.

    A tail that could be the beginning of a stop string is held back until it is clear that it is not, so no
    text is ever taken back. stops: may be empty. include: keep the matched string in the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, may_match: bool = True) -> str:
        """Take new text; return what is safe to show. After a match returns "" and sets matched.

        may_match: False for text in which no stop string may end.
        """
        if self.matched is not None:
            return ""
        num_held = len(self._held)
        text = self._held + text
        found = [
            (at, stop)
            for stop in self._stops
            if may_match and (at := text.find(stop, max(0, num_held - len(stop) + 1))) >= 0
        ]
        if found:
            # The match that is complete first; of two complete at once, the one that begins first.
            at, self.matched = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[: at + len(self.matched)] if self._include else text[:at]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what is held back; the output has ended otherwise."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest proper prefix of stop that text ends with."""
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
