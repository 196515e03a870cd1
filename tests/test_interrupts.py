"""Ctrl-C while a stream is read: nothing is raised within the reading, and whoever reads goes on when it has ended."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import AbstractContextManager
from typing import Any

import pytest

from twinjet.client import Cancelled
from twinjet.interrupts import interrupts_cancel


class _Stream:
    """Read until it is cancelled; one that is stuck is not ended by that."""

    def __init__(self, *, is_stuck: bool = False) -> None:
        self.is_stuck = is_stuck
        self.cancelled = threading.Event()
        self.ended = threading.Event()
        self.cancelled_on: threading.Thread | None = None

    def cancel(self) -> None:
        self.cancelled_on = threading.current_thread()
        self.cancelled.set()
        if not self.is_stuck:
            self.ended.set()

    def read(self) -> None:
        assert self.ended.wait(10)
        raise Cancelled("cancelled", code="CANCELLED")


def _reading(stream: Any) -> AbstractContextManager[None]:
    return interrupts_cancel(stream)


def _press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_stream_is_cancelled_and_reading_it_ends_by_itself() -> None:
    stream, seen = _Stream(), []
    before = signal.getsignal(signal.SIGINT)

    def read() -> None:
        _press()
        try:
            stream.read()
        except BaseException as error:
            seen.append(type(error))
            raise

    with pytest.raises(KeyboardInterrupt), _reading(stream):
        read()
    assert seen == [Cancelled]
    assert stream.cancelled_on not in (None, threading.main_thread())
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_one_ends_what_is_stuck() -> None:
    stream = _Stream(is_stuck=True)

    def read() -> None:
        _press()
        assert stream.cancelled.wait(10)
        _press()
        stream.read()

    with pytest.raises(KeyboardInterrupt), _reading(stream):
        read()
    assert not stream.ended.is_set()


def test_a_stream_that_others_cancel_is_no_interrupt() -> None:
    stream = _Stream()
    stream.cancel()
    with pytest.raises(Cancelled), _reading(stream):
        stream.read()


def test_what_ended_before_is_whole() -> None:
    stream = _Stream()
    with _reading(stream):
        _press()
    assert stream.cancelled.wait(10)
