"""Maps our exceptions to gRPC statuses with google.rpc details."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from twinjet import errors
from twinjet.routing import RevisionChanged

DOMAIN = "twinjet"
DETAILS_KEY = "grpc-status-details-bin"
MAX_VIOLATIONS = 16
MAX_TEXT_BYTES = 512
MAX_DETAIL_BYTES = 200
"""Message and details travel in trailers, encoded, which gRPC limits to 8 KiB by default."""


class Failure:
    """A status ready to send: code, message and trailing metadata."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Iterable[Message]) -> None:
        self.code = code
        self.message = _short(message)
        status = status_pb2.Status(code=code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        self.trailing_metadata = ((DETAILS_KEY, status.SerializeToString()),)


def to_failure(error: errors.TwinjetError) -> Failure:
    """Give the status for one of our exceptions."""
    code = grpc.StatusCode
    match error:
        case errors.InvalidRequest():
            return Failure(code.INVALID_ARGUMENT, str(error), [_info("INVALID_REQUEST"), _bad_request(error)])
        case errors.NotFound():
            reason = f"{error.kind.upper()}_NOT_FOUND"
            resource = error_details_pb2.ResourceInfo(
                resource_type=error.kind, resource_name=_short(error.name, MAX_DETAIL_BYTES)
            )
            return Failure(code.NOT_FOUND, str(error), [_info(reason), resource])
        case errors.AlreadyExists():
            reason = f"{error.kind.upper()}_EXISTS"
            return Failure(code.ALREADY_EXISTS, str(error), [_info(reason)])
        case errors.PermissionRefused():
            return Failure(code.PERMISSION_DENIED, str(error), [_info("PERMISSION_REFUSED")])
        case errors.Unsupported():
            info = _info("CAPABILITY_MISSING", capability=error.capability)
            return Failure(code.UNIMPLEMENTED, str(error), [info])
        case errors.Overloaded():
            details = [_info("QUOTA_SPENT" if error.quotas else "OVERLOADED"), _retry(error.retry_after_s)]
            if error.quotas:
                details.append(_quota_failure(error))
            return Failure(code.RESOURCE_EXHAUSTED, str(error), details)
        case errors.SlowReader():
            return Failure(code.RESOURCE_EXHAUSTED, str(error), [_info("SLOW_READER")])
        case errors.EngineDied(was_running=True):
            # Without RetryInfo: the same request may end the next engine too.
            return Failure(code.UNAVAILABLE, str(error), [_info(error.reason)])
        case errors.Unavailable():
            return Failure(code.UNAVAILABLE, str(error), [_info(error.reason), _retry(error.retry_after_s)])
        case errors.PreconditionFailed():
            return Failure(code.FAILED_PRECONDITION, str(error), [_info(error.reason)])
        case RevisionChanged():
            info = _info("REVISION_CHANGED", revision=str(error.current))
            return Failure(code.ABORTED, str(error), [info])
        case errors.DeadlinePassed():
            return Failure(code.DEADLINE_EXCEEDED, str(error), [_info(error.reason)])
        case errors.RequestAborted():
            return Failure(code.CANCELLED, str(error), [_info("ABORTED")])
        case errors.NoAdmissibleToken():
            return Failure(code.FAILED_PRECONDITION, str(error), [_info(error.reason)])
        case errors.RequestFailed():
            return Failure(code.INTERNAL, str(error), [_info(error.reason)])
        case _:
            return internal_failure()


def overload_failure() -> Failure:
    """Give the status of a call refused for load before any handler sees it."""
    return to_failure(errors.Overloaded("the server has more to do than it can bear", retry_after_s=1))


def shutdown_failure() -> Failure:
    """Give the status of a call that comes, or still runs, when the server ends."""
    return to_failure(errors.Unavailable("the server is shutting down", reason="DRAINING", retry_after_s=1))


def internal_failure() -> Failure:
    """Give the status for what should not have happened; it tells the client nothing of our insides."""
    return Failure(grpc.StatusCode.INTERNAL, "internal error; the server's log has more", [_info("INTERNAL")])


def _short(text: str, most: int = MAX_TEXT_BYTES) -> str:
    encoded = text.encode(errors="replace")
    return encoded.decode() if len(encoded) <= most else encoded[: most - 3].decode(errors="ignore") + "…"


def _info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(max(seconds, 0.001) * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _bad_request(error: errors.InvalidRequest) -> error_details_pb2.BadRequest:
    violations = [
        error_details_pb2.BadRequest.FieldViolation(
            field=_short(v.field, MAX_DETAIL_BYTES), description=_short(v.message, MAX_DETAIL_BYTES)
        )
        for v in error.violations[:MAX_VIOLATIONS]
    ]
    return error_details_pb2.BadRequest(field_violations=violations)


def _quota_failure(error: errors.Overloaded) -> error_details_pb2.QuotaFailure:
    violations = [
        error_details_pb2.QuotaFailure.Violation(
            subject=_short(q.subject, MAX_DETAIL_BYTES), description=q.description
        )
        for q in error.quotas
    ]
    return error_details_pb2.QuotaFailure(violations=violations)
