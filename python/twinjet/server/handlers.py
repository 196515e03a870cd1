"""Hangs servicers on a gRPC server: parsing that never fails silently, one place that maps errors, metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from twinjet.errors import InvalidRequest, TwinjetError
from twinjet.server.status import Failure, internal_failure, to_failure
from twinjet.server.wire import Malformed, deserializer

if TYPE_CHECKING:
    from twinjet.server.doors import HandlerRegistry
    from twinjet.server.load_reports import LoadReports
    from twinjet.server.metrics import Metrics

logger = logging.getLogger("twinjet.server")

COUNTED = frozenset({"Generate", "Chat", "Embed"})
"""Methods that the load reports' rates are about."""


class ErrorTold(Exception):
    """A stream has told its failure in a message of its own and ends with OK; error counts in the load reports."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


Behaviour = Callable[[Any, Any], Awaitable[Any]]


def add_service(
    server: HandlerRegistry,
    service: ServiceDescriptor,
    servicer: object,
    metrics: Metrics,
    load_reports: LoadReports,
) -> None:
    """Register every method of a service; the servicer has a coroutine of the same name for each."""
    handlers = {
        method.name: _handler(method, getattr(servicer, method.name), metrics, load_reports)
        for method in service.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _handler(
    method: MethodDescriptor, behaviour: Behaviour, metrics: Metrics, load_reports: LoadReports
) -> grpc.RpcMethodHandler[Any, Any]:
    make = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(
        guarded(method.name, behaviour, metrics, load_reports),
        request_deserializer=deserializer(message_factory.GetMessageClass(method.input_type)),
        response_serializer=_serialize,
    )


def _serialize(message: Any) -> bytes:
    """Streams write ready bytes; everything else is a message."""
    return message if type(message) is bytes else message.SerializeToString()


def guarded(name: str, behaviour: Behaviour, metrics: Metrics, load_reports: LoadReports) -> Behaviour:
    """Wrap a method so that every failure becomes one status with details, and every call reports the load."""

    async def call(request: Any, context: Any) -> Any:
        code = "CANCELLED"
        try:
            response, failure, error = await _run(name, behaviour, request, context)
            code = "OK" if failure is None else failure.code.name
        finally:
            metrics.count_call(name, code)
        if name in COUNTED:
            load_reports.count(error)
        trailer = load_reports.trailer()
        if failure is not None:
            # grpc.aio keeps what abort raises, and with it this frame, until the garbage collector comes.
            del request
            # Outside of any try: abort raises, and must not be caught again.
            await context.abort(failure.code, failure.message, (*failure.trailing_metadata, *trailer))
        context.set_trailing_metadata(trailer)
        return response

    return call


async def _run(
    name: str, behaviour: Behaviour, request: Any, context: Any
) -> tuple[Any, Failure | None, BaseException | None]:
    try:
        if isinstance(request, Malformed):
            raise InvalidRequest(request.violations)
        return await behaviour(request, context), None, None
    except TwinjetError as error:
        failure = to_failure(error)
        # As short as the client hears of it: names of a request's own may be megabytes.
        logger.info("%s: %s: %s", name, type(error).__name__, failure.message)
        _forget_frames(error)
        return None, failure, error
    except ErrorTold as told:
        logger.info("%s: %s: %s", name, type(told.error).__name__, told)
        _forget_frames(told)
        _forget_frames(told.error)
        return None, None, told.error
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        if isinstance(first, TwinjetError):
            for one in (group, *group.exceptions):
                _forget_frames(one)
            return None, to_failure(first), first
        if isinstance(first, grpc.aio.BaseError):
            raise asyncio.CancelledError from None  # as below
        logger.exception("%s failed", name)
        return None, internal_failure(), group
    except asyncio.CancelledError:
        raise
    except grpc.aio.BaseError:
        # A write found the connection gone before gRPC had cancelled this handler.
        raise asyncio.CancelledError from None
    except Exception as error:
        logger.exception("%s failed", name)
        return None, internal_failure(), error


def _forget_frames(error: BaseException | None) -> None:
    """Let go of the frames that an error came through: with those that raised it they are cycles, in which requests of
    megabytes would wait for the garbage collector."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))  # an error may be its own cause
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
