"""Engine processes: how they are created, what they report, and that none outlives us.

An engine process is forked from a forkserver, a process that has imported vLLM and done nothing else. If
the front end dies, even by SIGKILL, the forkserver reads EOF on its alive pipe and exits, and the kernel
then kills the engine process (PR_SET_PDEATHSIG). A spawned engine process watches its parent's pipe instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1

# Read when a library is loaded, so they hold their forkserver's values; all others follow the front end.
_LOADER_VARIABLES = ("LD_PRELOAD", "OMP_NUM_THREADS", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def _die_with_parent() -> None:
    """Let this process die when its parent does."""
    if forkserver._forkserver._forkserver_alive_fd is not None:  # type: ignore[attr-defined]
        # Our copy of the alive pipe would keep the forkserver running for as long as we run.
        os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
        forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            return
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


@contextlib.contextmanager
def _anonymous_main() -> Iterator[None]:
    """Keep multiprocessing from running our main module again in the child, which needs nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class _EngineProcess(BaseProcess):
    """Mixed into a context's Process: carries our environment and the pipe for phases of the start.

    A target that has a keyword argument `report` left None finds there what sends a phase.
    """

    phases: Connection | None
    additional: dict[str, str]
    environment: dict[str, str]

    def start(self) -> None:
        self.environment = dict(os.environ) | self.additional
        with _anonymous_main():
            super().start()
        # Two threads ask for the exit code after a death, and only one can read it from the pipe.
        self.exit_lock = threading.Lock()
        if self.phases is not None:
            self.phases.close()

    @property
    def exitcode(self) -> int | None:
        lock = getattr(self, "exit_lock", None)
        if lock is None:
            return super().exitcode
        with lock:
            return super().exitcode

    def run(self) -> None:
        kept = {name: os.environ[name] for name in _LOADER_VARIABLES if name in os.environ}
        os.environ.clear()
        os.environ.update(self.environment | kept)
        # A terminal's Ctrl-C is the server's to act on, which lets running requests finish.
        os.setsid()
        _die_with_parent()
        phases = self.phases
        kwargs: dict[str, Any] = self._kwargs  # type: ignore[attr-defined]
        if phases is not None and kwargs.get("report", phases) is None:
            kwargs["report"] = phases.send
        super().run()


class _ForkedEngine(_EngineProcess, multiprocessing.context.ForkServerProcess):
    pass


class _SpawnedEngine(_EngineProcess, multiprocessing.context.SpawnProcess):
    pass


class EngineContext:
    """A multiprocessing context whose processes report phases and die with us.

    forked: from the forkserver; otherwise spawned. phases: the writing end of a pipe for phase names; it
    is closed once the first process has started. environment: what its processes have beside ours. processes: those
    created so far.
    """

    def __init__(
        self, *, forked: bool, phases: Connection | None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._base = multiprocessing.get_context("forkserver" if forked else "spawn")
        self._class: type[_EngineProcess] = _ForkedEngine if forked else _SpawnedEngine
        self._phases = phases
        self._environment = dict(environment or {})
        self.processes: list[BaseProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:
        process = self._class(*args, **kwargs)
        process.phases, self._phases = self._phases, None
        process.additional = self._environment
        self.processes.append(process)
        return process

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def end_processes(context: EngineContext, *, grace_s: float = 0.0) -> None:
    """End the processes of a context; those that don't within grace_s are killed. Blocks."""
    started = [process for process in context.processes if process.pid is not None]
    if grace_s > 0:
        for process in started:
            process.terminate()
        deadline = time.monotonic() + grace_s
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


def probe(answer: Connection) -> None:
    """In a child of the forkserver: say what is wrong with forking from it, "" if nothing is."""
    _die_with_parent()
    answer.send(_problem(f"/proc/{os.getppid()}/task"))
    answer.close()


# Threads that libraries keep for themselves, idle and safe to fork beside: the CUDA driver's, which NVML starts
# (`_is_driver_usable` tries whether more than that happened), and the one of pyarrow's allocator, which stops
# it for a fork.
_HELPER_THREADS = ("cuda", "jemalloc_bg_thd")


def _problem(tasks: str) -> str:
    """tasks: the folder of the parent's threads."""
    if "vllm" not in sys.modules:
        return "it could not import vllm"
    names = []
    with contextlib.suppress(FileNotFoundError):
        names = [Path(tasks, task, "comm").read_text().strip() for task in os.listdir(tasks)]
    others = [name for name in names if not name.startswith(_HELPER_THREADS)]
    if len(others) > 1:
        return f"it has {len(others)} threads: {', '.join(sorted(others))}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "it has a CUDA context"
    return "" if _is_driver_usable() else "the CUDA driver cannot be used in its children"


def _is_driver_usable() -> bool:
    """Say whether CUDA can be initialised in this process; also where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    not_initialized, no_device = 3, 100
    code: int = driver.cuInit(0)
    count = ctypes.c_int()
    return code == no_device or (
        code == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) != not_initialized
    )
