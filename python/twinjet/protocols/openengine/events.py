"""The events of a twinjet.v1 stream as those of OpenEngine: one translator a stream. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from twinjet import errors
from twinjet.protocols.openengine.v1 import error_pb2
from twinjet.protocols.openengine.v1 import generation_pb2 as pb
from twinjet.v1 import generation_pb2 as ours

_REASONS = {
    ours.FINISH_REASON_STOP: pb.FINISH_REASON_STOP,
    ours.FINISH_REASON_LENGTH: pb.FINISH_REASON_LENGTH,
}


class Translator:
    """Gives the OpenEngine events for each of ours, in order.

    wants_text: send texts, not only token ids. token_texts: gives, for the deployment that a stream begins at, a token
    alone as text. prompt_start: first prompt token whose log probability is told.
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        wants_text: bool,
        token_texts: Callable[[str], Callable[[int], str]],
        prompt_start: int = 0,
    ) -> None:
        self._wants_text = wants_text
        self._token_texts = token_texts
        self._token_text: Callable[[int], str] = str
        self._prompt_start = prompt_start
        self._request_id = ""
        self._num_outputs = num_outputs
        self._open: set[int] = set()
        self._last: pb.GenerateResponse | None = None
        self.has_started = False

    def translate(self, event: ours.GenerateResponse) -> Iterator[pb.GenerateResponse]:
        """Translate one event. The last finished event waits for the summary, whose counts it carries."""
        match event.WhichOneof("event"):
            case "started":
                self.has_started = True
                # Not before: only now is the number known to be one that may be asked for.
                self._open = set(range(self._num_outputs))
                self._request_id = event.started.request_id
                self._token_text = self._token_texts(event.started.deployment)
            case "prompt_logprobs":
                # Entry i belongs to prompt token i + 1.
                rows = event.prompt_logprobs.tokens[max(self._prompt_start - 1, 0) :]
                yield self._response(prompt=pb.PromptOutput(tokens=map(self._with_logprob, rows)))
            case "delta":
                yield self._response(token=self._token(event.delta))
            case "finished":
                self._open.discard(event.finished.output_index)
                response = self._response(finished=_finished(event.finished))
                if self._open:
                    yield response
                else:
                    self._last = response
            case "summary" if self._last is not None:
                self._last.usage.CopyFrom(_usage(event.summary.usage))
                yield self._last

    def end(self, error: Exception) -> Iterator[pb.GenerateResponse]:
        """Tell a failure: one error event or, for what was aborted, the end of each open output."""
        if isinstance(error, errors.RequestAborted):
            for index in sorted(self._open):
                cancelled = pb.GenerationFinished(
                    output_index=index, reason=pb.FINISH_REASON_CANCELLED, message="the request was aborted"
                )
                yield self._response(finished=cancelled)
        else:
            yield self._response(error=engine_error(error))

    def _response(self, **event: object) -> pb.GenerateResponse:
        return pb.GenerateResponse(request_id=self._request_id, **event)  # type: ignore[arg-type]

    def _token(self, delta: ours.Delta) -> pb.TokenOutput:
        if delta.logprobs:
            tokens: Iterable[pb.TokenInfo] = map(self._with_logprob, delta.logprobs)
        elif self._wants_text:
            tokens = (pb.TokenInfo(token_id=t, token=self._token_text(t)) for t in delta.token_ids)
        else:
            tokens = (pb.TokenInfo(token_id=t) for t in delta.token_ids)
        text = delta.text if self._wants_text else ""
        return pb.TokenOutput(output_index=delta.output_index, tokens=tokens, text=text)

    def _with_logprob(self, row: ours.TokenLogprobs) -> pb.TokenInfo:
        chosen = row.chosen
        info = pb.TokenInfo(
            token_id=chosen.token_id,
            token=chosen.text if self._wants_text else "",
            logprob=chosen.logprob,
            rank=chosen.rank if chosen.HasField("rank") else None,
        )
        for top in row.top:
            info.candidates.add(
                token_id=top.token_id,
                token=top.text if self._wants_text else "",
                logprob=top.logprob,
                rank=top.rank if top.HasField("rank") else None,
            )
        return info


def engine_error(error: Exception) -> error_pb2.EngineError:
    """Give a failure as OpenEngine says it. What is not ours to tell is an internal error."""
    code, is_retryable = _code(error)
    text = (
        str(error) if isinstance(error, errors.TwinjetError) else "internal error; the server's log has more"
    )
    return error_pb2.EngineError(code=code, message=text[:512], retryable=is_retryable)


def _code(error: Exception) -> tuple[error_pb2.ErrorCode.ValueType, bool]:
    match error:
        case errors.InvalidRequest() | errors.NoAdmissibleToken():
            return error_pb2.ERROR_CODE_INVALID_ARGUMENT, False
        case errors.Unsupported():
            return error_pb2.ERROR_CODE_UNSUPPORTED_FEATURE, False
        case errors.NotFound():
            return error_pb2.ERROR_CODE_MODEL_NOT_FOUND, False
        case errors.AlreadyExists():
            return error_pb2.ERROR_CODE_DUPLICATE_REQUEST, False
        case errors.Overloaded():
            return error_pb2.ERROR_CODE_OVERLOADED, True
        case errors.EngineDied():
            # What may have ended the engine must not end the next one.
            return error_pb2.ERROR_CODE_INTERNAL, not error.was_running
        case errors.Unavailable():
            return error_pb2.ERROR_CODE_DRAINING, True
        case errors.DeadlinePassed() | errors.RequestAborted():
            return error_pb2.ERROR_CODE_CANCELLED, False
        case _:
            return error_pb2.ERROR_CODE_INTERNAL, False


def _finished(finished: ours.Finished) -> pb.GenerationFinished:
    message = pb.GenerationFinished(output_index=finished.output_index, reason=_REASONS[finished.reason])
    match finished.WhichOneof("stopped_by"):
        case "eos_token_id":
            message.stop_match.eos_token_id = finished.eos_token_id
        case "stop_token_id":
            message.stop_match.stop_token_id = finished.stop_token_id
        case "stop_string":
            message.stop_match.stop_text = finished.stop_string
    return message


def _usage(usage: ours.Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.output_tokens,
        total_tokens=usage.prompt_tokens + usage.output_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens if usage.HasField("cached_prompt_tokens") else None,
    )
