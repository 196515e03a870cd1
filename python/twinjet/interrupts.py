"""What Ctrl-C does to a program while it reads a stream."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    from twinjet.client import Stream


@contextmanager
def interrupts_cancel(stream: Stream) -> Iterator[None]:
    """While it is read, Ctrl-C cancels the stream; then, or with the next Ctrl-C, KeyboardInterrupt is raised here.

    Raised wherever Python happened to be, it could leave a lock of gRPC's library locked: the channel's thread would
    wait for it, and the next answer never come.
    """
    from twinjet.client import Cancelled

    # SimpleQueue may be used in a signal handler whatever is interrupted.
    stops: SimpleQueue[bool] = SimpleQueue()
    is_stopped = False

    def cancel() -> None:
        if stops.get():
            stream.cancel()

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        if is_stopped:
            signal.default_int_handler(number, frame)
        is_stopped = True
        stops.put(True)

    canceller = threading.Thread(target=cancel, daemon=True)
    canceller.start()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Cancelled:
        if not is_stopped:
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
        stops.put(False)
        canceller.join()
