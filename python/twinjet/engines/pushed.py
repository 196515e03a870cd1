"""Reads one request of an engine that pushes its steps: the events of Engine.generate, made from a pump of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from twinjet._core import Pump, Stream
from twinjet.engines.base import (
    EngineEvent,
    Finish,
    HandoffEvent,
    Logprob,
    LogprobRow,
    OutputEvent,
    PromptEvent,
    PushEngine,
    StepRow,
    TokenLogprobs,
)
from twinjet.engines.text import make_stream
from twinjet.errors import RequestFailed
from twinjet.request import EngineRequest


class _Run:
    """The request, its outlet and the pump behind it; see base.Run and base.Outlet."""

    def __init__(self, engine: PushEngine, request: EngineRequest, stream: Stream) -> None:
        self.pump = Pump()
        self.error: Exception | None = None
        self.handoff: bytes | None = None
        self.changed = asyncio.Event()
        self._engine = engine
        self._request_id = request.request_id
        self._stream = stream
        self.key = self.pump.add(stream, self)

    @property
    def outlet(self) -> _Run:
        return self

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.changed.set()

    def hand_off(
        self, num_cached_tokens: int | None, prompt_logprobs: Sequence[LogprobRow] | None, state: bytes
    ) -> None:
        self.pump.put_prompt(self.key, num_cached_tokens, prompt_logprobs, time.monotonic())
        self.handoff = state
        self.changed.set()

    def step(self, rows: list[StepRow]) -> None:
        self.pump.step(rows, time.monotonic())
        self.collect()

    def collect(self) -> None:
        _, _, requests, ended_early = self.pump.collect(None)
        for _, output_index in ended_early:
            self._engine.cancel(self._request_id, output_index)
        if any(happened & Pump.FAILED for _, happened in requests):
            self.fail(RequestFailed("the engine could not finish the request", reason="ENGINE_ERROR"))
        self.changed.set()


async def read(engine: PushEngine, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
    """Run one request; see Engine.generate. What is not read yet is merged."""
    sampling = request.sampling
    info = engine.describe()
    vocabulary = engine.tokenizer.vocabulary
    stream = make_stream(vocabulary, sampling, info.eos_token_ids)
    stream.read_deltas()
    run = _Run(engine, request, stream)
    num_open = sampling.n
    # Not within the other: what is refused must not be cancelled, as another request may have its id.
    try:
        engine.submit(request, run)
    except BaseException:
        run.pump.remove(run.key)
        raise
    try:
        is_empty = False
        while num_open:
            # Only after a take that came back empty is the next put told of at once.
            if is_empty:
                await run.changed.wait()
            run.changed.clear()
            is_empty = True
            if (prompt := stream.take_prompt()) is not None:
                is_empty = False
                num_cached, rows = prompt
                yield PromptEvent(num_cached, None if rows is None else tuple(_logprobs(rows, vocabulary)))
            for index, text, token_ids, rows, ending in stream.take_deltas():
                is_empty = False
                finish = None if ending is None else Finish(ending[0], ending[1], is_eos=ending[2])
                num_open -= finish is not None
                yield OutputEvent(index, text, token_ids, _logprobs(rows, vocabulary), finish)
            if run.handoff is not None:
                yield HandoffEvent(run.handoff)
                return
            if run.error is not None and num_open:
                raise run.error
    finally:
        run.pump.remove(run.key)
        engine.cancel(request.request_id)


def _logprobs(rows: Sequence[LogprobRow], vocabulary: Any) -> list[TokenLogprobs]:
    made = []
    for ids, logprobs, rank in rows:
        chosen, *top = [
            Logprob(token_id, logprob, place, vocabulary.token_text(token_id))
            for place, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True))
        ]
        made.append(
            TokenLogprobs(Logprob(chosen.token_id, chosen.logprob, rank or None, chosen.text), tuple(top))
        )
    return made


def logprob_row(entry: TokenLogprobs) -> LogprobRow:
    """Turn one token's log probabilities into a step's row."""
    ids = [entry.chosen.token_id, *(top.token_id for top in entry.top)]
    logprobs = [entry.chosen.logprob, *(top.logprob for top in entry.top)]
    return ids, logprobs, entry.chosen.rank
