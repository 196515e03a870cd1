"""Services that are not ours, whose parsers raise: gRPC's library would take that for a fault of ours and log a traceback."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from twinjet.errors import InvalidRequest
from twinjet.server.status import to_failure

if TYPE_CHECKING:
    from twinjet.server.doors import HandlerRegistry

    _Handler = grpc.RpcMethodHandler[Any, Any]

logger = logging.getLogger("twinjet.server")

NOT_A_MESSAGE = to_failure(InvalidRequest.of("request", "not a valid message of its type"))

_BAD = object()


class LenientRegistry:
    """Hangs handlers on a door that answer bytes which they cannot parse with INVALID_ARGUMENT; see HandlerRegistry."""

    def __init__(self, door: HandlerRegistry) -> None:
        self._door = door

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        self._door.add_generic_rpc_handlers(tuple(map(_LenientHandlers, generic_rpc_handlers)))

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        made = {name: lenient(handler) for name, handler in method_handlers.items()}
        self._door.add_registered_method_handlers(service_name, made)


class _LenientHandlers(grpc.GenericRpcHandler):
    def __init__(self, handlers: grpc.GenericRpcHandler) -> None:
        self._handlers = handlers
        self._made: dict[str, _Handler] = {}

    def service(self, handler_call_details: Any) -> _Handler | None:
        path = handler_call_details.method
        if (made := self._made.get(path)) is None:
            handler = self._handlers.service(handler_call_details)
            if handler is None:
                return None
            made = self._made[path] = lenient(handler)
        return made


def lenient(handler: _Handler) -> _Handler:
    """Make a handler that aborts with INVALID_ARGUMENT where the given one's request cannot be parsed."""
    if handler.request_deserializer is None:
        return handler
    kind = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    made: _Handler = make(
        _checked(getattr(handler, kind), is_streaming=handler.request_streaming),
        request_deserializer=_parser(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )
    return made


def _parser(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception as error:  # noqa: BLE001 - parsers raise what they like
            logger.info("a request could not be parsed: %s", error)
            return _BAD

    return parse


def _checked(behaviour: Callable[[Any, Any], Any], *, is_streaming: bool) -> Callable[[Any, Any], Any]:
    async def look(argument: Any, context: Any) -> Any:
        if is_streaming:
            return _look_at_each(argument, context)
        if argument is _BAD:
            await _abort(context)
        return argument

    # gRPC's library tells by their kind how to call them.
    if inspect.isasyncgenfunction(behaviour):

        async def answers(argument: Any, context: Any) -> AsyncIterator[Any]:
            async for answer in behaviour(await look(argument, context), context):
                yield answer

        return answers

    async def answer(argument: Any, context: Any) -> Any:
        return await behaviour(await look(argument, context), context)

    return answer


async def _look_at_each(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _BAD:
            await _abort(context)
        yield request


async def _abort(context: Any) -> None:
    await context.abort(NOT_A_MESSAGE.code, NOT_A_MESSAGE.message, NOT_A_MESSAGE.trailing_metadata)
