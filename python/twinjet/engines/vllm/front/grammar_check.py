"""Grammars are checked as vLLM does, in a process of its own that is started for the first of them.

A check can take long and much memory, and must not hold up streams: neither in the front end, which has no
vLLM, nor in the engine.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from multiprocessing.connection import Connection
from typing import Any

from twinjet.engines.vllm.core import grammar_worker
from twinjet.engines.vllm.front.process import EngineContext, end_processes
from twinjet.errors import InvalidRequest, RequestFailed
from twinjet.request import Constraint


class GrammarCheck:
    """Owns the process. checking: Facts.checking. forked: from the forkserver."""

    def __init__(self, checking: bytes, *, forked: bool) -> None:
        self._checking = checking
        self._forked = forked
        # One check at a time; also held while the process starts or ends.
        self._lock = threading.Lock()
        self._context: EngineContext | None = None
        self._connection: Connection | None = None

    async def check(self, constraint: Constraint, structured: dict[str, Any]) -> dict[str, Any]:
        """Check one; gives the fields of StructuredOutputsParams for the engine.

        structured: from params.sampling_fields(). Raises InvalidRequest, RequestFailed if the process died.
        """
        field = f"sampling.constraint.{constraint.kind}"
        try:
            is_fit, answer = await asyncio.to_thread(self._ask, structured)
        except (EOFError, OSError) as error:
            self.stop()
            raise RequestFailed("the check of its grammar failed", reason="GRAMMAR_CHECK_FAILED") from error
        if not is_fit:
            raise InvalidRequest.of(field, answer)
        found: dict[str, Any] = answer
        return found

    def _ask(self, structured: dict[str, Any]) -> tuple[bool, Any]:
        with self._lock:
            if self._connection is None:
                self._start()
            assert self._connection is not None
            self._connection.send(structured)
            answer: tuple[bool, Any] = self._connection.recv()
            return answer

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._context = EngineContext(forked=self._forked, phases=None)
        process = self._context.Process(
            target=grammar_worker.serve, args=(theirs, self._checking), name="GrammarCheck"
        )
        process.start()
        theirs.close()

    def stop(self) -> None:
        """End the process, also in the middle of a check. Idempotent."""
        context, self._context = self._context, None
        if context is not None:
            end_processes(context)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
