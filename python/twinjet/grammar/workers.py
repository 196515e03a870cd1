"""The grammar workers as the server sees them: one process that forks a child for each job. One asyncio loop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from twinjet.grammar.job import Job
from twinjet.grammar.limits import GrammarLimits
from twinjet.grammar.worker import MAX_JOB_BYTES

logger = logging.getLogger("twinjet.grammar")

_MAX_ANSWER_BYTES = 1 << 20


class Workers:
    """Runs jobs in children of a process of its own, which is started with the first job."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._loaded: set[str] = set()

    @property
    def pid(self) -> int | None:
        """The children's parent, if it was started."""
        return None if self._process is None else self._process.pid

    def warm(self, vocabulary_path: str) -> None:
        """Have a vocabulary read, once, for all later jobs; returns at once."""
        if vocabulary_path not in self._loaded:
            self._loaded.add(vocabulary_path)
            socket.send_fds(self._started(), [b"load " + vocabulary_path.encode()], [])

    async def run(self, job: Job, limits: GrammarLimits) -> dict[str, Any]:
        """Have a child do a job; it is killed if this is cancelled. Gives its answer (worker.py)."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                socket.send_fds(
                    self._started(),
                    [b"job %d %d" % (limits.niceness, round(limits.soon_s * 1e3))],
                    [theirs.fileno()],
                )
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        try:
            request = json.dumps({"limits": asdict(limits), "job": asdict(job)}).encode()
            if len(request) > MAX_JOB_BYTES:
                return {"refused": "is too large"}
            writer.write(len(request).to_bytes(4, "big") + request)
            size = int.from_bytes(await reader.readexactly(4), "big")
            answer: dict[str, Any] = json.loads(await reader.readexactly(min(size, _MAX_ANSWER_BYTES)))
            return answer
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            return {"failed": f"the grammar worker gave no answer: {error}"}
        finally:
            # Closed hard: the other side must see the end at once, also with something unsent.
            writer.transport.abort()

    async def close(self) -> None:
        """End the process with all its children."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.to_thread(_end, process)

    def _started(self) -> socket.socket:
        """The control socket of the worker process, started anew if it has ended."""
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        if self._control is not None:
            logger.error("the grammar worker has ended and is started again")
            self._control.close()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "twinjet.grammar.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ
                | {
                    "OPENBLAS_NUM_THREADS": "1",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(sys.path),
                },
            )
        for path in self._loaded:
            socket.send_fds(self._control, [b"load " + path.encode()], [])
        return self._control


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
