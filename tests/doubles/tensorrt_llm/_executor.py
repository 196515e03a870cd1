"""The executor's private face, as far as callers meet it: errors of workers, and what they do to who meets them."""

from __future__ import annotations

import queue
import threading
from typing import Any

from tensorrt_llm import _contract

_IS_13 = _contract.VERSION >= "1.3"
DEAD_JOIN_S = 0.2
LONGEST_JOIN_S = 10.0
"""So that a test that failed ends; the real one has no limit."""


class Executor:
    """is_shutdown() says nothing of a crash that nobody has met yet.

    workers_gone: cleared while workers that hang would have to be joined.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._error_queue: queue.Queue[Any] = queue.Queue()
        self.workers_gone = threading.Event()
        self.workers_gone.set()
        self.joined_in: list[int] = []
        self.doing_shutdown = False
        if _contract.has("iterators_block"):
            self.rpc_client = object()
        if _contract.has("engine_dead_error"):
            self._engine_dead = False
        if _IS_13:
            self._fatal_error: BaseException | None = None

    def is_shutdown(self) -> bool:
        return self.doing_shutdown

    def shutdown(self) -> None:
        """End the workers and wait for them, in the caller's thread."""
        self.doing_shutdown = True
        self.joined_in.append(threading.get_ident())
        self._llm._stop_working()
        if getattr(self, "_engine_dead", False):
            self.workers_gone.wait(DEAD_JOIN_S)
        else:
            self.workers_gone.wait(LONGEST_JOIN_S)

    def _handle_background_error(self, error: Any = None) -> None:
        """Raise the first error of a worker that is waiting, after a shutdown."""
        if not self._error_queue.empty():
            found = self._error_queue.get()
            if _contract.has("background_error_joins"):
                self.shutdown()
            raise found

    def worker_failed(self, error: BaseException) -> None:
        """What happens when a worker's process has ended."""
        if _contract.has("engine_dead_error"):
            from tensorrt_llm.executor.utils import EngineDeadError

            self._engine_dead = True
            self._fatal_error = error
            for request in list(self._llm._active):
                request.result._queue.put_nowait(EngineDeadError(error))
            return
        if _IS_13:
            self._fatal_error = error
        self._error_queue.put(error)

    def check_submission(self) -> None:
        """Refuse what comes after a death."""
        if getattr(self, "_engine_dead", False):
            from tensorrt_llm.executor.utils import EngineDeadError

            raise EngineDeadError(self._fatal_error)
