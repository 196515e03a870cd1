"""What a call can end with, as exceptions.

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
├── ServerFailure      everything else: the server's fault
└── IncompleteStream   the stream ended well but without a summary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from twinjet.errors import Violation

_DETAILS_KEY = "grpc-status-details-bin"


class TwinjetClientError(Exception):
    """A call failed.

    code: the gRPC status by name. reason: the server's stable word for it, "" if the server gave none (then it
    was not Twinjet that answered). violations: field and message, for BadRequest. retry_after_s: seconds until
    a retry makes sense, None if not said. metadata: further facts by name.
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
    ) -> None:
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})
        super().__init__(f"{code}: {message}")


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


class ServerFailure(TwinjetClientError):
    """The server's fault."""


class IncompleteStream(TwinjetClientError):
    """The stream ended with OK but without a summary: something on the way cut it."""


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
}


def from_rpc_error(error: grpc.RpcError) -> TwinjetClientError:
    """Translate gRPC's error, reading the google.rpc details that came with it."""
    # Both of gRPC's error classes are calls as well, and carry the status.
    call: Any = error
    code: grpc.StatusCode = call.code()
    packed = next((v for k, v in call.trailing_metadata() or () if k == _DETAILS_KEY), b"")
    violations: list[Violation] = []
    reason, metadata, retry_after_s = "", {}, None
    bad, info, retry = (
        error_details_pb2.BadRequest(),
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RetryInfo(),
    )
    for detail in _details(packed):
        if detail.Unpack(bad):
            violations += [Violation(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return _KINDS.get(code, ServerFailure)(
        call.details() or "",
        code=code.name,
        reason=reason,
        violations=violations,
        retry_after_s=retry_after_s,
        metadata=metadata,
    )


def _details(packed: bytes) -> list[Any]:
    # What stands there may come from a proxy; unreadable details are no details.
    try:
        return list(status_pb2.Status.FromString(packed).details)
    except DecodeError:
        return []
