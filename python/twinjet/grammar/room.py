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
import logging
import os
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twinjet.errors import DeadlinePassed, InvalidRequest, Overloaded, RequestFailed
from twinjet.grammar.job import Job
from twinjet.grammar.limits import GrammarLimits
from twinjet.grammar.turns import Turns, Waste
from twinjet.grammar.vocabulary import Vocabulary
from twinjet.grammar.workers import Workers
from twinjet.private_folder import PrivateFolder
from twinjet.request import Constraint

logger = logging.getLogger("twinjet.grammar")

_RETRY_AFTER_S = 5.0
_COSTLY_FOR_S = 60.0
_VERIFY_CPU_S = 2.0
_VERIFY_NICENESS = 5
"""A finished output waits for its check, so that is not put behind everything else."""
_MAX_REMEMBERED = 4096


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
    tenant: str
    num_waiters: int = 0


class GrammarRoom:
    """Prepares constraints for all deployments of a server. Nothing is started before the first one.

    workers: where the work is done; closed with this room unless given.
    """

    def __init__(self, limits: GrammarLimits | None = None, workers: Workers | None = None) -> None:
        self.limits = limits or GrammarLimits()
        self.workers = workers or Workers()
        self._owns_workers = workers is None
        self._turns = Turns(self.limits)
        self._waste = Waste(self.limits.refused_cpu_s)
        self._folder: PrivateFolder | None = None
        self._known: OrderedDict[str, CompiledGrammar | str] = OrderedDict()
        self._costly: dict[str, tuple[float, str]] = {}
        self._num_bytes = 0
        self._flights: dict[str, _Flight] = {}
        self._num_files = 0

    @property
    def folder(self) -> Path:
        """Where vocabularies and compiled grammars lie; gone after close()."""
        if self._folder is None:
            self._folder = PrivateFolder("grammar")
        return self._folder.path

    def warm(self, vocabulary: Vocabulary) -> None:
        """Have a vocabulary read ahead of the first request; returns at once."""
        self.workers.warm(vocabulary.path)

    async def prepare(
        self,
        constraint: Constraint,
        vocabulary: Vocabulary | None,
        *,
        tenant: str = "",
        deadline: float | None = None,
    ) -> CompiledGrammar:
        """Check a constraint and compile it, if there is a vocabulary to compile it for.

        tenant: whom the work is accounted to. deadline: time.monotonic() seconds. Raises InvalidRequest with the
        reason, DeadlinePassed, Overloaded.
        """
        job = Job(
            constraint.kind,
            constraint.value,
            constraint.choices,
            vocabulary=vocabulary.path if vocabulary is not None else "",
            is_compact=vocabulary is not None and vocabulary.is_compact,
        )
        key = _key(job)
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
        answer = await self.workers.run(job, limits)
        if "done" not in answer:
            logger.warning("an output could not be checked against its schema: %s", answer)
            return True
        return bool(answer["done"]["is_valid"])

    async def close(self) -> None:
        """End what is under way and, if they are its own, the workers, and remove the folder."""
        for flight in list(self._flights.values()):
            flight.task.cancel()
        if self._owns_workers:
            await self.workers.close()
        self._known.clear()
        if self._folder is not None:
            await asyncio.to_thread(self._folder.remove)
            self._folder = None

    async def _shared(
        self, key: str, job: Job, tenant: str, deadline: float | None
    ) -> tuple[Job, dict[str, Any]]:
        """Run a job once for all who wait for it; it ends with the last of them.

        Gives the job that was run, whose file is another waiter's where that one came first.
        """
        while True:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._take_off(key, job, tenant)
            try:
                return flight.job, await self._wait(key, flight, deadline)
            except Overloaded:
                # What another tenant may not have is no answer to this one.
                if flight.tenant == tenant:
                    raise
                self._landed(key, flight)

    def _take_off(self, key: str, job: Job, tenant: str) -> _Flight:
        task = asyncio.get_running_loop().create_task(self._in_turn(job, tenant), name="grammar")
        flight = self._flights[key] = _Flight(task, job, tenant)
        task.add_done_callback(lambda _: self._landed(key, flight))
        return flight

    async def _wait(self, key: str, flight: _Flight, deadline: float | None) -> dict[str, Any]:
        flight.num_waiters += 1
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            async with asyncio.timeout(left_s):
                return await asyncio.shield(flight.task)
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
        self._waste.check(tenant)
        async with self._turns.turn(tenant):
            self._waste.check(tenant)
            limits = replace(self.limits, soon_s=0.0) if self._waste.of(tenant) else self.limits
            began = time.monotonic()
            answer: dict[str, Any] = {}
            try:
                answer = await self.workers.run(job, limits)
            finally:
                # One that is killed cannot say what it took.
                at_most = min(time.monotonic() - began, self.limits.cpu_s)
                self._waste.charge(tenant, answer.get("cpu_s", at_most), was_refused="done" not in answer)
            return answer

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
        elif answer.get("died") == "wall":
            raise Overloaded(
                f"the machine is too busy: the constraint was not compiled within {self.limits.wall_s:g} s",
                retry_after_s=_RETRY_AFTER_S,
            )
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


def _key(job: Job) -> str:
    """Name what is compiled and for what, not where to."""
    digest = hashlib.sha256()
    for part in (job.kind, job.vocabulary, str(job.is_compact), job.value, *job.choices):
        encoded = part.encode()
        digest.update(b"%d " % len(encoded))
        digest.update(encoded)
    return digest.hexdigest()
