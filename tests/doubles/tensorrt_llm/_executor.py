"""The executor's private face, as far as callers meet it: errors of workers, and what they do to who meets them."""

from __future__ import annotations

import ctypes
import os
import queue
import sys
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
        self._daemon = _Daemon(self) if os.environ.get("TENSORRT_LLM_DOUBLE_DAEMON") else None

    def is_shutdown(self) -> bool:
        return self.doing_shutdown

    def shutdown(self) -> None:
        """End the workers and wait for them, in the caller's thread."""
        self.doing_shutdown = True
        self.joined_in.append(threading.get_ident())
        self._llm._stop_working()
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            daemon.end()
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


class _Daemon:
    """Open MPI's, as a singleton process forks it: it, and all workers with it, ends at SIGINT and SIGTERM.

    It also ends with the process whose it is.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        reader, self._writer = os.pipe()
        words = [sys.executable, "-c", "import sys; sys.stdin.read()", "mpi4py.futures.server"]
        command = (ctypes.c_char_p * (len(words) + 1))(*map(os.fsencode, words))
        # As C code forks: without what Python and its packages do in a child, some of which waits for threads.
        libc = ctypes.PyDLL(None)
        self._pid = libc.fork()
        if self._pid == 0:
            libc.dup2(reader, 0)
            libc.execv(command[0], command)
            libc._exit(127)
        os.close(reader)
        self._watch = threading.Thread(target=self._wait, daemon=True)
        self._watch.start()

    def end(self) -> None:
        os.close(self._writer)
        self._watch.join()

    def _wait(self) -> None:
        os.waitpid(self._pid, 0)
        if not self._executor.doing_shutdown:
            loop = self._executor._llm._task.get_loop()
            loop.call_soon_threadsafe(self._executor.worker_failed, RuntimeError("the daemon has ended"))
