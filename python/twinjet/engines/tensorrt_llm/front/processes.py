"""Blocking calls of the engine off the loop, tasks that end when told to, and the engine's processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from twinjet._core import ask_for_sessions

T = TypeVar("T")

_CANCEL_AGAIN_S = 0.02
_WORKER_WORDS = (b"mpi4py", b"tensorrt_llm")


def in_daemon_thread(call: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run a blocking call in a thread that does not keep the process alive; give its future result.

    The loop's own pool would wait for a hung engine at exit.
    """
    future, body = _carried_over(call)
    threading.Thread(target=body, name=name, daemon=True).start()
    return future


class DaemonWorker:
    """One thread for blocking calls that come again and again; starting one each time holds the loop up.

    Calls wait for those before them. The thread does not keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Give the call's future result."""
        future, body = _carried_over(call)
        self._calls.put(body)
        return future

    def end(self) -> None:
        """Let the thread end after the calls that were made."""
        self._calls.put(None)

    def _run(self) -> None:
        while (body := self._calls.get()) is not None:
            body()


def _carried_over(call: Callable[[], T]) -> tuple[asyncio.Future[T], Callable[[], None]]:
    """Give a future of this loop, and what a thread must run for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def body() -> None:
        try:
            value = call()
        except BaseException as error:  # noqa: BLE001 - carried over to whoever awaits the future
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, future.set_exception, error)
        else:
            # The loop may be closed by now, when nobody waits any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, future.set_result, value)

    return future, body


async def end_tasks(tasks: Iterable[asyncio.Future[Any] | None]) -> None:
    """Cancel tasks until they end.

    Once is not enough: Python 3.11's wait_for, which engines use, loses a cancellation that meets a result.
    """
    pending = {task for task in tasks if task is not None and not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)


@contextlib.contextmanager
def in_sessions_of_their_own() -> Iterator[None]:
    """Have processes that are forked meanwhile, by MPI in the first place, begin sessions.

    A terminal's Ctrl-C, and a signal to the server's process group, would reach MPI's daemon, which ends all workers;
    they are the server's to act on, which lets running requests finish.
    """
    ask_for_sessions(True)
    try:
        yield
    finally:
        ask_for_sessions(False)


def worker_processes() -> frozenset[int]:
    """Find this process's descendants that are TensorRT-LLM workers, by their command lines."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold spaces; the fields after it do not.
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = set()
    for pid in parents:
        ancestor = parents.get(pid)
        while ancestor is not None and ancestor != os.getpid():
            ancestor = parents.get(ancestor)
        if ancestor == os.getpid() and _is_worker(pid):
            found.add(pid)
    return frozenset(found)


def kill_processes(pids: frozenset[int]) -> int:
    """Kill what still runs of them; return how many did."""
    killed = 0
    # A number may have been given to another process since, so each is looked at again.
    for pid in pids & worker_processes() if pids else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def _is_worker(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(word in command for word in _WORKER_WORDS)
