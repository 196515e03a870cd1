"""A request's constraint on its way to the engine, and its finished outputs on their way to the client."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from twinjet.engines.base import Engine, EngineInfo, GrammarEngine
from twinjet.errors import RequestFailed
from twinjet.grammar.room import CompiledGrammar, GrammarRoom
from twinjet.grammar.vocabulary import GrammarUnavailable, Vocabulary
from twinjet.v1 import generation_pb2

if TYPE_CHECKING:
    from twinjet.request import Constraint, EngineRequest

logger = logging.getLogger("twinjet.grammar")


class Grammars:
    """The server's grammar room, with each engine's vocabulary."""

    def __init__(self, room: GrammarRoom, *, verify: bool = True) -> None:
        self.room = room
        self._verify = verify
        self._vocabularies: weakref.WeakKeyDictionary[Engine, asyncio.Task[Vocabulary | None]] = (
            weakref.WeakKeyDictionary()
        )

    def warm(self, engine: Engine, info: EngineInfo) -> None:
        """Have an engine's vocabulary read ahead of its first constrained request; returns at once."""
        if "json_schema" in info.capabilities:
            self._vocabulary(engine)

    async def prepare(
        self, engine: Engine, constraint: Constraint, *, tenant: str, deadline: float | None
    ) -> CompiledGrammar | None:
        """Check a constraint, and compile it for an engine that takes compiled grammars.

        Raises InvalidRequest, DeadlinePassed, Overloaded.
        """
        vocabulary = await asyncio.shield(self._vocabulary(engine))
        if vocabulary is None and constraint.kind != "json_schema":
            return None
        return await self.room.prepare(constraint, vocabulary, tenant=tenant, deadline=deadline)

    def _vocabulary(self, engine: Engine) -> asyncio.Task[Vocabulary | None]:
        task = self._vocabularies.get(engine)
        if task is None:
            task = self._vocabularies[engine] = asyncio.get_running_loop().create_task(self._write(engine))
            task.add_done_callback(lambda done: self._written(engine, done))
        return task

    def _written(self, engine: Engine, task: asyncio.Task[Vocabulary | None]) -> None:
        # An engine that died meanwhile is tried again, should it be asked for.
        if (task.cancelled() or task.exception() is not None) and self._vocabularies.get(engine) is task:
            del self._vocabularies[engine]

    async def _write(self, engine: Engine) -> Vocabulary | None:
        if not hasattr(engine, "vocabulary"):
            return None
        try:
            vocabulary = await cast("GrammarEngine", engine).vocabulary(self.room.folder)
        except GrammarUnavailable as error:
            logger.warning("the engine compiles grammars itself: %s", error)
            return None
        self.room.warm(vocabulary)
        return vocabulary

    def output_check(self, request: EngineRequest) -> OutputCheck | None:
        """Make the check that a request's finished outputs go through, if they do."""
        constraint = request.sampling.constraint
        if constraint is None or constraint.kind != "json_schema" or not self._verify:
            return None
        return OutputCheck(self.room, constraint.value, request)

    async def close(self) -> None:
        """End the room's processes."""
        for task in list(self._vocabularies.values()):
            task.cancel()
        await self.room.close()


class OutputCheck:
    """Looks at a stream's messages before they are sent: the end of an output waits until its text is known to
    keep to its schema."""

    def __init__(self, room: GrammarRoom, schema: str, request: EngineRequest) -> None:
        self._room = room
        self._schema = schema
        self._request_id = request.request_id
        sampling = request.sampling
        self._is_exact = sampling.skip_special_tokens and not sampling.include_stop
        self._texts: defaultdict[int, list[str]] = defaultdict(list)

    async def look_at(self, messages: Sequence[bytes]) -> None:
        """Raise RequestFailed if an output that ends here does not keep to the schema, which is a fault of ours."""
        for message in messages:
            event = generation_pb2.GenerateResponse.FromString(message)
            if event.HasField("delta"):
                self._texts[event.delta.output_index].append(event.delta.text)
            elif event.HasField("finished"):
                await self._ended(event.finished)

    async def _ended(self, finished: generation_pb2.Finished) -> None:
        text = "".join(self._texts.pop(finished.output_index, ()))
        # A length, or a stop of the client's, may cut an output anywhere.
        is_whole = finished.reason == generation_pb2.FINISH_REASON_STOP and finished.WhichOneof(
            "stopped_by"
        ) in (None, "eos_token_id")
        if is_whole and not await self._room.verify(self._schema, text, is_exact=self._is_exact):
            logger.error("an output broke its schema: request %s", self._request_id)
            raise RequestFailed("the output does not keep to its schema", reason="CONSTRAINT_BROKEN")
