"""What a call can end with, as exceptions. StreamConsumed alone is the caller's mistake and stands apart.

TwinjetClientError
├── BadRequest         INVALID_ARGUMENT: violations name each field
├── NotFound           NOT_FOUND: no such model, adapter or request
├── AlreadyExists      ALREADY_EXISTS: the request id or adapter name is taken
├── NotSupported       UNIMPLEMENTED: capability names what the model lacks
├── AccessDenied       PERMISSION_DENIED, UNAUTHENTICATED
├── Overloaded         RESOURCE_EXHAUSTED: retry_after_s says when to come back
├── Unavailable        UNAVAILABLE: loading, draining, dead or not reachable
├── DeadlinePassed     DEADLINE_EXCEEDED; reason DEADLINE_UNREACHABLE: refused at once, as it would pass
├── Cancelled          CANCELLED: by this client or by an operator
├── PreconditionFailed FAILED_PRECONDITION, ABORTED: not in the present state; reason says why
├── ServerFailure      everything else: the server's fault
└── IncompleteStream   the stream ended well but without a summary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from twinjet.client._details import details

_DETAILS_KEY = "grpc-status-details-bin"
_REQUEST_ID_KEY = "twinjet-request-id"


@dataclass(frozen=True, slots=True)
class Violation:
    """One field and what is wrong with it: its path from the request ("sampling.top_p"), and a sentence."""

    field: str
    message: str


@dataclass(frozen=True, slots=True)
class PartialOutput:
    """What had come of one output when its stream failed."""

    output_index: int
    text: str
    token_ids: tuple[int, ...]


class TwinjetClientError(Exception):
    """A call failed.

    code: the gRPC status by name. reason: the server's stable word for it, "" if the server gave none (then it
    was not Twinjet that answered). violations: field and message, for BadRequest. retry_after_s: seconds until
    a retry makes sense, None if not said. metadata: further facts by name. request_id: for logs and questions, ""
    if the call got none. outputs: what had come of each output before, by output_index.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "OK",
        reason: str = "",
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})
        self.request_id = request_id
        self.outputs: tuple[PartialOutput, ...] = ()
        super().__init__(f"{code}: {message}")

    @property
    def text(self) -> str:
        """Text of the first output that had come before, "" if none had."""
        return next((output.text for output in self.outputs if output.output_index == 0), "")


class BadRequest(TwinjetClientError):
    """A field of the request is wrong."""


class NotFound(TwinjetClientError):
    """No such model, adapter or request."""


class AlreadyExists(TwinjetClientError):
    """The request id or adapter name is taken."""


class NotSupported(TwinjetClientError):
    """The model or its engine lacks a capability."""

    @property
    def capability(self) -> str:
        """Name of the capability, "" if the server did not say."""
        return self.metadata.get("capability", "")


class AccessDenied(TwinjetClientError):
    """The caller may not do this."""


class Overloaded(TwinjetClientError):
    """The queue is full or a quota is spent."""


class Unavailable(TwinjetClientError):
    """The model is loading, draining or dead, or the server cannot be reached."""


class DeadlinePassed(TwinjetClientError):
    """The call's deadline passed."""


class Cancelled(TwinjetClientError):
    """The call was cancelled, by this client or by an operator."""


class PreconditionFailed(TwinjetClientError):
    """The call cannot be done in the present state, of the server or of its own output; reason says why."""


class ServerFailure(TwinjetClientError):
    """The server's fault."""


class IncompleteStream(TwinjetClientError):
    """The stream ended with OK but without a summary: something on the way cut it."""


class StreamConsumed(RuntimeError):
    """A stream is read a second time; its events come once."""


_KINDS: Mapping[grpc.StatusCode, type[TwinjetClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlinePassed,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionFailed,
    grpc.StatusCode.ABORTED: PreconditionFailed,
}


def from_rpc_error(error: grpc.RpcError, address: str = "") -> TwinjetClientError:
    """Translate gRPC's error, reading the google.rpc details that came with it. address: of the server, for words."""
    # Both of gRPC's error classes are calls as well, and carry the status.
    call: Any = error
    code: grpc.StatusCode = call.code()
    packed = _first(call.trailing_metadata(), _DETAILS_KEY) or b""
    violations: list[Violation] = []
    reason, metadata, retry_after_s = "", {}, None
    for kind, detail in details(packed):
        if kind == "BadRequest":
            violations += [Violation(v.field, v.description) for v in detail.field_violations]
        elif kind == "ErrorInfo":
            reason, metadata = detail.reason, dict(detail.metadata)
        elif kind == "RetryInfo":
            retry_after_s = detail.retry_delay.ToNanoseconds() / 1e9
    message = call.details() or ""
    if not packed and address:
        message = _explained(code, message, address)
    return _KINDS.get(code, ServerFailure)(
        message,
        code=code.name,
        reason=reason,
        violations=violations,
        retry_after_s=retry_after_s,
        metadata=metadata,
        request_id=_first(getattr(call, "initial_metadata", tuple)(), _REQUEST_ID_KEY) or "",
    )


_HINTS = (
    ("Failed parsing HTTP/2", "no gRPC server is there, or one that wants TLS"),
    ("SSL", "perhaps it does not speak TLS, or its certificate is not trusted"),
    ("Handshake", "perhaps it does not speak TLS, or its certificate is not trusted"),
    ("Connection refused", "is it running, and is this its port?"),
    ("Domain name not found", "there is no such name"),
)
"""What gRPC says when no server has answered, and what it mostly means."""


def _explained(code: grpc.StatusCode, message: str, address: str) -> str:
    """Say in plain words what gRPC itself reports, without a server of ours."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the deadline passed before the server at {address} had finished"
    if code is not grpc.StatusCode.UNAVAILABLE:
        return message
    is_lost = "GOAWAY" in message or "Stream removed" in message or "Socket closed" in message
    if is_lost and not message.startswith("failed to connect"):
        return f"the connection to the server at {address} was lost ({message})"
    hint = next((hint for said, hint in _HINTS if said in message), "")
    return f"the server at {address} cannot be reached{hint and ': ' + hint} ({message})"


def _first(metadata: Any, key: str) -> Any:
    return next((v for k, v in metadata or () if k == key), None)
