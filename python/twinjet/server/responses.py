"""Turns the events of one request into the messages of its stream, and keeps usage and timings."""

from __future__ import annotations

import time
from collections.abc import Iterator

from twinjet.engines.base import EngineInfo, OutputEvent, PromptEvent
from twinjet.request import EngineRequest
from twinjet.scheduler import DispatchedEvent, QueuedEvent
from twinjet.server import convert
from twinjet.v1 import generation_pb2 as pb

_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class ResponseBuilder:
    """One request's side of the contract. arrived_at: time.monotonic() when the call came in."""

    def __init__(
        self, request: EngineRequest, info: EngineInfo, *, model: str, deployment: str, arrived_at: float
    ) -> None:
        self._request = request
        self._info = info
        self._model = model
        self._deployment = deployment
        self._arrived_at = arrived_at
        self._dispatched_at = arrived_at
        self._queue_position = 0
        self._first_token_at: float | None = None
        self._last_token_at = arrived_at
        self._num_cached_tokens: int | None = None
        self._num_output_tokens = [0] * request.sampling.n

    @property
    def first_token_s(self) -> float | None:
        """TTFT: seconds from arrival to the first token."""
        return None if self._first_token_at is None else self._first_token_at - self._arrived_at

    @property
    def per_token_s(self) -> float | None:
        """TPOT: mean seconds for each output token after the first."""
        if self._first_token_at is None or self.num_output_tokens < 2:
            return None
        return (self._last_token_at - self._first_token_at) / (self.num_output_tokens - 1)

    @property
    def deployment(self) -> str:
        return self._deployment

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return sum(self._num_output_tokens)

    def note_token(self) -> None:
        """Take the time of a token; called when it comes out of the engine, not when it is written."""
        self._last_token_at = time.monotonic()
        if self._first_token_at is None:
            self._first_token_at = self._last_token_at

    def messages(
        self, event: QueuedEvent | DispatchedEvent | PromptEvent | OutputEvent
    ) -> Iterator[pb.GenerateResponse]:
        """Give the messages for one event; none for some."""
        match event:
            case QueuedEvent():
                yield self._queued(event)
            case DispatchedEvent():
                self._dispatched_at = self._arrived_at + event.queue_s
                self._queue_position = event.queue_position_at_arrival
            case PromptEvent():
                yield self._started(event)
                if event.logprobs is not None:
                    tokens = [convert.token_logprobs(entry) for entry in event.logprobs]
                    yield pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(tokens=tokens))
            case OutputEvent():
                yield from self._output(event)

    def summary(self) -> pb.GenerateResponse:
        """Give the last message of the stream."""
        first_token_at = self._first_token_at or self._last_token_at
        timings = pb.Timings(
            queue=convert.duration(self._dispatched_at - self._arrived_at),
            first_token=convert.duration(first_token_at - self._arrived_at),
            prefill=convert.duration(first_token_at - self._dispatched_at),
            total=convert.duration(self._last_token_at - self._arrived_at),
        )
        if self.per_token_s is not None:
            timings.per_token.CopyFrom(convert.duration(self.per_token_s))
        usage = pb.Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            cached_prompt_tokens=self._num_cached_tokens,
            output_tokens=self.num_output_tokens,
        )
        return pb.GenerateResponse(
            summary=pb.Summary(
                usage=usage,
                timings=timings,
                seed=self._request.sampling.seed,
                sampler=self._info.sampler.implementation,
            )
        )

    def _queued(self, event: QueuedEvent) -> pb.GenerateResponse:
        message = pb.Queued(request_id=self._request.request_id, position=event.position)
        if event.expected_wait_s is not None:
            message.expected_wait.CopyFrom(convert.duration(event.expected_wait_s))
        return pb.GenerateResponse(queued=message)

    def _started(self, event: PromptEvent) -> pb.GenerateResponse:
        self._num_cached_tokens = event.num_cached_tokens
        return pb.GenerateResponse(
            started=pb.Started(
                request_id=self._request.request_id,
                model=self._model,
                engine=self._info.name,
                prompt_tokens=len(self._request.prompt_token_ids),
                cached_prompt_tokens=event.num_cached_tokens,
                deployment=self._deployment,
                queue_position=self._queue_position,
            )
        )

    def _output(self, event: OutputEvent) -> Iterator[pb.GenerateResponse]:
        index = event.output_index
        self._num_output_tokens[index] += len(event.token_ids)
        if event.text or event.token_ids:
            delta = pb.Delta(output_index=index, text=event.text, token_ids=event.token_ids)
            if event.logprobs:
                delta.logprobs.extend(convert.token_logprobs(entry) for entry in event.logprobs)
            yield pb.GenerateResponse(delta=delta)
        if event.finish is not None:
            finished = pb.Finished(
                output_index=index,
                reason=_REASONS[event.finish.reason],
                output_tokens=self._num_output_tokens[index],
            )
            match event.finish.stopped_by:
                case str(text):
                    finished.stop_string = text
                case int(token) if event.finish.is_eos:
                    finished.eos_token_id = token
                case int(token):
                    finished.stop_token_id = token
            yield pb.GenerateResponse(finished=finished)
