"""What a waiting person sees: a phase line with a bar on a terminal, plain lines in a log, never silence.

Standard library alone, since deploy/bootstrap.py uses it before anything is installed.
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

HEARTBEAT_S = 2.0
"""A log gets a line at least this often while something is going on; a terminal is redrawn more often."""

_REDRAW_S = 0.25
_BAR_CELLS = 24


def _blocks_fit(stream: TextIO) -> bool:
    try:
        "█░·".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def format_elapsed(seconds: float) -> str:
    """Give a duration for people: "7 s", "3 min 05 s"."""
    whole = int(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class Progress:
    """Shows one thing in progress on a stream. Thread-safe.

    A line is written at once when the phase changes and then at least every heartbeat_s seconds with the time
    passed, until close(). Once the stream is gone, showing ends in silence.
    """

    def __init__(self, stream: TextIO | None = None, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._full, self._empty, self._dot = "█░·" if _blocks_fit(self._stream) else "#--"
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._heartbeat_s = heartbeat_s
        self._interval_s = _REDRAW_S if self._is_terminal else heartbeat_s
        self._started = self._shown_at = time.monotonic()
        self._phase = self._detail = ""
        self._done: float | None = None
        self._shown = ""
        self._closed = False
        self._thread: threading.Thread | None = None

    def update(self, phase: str, done: float | None = None, detail: str = "") -> None:
        """Say what is being done. done: the share of the whole, 0 to 1, None if it cannot be told.

        detail: what changes often, such as a file's name.
        """
        with self._lock:
            if self._closed:
                return
            is_new = phase != self._phase
            self._phase, self._detail = phase, detail
            self._done = None if done is None else min(1.0, max(0.0, done))
            if is_new or (self._is_terminal and time.monotonic() - self._shown_at >= _REDRAW_S):
                self._show()
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
                self._thread.start()

    def pause(self) -> None:
        """Take the bar away until the next update; nothing is in progress."""
        with self._lock:
            self._write(self._wipe())
            self._phase = ""

    def say(self, line: str) -> None:
        """Write a line that stays, above the bar."""
        with self._lock:
            self._write(self._wipe() + line + "\n")
            if self._is_terminal and not self._closed and self._phase:
                self._show()

    def close(self) -> None:
        """Take the bar away and stop. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._write(self._wipe())
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def elapsed_s(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self._started

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._wake.wait(self._interval_s):
            with self._lock:
                if self._closed:
                    return
                if self._phase and time.monotonic() - self._shown_at >= self._interval_s * 0.9:
                    self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        share = "" if self._done is None else f"{self._done:4.0%} "
        elapsed = format_elapsed(self.elapsed_s)
        if not self._is_terminal:
            detail = f" ({self._detail})" if self._detail else ""
            self._write(f"{share}{self._phase}{detail}, {elapsed}\n")
            return
        bar = ""
        if self._done is not None:
            full = round(self._done * _BAR_CELLS)
            bar = f"{self._full * full}{self._empty * (_BAR_CELLS - full)} "
        parts = [part for part in (self._phase, self._detail, elapsed) if part]
        line = f"{bar}{share}" + f" {self._dot} ".join(parts)
        width = shutil.get_terminal_size().columns - 1
        self._write(self._wipe() + line[:width])
        self._shown = line[:width]

    def _wipe(self) -> str:
        if not self._shown:
            return ""
        self._shown = ""
        return "\r\x1b[K"

    def _write(self, text: str) -> None:
        if not text:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._closed = True


class ProgressHandler(logging.Handler):
    """Writes log records above the bar."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(self.format(record))
