"""The grammar workers' parent: a small process that forks a child for each job, with limits, and reaps it.

Started as `python -m twinjet.grammar.worker FD` by workers.py. Over the control socket FD come jobs: each a message with
one socket attached. A child reads its job from that socket, answers on it and ends. The parent keeps the socket too:
when the server closes its end the child is killed, and when a child dies without an answer the parent says how.
A child that has not ended soon gets only processor time that nobody else wants: one that shared a processor with an
engine, at whatever niceness, would hold up each of the engine's steps.
It forks because a process that has imported xgrammar starts in milliseconds that way; it never runs threads itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from typing import Any

_HEADER = struct.Struct("!I")
MAX_JOB_BYTES = 16 << 20
_NICENESS = 5
"""Of the parent, whose forks take milliseconds."""
_LOOK_MS = 25


def send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_HEADER.pack(len(data)) + data)


def _receive(connection: socket.socket) -> bytes:
    def exactly(size: int) -> bytes:
        parts = []
        while size:
            part = connection.recv(min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    (size,) = _HEADER.unpack(exactly(_HEADER.size))
    if size > MAX_JOB_BYTES:
        raise EOFError
    return exactly(size)


def _limit(limits: dict[str, Any]) -> None:
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    memory = in_use + int(limits["memory_bytes"])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    cpu_s = max(1, round(limits["cpu_s"]))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, 256 << 20))
    # The default action of both signals ends the process, also in the middle of native code.
    signal.setitimer(signal.ITIMER_REAL, limits["wall_s"])


def _child(connection: socket.socket) -> None:
    from twinjet.grammar.compilation import ConstraintRefused, is_out_of_memory, perform
    from twinjet.grammar.job import Job

    sys.setrecursionlimit(20_000)
    try:
        request = json.loads(_receive(connection))
    except (EOFError, OSError):
        return
    _limit(request["limits"])
    try:
        answer: dict[str, Any] = {"done": perform(Job.of(request["job"]))}
    except ConstraintRefused as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"died": "memory"}
    except Exception as error:  # noqa: BLE001 - told to the server, which logs it
        answer = {"died": "memory"} if is_out_of_memory(error) else {"failed": traceback.format_exc()}
    answer["cpu_s"] = time.process_time()
    with contextlib.suppress(OSError):
        send(connection, json.dumps(answer).encode())


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return "wall"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "time"
    # What native code does when it gets no memory: abort, or use what it did not get.
    return "memory" if code < 0 else "nothing"


class Parent:
    """Forks, watches and reaps."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, socket.socket] = {}
        self._fresh: dict[int, float] = {}
        """Children that still have a niceness, and the processor time after which they have none."""
        self._by_fd: dict[int, int] = {}
        self._wakeup, write = socket.socketpair()
        self._wakeup.setblocking(False)
        write.setblocking(False)
        self._write = write
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._poll = select.poll()
        self._poll.register(control.fileno(), select.POLLIN)
        self._poll.register(self._wakeup.fileno(), select.POLLIN)

    def run(self) -> None:
        """Serve until the server closes the control socket; leaves no child behind."""
        is_open = True
        while is_open:
            for fd, event in self._poll.poll(_LOOK_MS if self._fresh else None):
                if fd == self._control.fileno():
                    is_open = self._take()
                elif fd == self._wakeup.fileno():
                    with contextlib.suppress(BlockingIOError):
                        self._wakeup.recv(4096)
                elif event & (select.POLLHUP | select.POLLRDHUP | select.POLLERR):
                    self._kill(fd)
            self._reap()
            self._put_behind()
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        for pid in list(self._children):
            os.waitpid(pid, 0)

    def _take(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, 4096, 1)
        if not data:
            return False
        if data.startswith(b"load ") and not fds:
            _load(data[5:].decode())
            return True
        connection = socket.socket(fileno=fds[0])
        niceness, soon_ms = map(int, data.split()[1:])
        pid = os.fork()
        if pid == 0:
            self._become_child(connection, niceness)
        self._fresh[pid] = soon_ms / 1e3
        self._children[pid] = connection
        self._by_fd[connection.fileno()] = pid
        self._poll.register(connection.fileno(), select.POLLRDHUP)
        return True

    def _become_child(self, connection: socket.socket, niceness: int) -> None:
        code = 1
        try:
            os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            for other in self._children.values():
                other.close()
            connection.setblocking(True)
            _child(connection)
            code = 0
        finally:
            os._exit(code)

    def _put_behind(self) -> None:
        """Put children that have used their first processor time behind everything else on the machine."""
        for pid, soon_s in list(self._fresh.items()):
            if _cpu_s(pid) >= soon_s:
                del self._fresh[pid]
                with contextlib.suppress(OSError):
                    os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))

    def _kill(self, fd: int) -> None:
        self._poll.unregister(fd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._by_fd[fd], signal.SIGKILL)

    def _reap(self) -> None:
        for pid in list(self._children):
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if not done:
                continue
            self._fresh.pop(pid, None)
            connection = self._children.pop(pid)
            fd = connection.fileno()
            del self._by_fd[fd]
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
            if os.waitstatus_to_exitcode(status) != 0:
                with contextlib.suppress(OSError):
                    cpu_s = usage.ru_utime + usage.ru_stime
                    send(connection, json.dumps({"died": _how(status), "cpu_s": cpu_s}).encode())
            connection.close()


def _cpu_s(pid: int) -> float:
    """Processor time of a child that is not reaped yet."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _load(path: str) -> None:
    """Read a vocabulary, so that children have it; what fails here fails again in a child, which says so."""
    from twinjet.grammar.vocabulary import token_lengths

    try:
        token_lengths(path)
    except Exception:  # noqa: BLE001
        traceback.print_exc()


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    # Children have them then, and need none of their own memory for them.
    import numpy.random  # noqa: F401

    import twinjet.grammar.compilation  # noqa: F401

    os.nice(_NICENESS)
    gc.freeze()
    Parent(control).run()


if __name__ == "__main__":
    main()
