"""A request's constraint on its way to the engine, and its finished outputs on their way to the client."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar, cast

from twinjet.engines.base import Engine, EngineInfo, GrammarEngine, OutputEvent
from twinjet.errors import RequestFailed
from twinjet.grammar.room import CompiledGrammar, GrammarRoom
from twinjet.grammar.vocabulary import GrammarUnavailable, Vocabulary

if TYPE_CHECKING:
    from twinjet.request import Constraint, EngineRequest

logger = logging.getLogger("twinjet.grammar")

_Event = TypeVar("_Event")


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
        return task

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

    async def verified(
        self, request: EngineRequest, events: AsyncGenerator[_Event, None]
    ) -> AsyncGenerator[_Event, None]:
        """Pass a request's events on; the last of an output waits until its text is known to keep its schema.

        Raises RequestFailed for a text that does not, which would be a fault of ours.
        """
        constraint, sampling = request.sampling.constraint, request.sampling
        if constraint is None or constraint.kind != "json_schema" or not self._verify:
            async with aclosing(events):
                async for event in events:
                    yield event
            return
        texts: defaultdict[int, list[str]] = defaultdict(list)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, OutputEvent):
                    texts[event.output_index].append(event.text)
                    finish = event.finish
                    # A length, or a stop of the client's, may cut an output anywhere.
                    if (
                        finish is not None
                        and finish.reason == "stop"
                        and (finish.is_eos or finish.stopped_by is None)
                    ):
                        text = "".join(texts.pop(event.output_index))
                        is_exact = sampling.skip_special_tokens and not sampling.include_stop
                        if not await self.room.verify(constraint.value, text, is_exact=is_exact):
                            logger.error("an output broke its schema: request %s", request.request_id)
                            raise RequestFailed(
                                "the output does not keep to its schema", reason="CONSTRAINT_BROKEN"
                            )
                yield event

    async def close(self) -> None:
        """End the room's processes."""
        for task in list(self._vocabularies.values()):
            task.cancel()
        await self.room.close()
