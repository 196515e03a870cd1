"""What a waiting person sees: on a terminal, in a log, and that it is never nothing."""

import contextlib
import io
import logging
import os
import pty
import re
import threading
import time
from collections.abc import Callable

import pytest

from twinjet.progress import Progress, ProgressHandler, format_elapsed


class Log(io.StringIO):
    """A stream that is no terminal and knows when each line came."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.arrived = threading.Condition()

    def write(self, text: str) -> int:
        with self.arrived:
            self.times.append(time.monotonic())
            count = super().write(text)
            self.arrived.notify_all()
            return count

    def wait_for(self, condition: Callable[[str], bool]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: condition(self.getvalue()), timeout=10)


NEVER_S = 3600.0


def timeless(text: str) -> str:
    """The text with every elapsed time replaced, for machines that are busy."""
    return re.sub(r"\d+ s\b", "N s", text)


def test_a_log_gets_a_line_for_each_phase_at_once() -> None:
    log = Log()
    with Progress(log, heartbeat_s=NEVER_S) as progress:
        progress.update("unpacking", 0.0)
        progress.update("unpacking", 0.5)
        progress.update("loading", 0.5, "weights")
        progress.update("guessing")
    assert timeless(log.getvalue()) == "  0% unpacking, N s\n 50% loading (weights), N s\nguessing, N s\n"


def test_a_log_is_not_silent_while_nothing_changes() -> None:
    log = Log()
    with Progress(log, heartbeat_s=0.05) as progress:
        progress.update("loading", 0.1)
        progress.update("loading", 0.4)
        log.wait_for(lambda text: text.count("\n") >= 4)
    lines = log.getvalue().splitlines()
    assert lines[0].startswith(" 10% loading")
    assert all(line.startswith(" 40% loading") for line in lines[1:])


def test_a_pause_is_silent_and_close_ends_the_thread() -> None:
    log = Log()
    progress = Progress(log, heartbeat_s=0.02)
    progress.update("loading", 0.1)
    log.wait_for(lambda text: text.count("\n") >= 2)
    progress.pause()
    seen = log.getvalue()
    progress.close()
    progress.close()
    progress.update("late", 0.5)
    assert log.getvalue() == seen
    assert not [t for t in threading.enumerate() if t.name == "progress"]


@pytest.mark.parametrize(("done", "share"), [(-1.0, "  0%"), (7.0, "100%")])
def test_a_share_out_of_range_is_clamped(done: float, share: str) -> None:
    log = Log()
    with Progress(log) as progress:
        progress.update("x", done)
    assert log.getvalue().startswith(share)


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_stream_that_is_gone_ends_the_showing_and_nothing_else() -> None:
    with Progress(Gone()) as progress:
        progress.update("x", 0.1)
        progress.update("y", 0.2)
        progress.say("z")


def _drain(controller: int) -> str:
    """Give all that a terminal got, once its other end is closed: one read may give only a part."""
    data = b""
    with contextlib.suppress(OSError):  # EIO is a pseudo terminal's end of file
        while piece := os.read(controller, 65536):
            data += piece
    os.close(controller)
    return data.decode()


def test_a_terminal_shows_a_bar_that_is_wiped_for_lines_that_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("twinjet.progress._REDRAW_S", NEVER_S)
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w", encoding="utf-8") as stream, Progress(stream) as progress:
        progress.update("loading", 0.5, "model.safetensors")
        handler = ProgressHandler(progress)
        handler.emit(logging.LogRecord("n", logging.INFO, "", 0, "a %s", ("line",), None))
    shown = _drain(controller)
    bar = "█" * 12 + "░" * 12 + "  50% loading · model.safetensors · N s"
    assert timeless(shown).split("\r\x1b[K") == [bar, f"a line\r\n{bar}", ""]


def test_a_terminal_without_unicode_gets_a_plain_bar() -> None:
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w", encoding="ascii") as stream, Progress(stream) as progress:
        progress.update("loading", 0.25)
    shown = _drain(controller)
    assert timeless(shown).startswith("#" * 6 + "-" * 18 + "  25% loading - N s")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (60, "1 min 00 s"), (3725, "62 min 05 s")]
)
def test_elapsed_time_is_for_people(seconds: float, text: str) -> None:
    assert format_elapsed(seconds) == text
