"""Where constraints are checked and compiled: the server's side, one asyncio loop.

`GrammarRoom.prepare` gives a compiled grammar or raises what is wrong with the constraint. The work is done by
children of one worker process (worker.py) under limits; a child is killed when the last request that waits for it is
cancelled or past its deadline. Results, refusals too, are kept by content. A compiled grammar lies in a file, which
lives as long as the cache or a request holds its `CompiledGrammar`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from twinjet.errors import DeadlinePassed, InvalidRequest, Overloaded, RequestFailed
from twinjet.grammar.compilation import Job
from twinjet.grammar.limits import GrammarLimits
from twinjet.grammar.vocabulary import Vocabulary
from twinjet.grammar.worker import MAX_JOB_BYTES
from twinjet.request import Constraint

logger = logging.getLogger("twinjet.grammar")

_RETRY_AFTER_S = 1.0
_COSTLY_FOR_S = 60.0
_VERIFY_CPU_S = 2.0
_VERIFY_NICENESS = 5
"""A finished output waits for its check, so that is not put behind everything else."""
_MAX_REMEMBERED = 4096
_MAX_ANSWER_BYTES = 1 << 20


class CompiledGrammar:
    """A constraint, checked and compiled for one vocabulary.

    path: its file (see `twinjet.grammar.handle`), gone with this object; "" where the engine compiles by itself.
    """

    def __init__(self, path: str, vocabulary: Vocabulary | None, num_bytes: int) -> None:
        self.path = path
        self.vocabulary = vocabulary
        self.num_bytes = num_bytes
        if path:
            weakref.finalize(self, _unlink, path)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


@dataclass(slots=True)
class _Flight:
    """A job that some requests wait for."""

    task: asyncio.Task[dict[str, Any]]
    job: Job
    num_waiters: int = 0


@dataclass(slots=True)
class _Tenant:
    running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class _Turns:
    """Who may have a worker next: tenants in turn, none with more than its share."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits = limits
        self._share = max(1, limits.workers // 2)
        self._running = 0
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncGenerator[None, None]:
        """Hold a worker. Raises Overloaded if too many of this tenant's wait already."""
        tenant = self._tenants.setdefault(name, _Tenant())
        if len(tenant.waiting) >= self._limits.waiting:
            raise Overloaded(
                f"{len(tenant.waiting)} grammars of this tenant wait to be compiled",
                retry_after_s=_RETRY_AFTER_S,
            )
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tenant.waiting.append(granted)
        self._grant()
        try:
            await granted
        except BaseException:
            if granted.done() and not granted.cancelled():
                self._give_back(name)
            else:
                tenant.waiting.remove(granted)
                self._forget(name)
            raise
        try:
            yield
        finally:
            self._give_back(name)

    def _give_back(self, name: str) -> None:
        self._running -= 1
        self._tenants[name].running -= 1
        self._forget(name)
        self._grant()

    def _forget(self, name: str) -> None:
        tenant = self._tenants[name]
        if not tenant.running and not tenant.waiting:
            del self._tenants[name]

    def _grant(self) -> None:
        while self._running < self._limits.workers:
            name = next((n for n, t in self._tenants.items() if t.waiting and t.running < self._share), None)
            if name is None:
                return
            tenant = self._tenants[name]
            self._tenants.move_to_end(name)
            granted = tenant.waiting.popleft()
            if granted.done():
                continue
            tenant.running += 1
            self._running += 1
            granted.set_result(None)


class GrammarRoom:
    """Prepares constraints for all deployments of a server. Nothing is started before the first one."""

    def __init__(self, limits: GrammarLimits | None = None) -> None:
        self.limits = limits or GrammarLimits()
        self._turns = _Turns(self.limits)
        self._folder: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._loaded: set[str] = set()
        self._known: OrderedDict[str, CompiledGrammar | str] = OrderedDict()
        self._costly: dict[str, tuple[float, str]] = {}
        self._num_bytes = 0
        self._flights: dict[str, _Flight] = {}
        self._num_files = 0

    @property
    def folder(self) -> Path:
        """Where vocabularies and compiled grammars lie; gone after close()."""
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="twinjet-grammar-")
        return Path(self._folder)

    @property
    def worker_pid(self) -> int | None:
        """The worker process, if it was started."""
        return None if self._process is None else self._process.pid

    def warm(self, vocabulary: Vocabulary) -> None:
        """Have a vocabulary read ahead of the first request; returns at once."""
        if vocabulary.path not in self._loaded:
            self._loaded.add(vocabulary.path)
            socket.send_fds(self._started(), [b"load " + vocabulary.path.encode()], [])

    async def prepare(
        self,
        constraint: Constraint,
        vocabulary: Vocabulary | None,
        *,
        tenant: str = "",
        deadline: float | None = None,
    ) -> CompiledGrammar:
        """Check a constraint and compile it, if there is a vocabulary to compile it for.

        deadline: time.monotonic() seconds. Raises InvalidRequest with the reason, DeadlinePassed, Overloaded.
        """
        job = Job(
            constraint.kind,
            constraint.value,
            constraint.choices,
            vocabulary=vocabulary.path if vocabulary is not None else "",
            is_compact=vocabulary is not None and vocabulary.is_compact,
        )
        key = hashlib.sha256(job.encode()).hexdigest()
        field_name = f"sampling.constraint.{constraint.kind}"
        known = self._known.get(key) or self._costly_before(key)
        if known is None:
            if vocabulary is not None:
                self.warm(vocabulary)
                self._num_files += 1
                job = replace(job, target=str(self.folder / f"{key[:24]}-{self._num_files}.json"))
            job, answer = await self._shared(key, job, tenant, deadline)
            known = self._keep(key, job, vocabulary, answer)
        elif key in self._known:
            self._known.move_to_end(key)
        if isinstance(known, str):
            raise InvalidRequest.of(field_name, known)
        return known

    async def verify(self, schema: str, text: str, *, is_exact: bool, tenant: str = "") -> bool:
        """Tell whether a finished output satisfies its schema; True where that cannot be told within limits."""
        job = Job("verify", schema, text=text, is_exact=is_exact)
        limits = replace(
            self.limits, cpu_s=_VERIFY_CPU_S, wall_s=2 * _VERIFY_CPU_S, niceness=_VERIFY_NICENESS
        )
        answer = await self._run(job, limits)
        if "done" not in answer:
            logger.warning("an output could not be checked against its schema: %s", answer)
            return True
        return bool(answer["done"]["is_valid"])

    async def close(self) -> None:
        """End the worker process with all its children, and remove the folder."""
        for flight in list(self._flights.values()):
            flight.task.cancel()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.to_thread(_end, process)
        self._known.clear()
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            self._folder = None

    async def _shared(
        self, key: str, job: Job, tenant: str, deadline: float | None
    ) -> tuple[Job, dict[str, Any]]:
        """Run a job once for all who wait for it; it ends with the last of them.

        Gives the job that was run, whose file is another waiter's where that one came first.
        """
        flight = self._flights.get(key)
        if flight is None:
            task = asyncio.get_running_loop().create_task(self._in_turn(job, tenant), name="grammar")
            flight = self._flights[key] = _Flight(task, job)
            task.add_done_callback(lambda _: self._landed(key, flight))
        flight.num_waiters += 1
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            async with asyncio.timeout(left_s):
                return flight.job, await asyncio.shield(flight.task)
        except TimeoutError:
            raise DeadlinePassed("the deadline passed while the grammar was compiled") from None
        finally:
            flight.num_waiters -= 1
            if flight.num_waiters == 0 and not flight.task.done():
                flight.task.cancel()
                self._landed(key, flight)

    def _landed(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _in_turn(self, job: Job, tenant: str) -> dict[str, Any]:
        async with self._turns.turn(tenant):
            return await self._run(job, self.limits)

    async def _run(self, job: Job, limits: GrammarLimits) -> dict[str, Any]:
        """Have a child do a job; it is killed if this is cancelled."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                socket.send_fds(self._started(), [b"job"], [theirs.fileno()])
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        try:
            request = json.dumps({"limits": asdict(limits), "job": job.encode().decode()}).encode()
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

    def _keep(
        self, key: str, job: Job, vocabulary: Vocabulary | None, answer: dict[str, Any]
    ) -> CompiledGrammar | str:
        known: CompiledGrammar | str
        if (present := self._known.get(key)) is not None:
            # Another request that waited for the same job was here first.
            return present
        if "done" in answer:
            known = CompiledGrammar(job.target, vocabulary, answer["done"].get("num_bytes", 0))
            self._num_bytes += known.num_bytes
        elif "refused" in answer:
            known = answer["refused"]
        elif answer.get("died") == "time":
            return self._too_costly(
                key,
                f"takes more than {self.limits.cpu_s:g} s to compile; make its bounds or its size smaller",
            )
        elif answer.get("died") == "memory":
            return self._too_costly(
                key,
                f"takes more than {self.limits.memory_bytes >> 20} MiB to compile; "
                "make its bounds or its size smaller",
            )
        else:
            logger.error("a grammar could not be compiled: %s", answer.get("failed", answer))
            raise RequestFailed("the constraint could not be compiled", reason="GRAMMAR_WORKER_FAILED")
        self._known[key] = known
        while len(self._known) > _MAX_REMEMBERED or self._num_bytes > self.limits.cache_bytes:
            _, dropped = self._known.popitem(last=False)
            if isinstance(dropped, CompiledGrammar):
                self._num_bytes -= dropped.num_bytes
        return known

    def _too_costly(self, key: str, why: str) -> str:
        """Remember for a while what cost too much: a machine that was busy may do it later."""
        now = time.monotonic()
        self._costly = {k: v for k, v in self._costly.items() if v[0] > now}
        self._costly[key] = (now + _COSTLY_FOR_S, why)
        return why

    def _costly_before(self, key: str) -> str | None:
        until, why = self._costly.get(key, (0.0, ""))
        return why if until > time.monotonic() else None

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
