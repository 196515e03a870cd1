"""Events of a stream and results of calls, as frozen dataclasses. Times in seconds.

The meaning of each field is that of the message of the same name in proto/twinjet/v1/generation.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from twinjet.client._errors import PartialOutput
from twinjet.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one token, natural logarithm. rank: 1 is the most probable; None is not known."""

    token_id: int
    logprob: float
    rank: int | None
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of a token and of its most probable rivals, best first."""

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits. position: 0 is next. expected_wait_s: None is not known."""

    request_id: str
    position: int
    expected_wait_s: float | None


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has taken up the prompt."""

    request_id: str
    model: str
    engine: str
    prompt_tokens: int
    cached_prompt_tokens: int | None
    deployment: str
    queue_position: int


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of the prompt, of a long one in several events: entry i of all belongs to token i + 1."""

    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one output; never cumulative. logprobs: one for each token, or empty."""

    output_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """One output has ended. stopped_by: end or stop token id, stop string, None (length or grammar)."""

    output_index: int
    reason: Literal["stop", "length"]
    stopped_by: int | str | None
    is_eos: bool
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Handoff:
    """What a prefill_only request gives for another deployment to go on from. Opaque, of use once."""

    state: bytes
    seed: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the whole request."""

    prompt_tokens: int
    cached_prompt_tokens: int | None
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, measured in the server. per_token_s: None with fewer than two tokens."""

    queue_s: float
    first_token_s: float
    prefill_s: float
    per_token_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The last event. seed: repeats the draw when sent again. sampler: "twinjet" or "engine"."""

    usage: Usage
    timings: Timings
    seed: int
    sampler: str


Event = Queued | Started | PromptLogprobs | Delta | Finished | Handoff | Summary


@dataclass(frozen=True, slots=True)
class Output:
    """One whole output."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finished: Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole stream: its outputs by output_index; or, of a prefill_only request, none and a handoff."""

    started: Started
    prompt_logprobs: PromptLogprobs | None
    outputs: tuple[Output, ...]
    summary: Summary
    handoff: Handoff | None = None

    @property
    def text(self) -> str:
        """Text of the first output; "" if there is a handoff instead."""
        return self.outputs[0].text if self.outputs else ""


def event_of(message: pb.GenerateResponse) -> Event | None:
    """Translate one message; None for an event of a newer contract than this client knows."""
    match message.WhichOneof("event"):
        case "delta":
            delta = message.delta
            return Delta(
                delta.output_index, delta.text, tuple(delta.token_ids), _all_logprobs(delta.logprobs)
            )
        case "started":
            return _started(message.started)
        case "finished":
            return _finished(message.finished)
        case "summary":
            summary = message.summary
            return Summary(usage_of(summary.usage), _timings(summary.timings), summary.seed, summary.sampler)
        case "queued":
            queued = message.queued
            wait_s = _seconds(queued.expected_wait) if queued.HasField("expected_wait") else None
            return Queued(queued.request_id, queued.position, wait_s)
        case "prompt_logprobs":
            return PromptLogprobs(_all_logprobs(message.prompt_logprobs.tokens))
        case "handoff":
            return Handoff(message.handoff.state, message.handoff.seed)
    return None


def usage_of(usage: pb.Usage) -> Usage:
    """Translate a usage message."""
    cached = usage.cached_prompt_tokens if usage.HasField("cached_prompt_tokens") else None
    return Usage(usage.prompt_tokens, cached, usage.output_tokens)


class Collector:
    """Builds a Completion from events."""

    def __init__(self) -> None:
        self._started: Started | None = None
        self._prompt_logprobs: list[PromptLogprobs] = []
        self._deltas: dict[int, list[Delta]] = {}
        self._finished: dict[int, Finished] = {}
        self._summary: Summary | None = None
        self._handoff: Handoff | None = None
        self._request_id = ""

    def add(self, event: Event) -> None:
        """Take one event."""
        match event:
            case Delta():
                self._deltas.setdefault(event.output_index, []).append(event)
            case Finished():
                self._finished[event.output_index] = event
            case Started():
                self._started = event
                self._request_id = event.request_id
            case PromptLogprobs():
                self._prompt_logprobs.append(event)
            case Handoff():
                self._handoff = event
            case Summary():
                self._summary = event
            case Queued():
                self._request_id = event.request_id

    def completion(self) -> Completion:
        """Give the whole. Raises ValueError if the stream was not complete."""
        if self._started is None or self._summary is None:
            raise ValueError("the stream had no started or no summary event")
        return Completion(
            self._started,
            self._all_prompt_logprobs(),
            tuple(self._output(index) for index in sorted(self._finished)),
            self._summary,
            self._handoff,
        )

    @property
    def request_id(self) -> str:
        """The request's id, "" until an event has named it."""
        return self._request_id

    def partial(self) -> tuple[PartialOutput, ...]:
        """Give what has come so far."""
        return tuple(
            PartialOutput(
                index, "".join(d.text for d in deltas), tuple(t for d in deltas for t in d.token_ids)
            )
            for index, deltas in sorted(self._deltas.items())
        )

    def _all_prompt_logprobs(self) -> PromptLogprobs | None:
        if not self._prompt_logprobs:
            return None
        return PromptLogprobs(tuple(entry for event in self._prompt_logprobs for entry in event.tokens))

    def _output(self, index: int) -> Output:
        deltas = self._deltas.get(index, [])
        return Output(
            "".join(d.text for d in deltas),
            tuple(t for d in deltas for t in d.token_ids),
            tuple(p for d in deltas for p in d.logprobs),
            self._finished[index],
        )


def _started(started: pb.Started) -> Started:
    cached = started.cached_prompt_tokens if started.HasField("cached_prompt_tokens") else None
    return Started(
        started.request_id,
        started.model,
        started.engine,
        started.prompt_tokens,
        cached,
        started.deployment,
        started.queue_position,
    )


def _finished(finished: pb.Finished) -> Finished:
    which = finished.WhichOneof("stopped_by")
    stopped_by: int | str | None = getattr(finished, which) if which else None
    reason: Literal["stop", "length"] = "length" if finished.reason == pb.FINISH_REASON_LENGTH else "stop"
    return Finished(
        finished.output_index, reason, stopped_by, which == "eos_token_id", finished.output_tokens
    )


def _timings(timings: pb.Timings) -> Timings:
    return Timings(
        _seconds(timings.queue),
        _seconds(timings.first_token),
        _seconds(timings.prefill),
        _seconds(timings.per_token) if timings.HasField("per_token") else None,
        _seconds(timings.total),
    )


def _seconds(duration: object) -> float:
    return float(duration.seconds + duration.nanos / 1e9)  # type: ignore[attr-defined]


def _logprob(logprob: pb.Logprob) -> Logprob:
    rank = logprob.rank if logprob.HasField("rank") else None
    return Logprob(logprob.token_id, logprob.logprob, rank, logprob.text)


def _all_logprobs(entries: Sequence[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(_logprob(e.chosen), tuple(_logprob(t) for t in e.top)) for e in entries)
