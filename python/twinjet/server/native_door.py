"""gRPC on the native door: gives its calls to the handlers that grpc.aio would have, on the asyncio loop.

Bytes and HTTP/2 are csrc/door's; here is a context of grpc.aio's shape for each call, and one task for each
handler. Handlers must be coroutine functions or asynchronous generators.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from twinjet.errors import ConfigError, DeadlinePassed, InvalidRequest
from twinjet.server.binding import server_credentials, why_not
from twinjet.server.gate import STREAM_PATHS, full
from twinjet.server.native_channelz import NativeChannelz
from twinjet.server.status import Failure, internal_failure, overload_failure, shutdown_failure, to_failure

if TYPE_CHECKING:
    from twinjet import _core
    from twinjet.config import ServerSettings
    from twinjet.server.inference import Sharing
    from twinjet.server.load_reports import LoadReports
    from twinjet.server.plain import PlainCalls, PlainItem

    _Base = grpc.aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]
else:
    _Base = grpc.aio.ServicerContext

logger = logging.getLogger("twinjet.server")

_CALL, _MESSAGE, _HALF_CLOSED, _CANCELLED, _ROOM, _REFUSED = range(6)
_WRITES_A_TURN = 32
"""After so many writes that did not have to wait a handler lets the others go on."""
_CLEANUP_S = 10.0
"""How long cancelled handlers may take to clean up."""
_LINGER_S = 1.0
"""How long the answers of ended calls may take to leave when the door stops."""
_TLS_CHECK_S = 5.0
"""How often the TLS files are looked at."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def is_available() -> bool:
    """Whether this build has the native door."""
    from twinjet import _core

    return hasattr(_core, "Door")


class _CallDetails(grpc.HandlerCallDetails):
    def __init__(self, method: str, invocation_metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata


class CallContext(_Base):
    """What a handler knows of its call and can do about it; see grpc.aio.ServicerContext."""

    def __init__(
        self,
        call: _core.DoorCall,
        handler: _Handler,
        peer: str,
        metadata: tuple[tuple[str, str | bytes], ...],
        timeout_s: float | None,
        *,
        accepts_gzip: bool,
        is_tls: bool,
    ) -> None:
        self._call = call
        self._handler = handler
        self._peer = peer
        self._metadata = metadata
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._accepts_gzip = accepts_gzip
        self._is_tls = is_tls
        self._requests: deque[bytes] = deque()
        self._is_half_closed = False
        self._arrival: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._num_writes = 0
        self._are_headers_sent = False
        self._is_finished = False
        self._is_cancelled = False
        self._code: int | None = None
        self._details = ""
        self._trailers: Any = ()
        self._callbacks: list[Callable[[Any], None]] = []
        self.task: asyncio.Task[None] | None = None

    # What the door tells.

    def put_request(self, data: bytes) -> None:
        self._requests.append(data)
        _wake(self._arrival)

    def half_close(self) -> None:
        self._is_half_closed = True
        _wake(self._arrival)

    def give_room(self) -> None:
        _wake(self._room)

    def cancel(self) -> None:
        """The client or the door has ended the call."""
        self._is_cancelled = True
        if self.task is not None:
            self.task.cancel()
        self._run_callbacks()

    def resume(self) -> None:
        """The call was begun elsewhere: its request is known and its initial metadata sent."""
        self._are_headers_sent = True
        self._requests.append(b"")

    # What handlers use.

    async def read(self) -> Any:
        while not self._requests:
            if self._is_half_closed:
                return grpc.aio.EOF
            self._arrival = asyncio.get_running_loop().create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None
        return self.take_request()

    def take_request(self) -> Any:
        """The oldest message that waits, which there must be."""
        data = self._requests.popleft()
        self._call.acknowledge(len(data))
        deserialize = self._handler.request_deserializer
        if deserialize is None:
            return data
        try:
            return deserialize(data)
        except Exception as error:  # noqa: BLE001 - parsers raise what they like
            logger.info("a request could not be parsed: %s", error)
            raise _BadRequest from None

    async def write(self, message: Any) -> None:
        self._must_be_open()
        serialize = self._handler.response_serializer
        self._are_headers_sent = True
        must_wait = self._call.write(message if serialize is None else serialize(message))
        if must_wait:
            self._room = asyncio.get_running_loop().create_future()
            try:
                await self._room
            finally:
                self._room = None
            return
        self._num_writes += 1
        if self._num_writes % _WRITES_A_TURN == 0:
            await asyncio.sleep(0)

    def carry(self, stream: _core.Stream) -> None:
        """Send what steps put into the stream without waking its handler; headers must have been sent."""
        assert self._are_headers_sent, "the initial metadata comes first"
        self._call.carry(stream)

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        self._must_be_open()
        if self._are_headers_sent:
            raise grpc.aio.UsageError("the initial metadata has been sent already")
        self._call.send_headers(_pairs(initial_metadata))
        self._are_headers_sent = True

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        if code is grpc.StatusCode.OK:
            logger.error("a handler aborted a call with OK")
            code = grpc.StatusCode.UNKNOWN
        self._code, self._details = code.value[0], details
        if trailing_metadata:
            self._trailers = trailing_metadata
        self.finish()
        raise grpc.aio.AbortError("the handler aborted the call")

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def finish(self, code: grpc.StatusCode | None = None, details: str | None = None) -> None:
        """End the call with the given status, or with the one that was set."""
        if self._is_finished:
            return
        self._is_finished = True
        if code is not None:
            self._code = code.value[0]
        self._call.finish(
            self._code or 0, self._details if details is None else details, _pairs(self._trailers)
        )
        self._run_callbacks()

    def fail(self, failure: Failure) -> None:
        """End the call with one of the door's own statuses."""
        self._trailers = failure.trailing_metadata
        self.finish(failure.code, failure.message)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._trailers = trailing_metadata

    def trailing_metadata(self) -> Any:
        return self._trailers

    def invocation_metadata(self) -> Any:
        return self._metadata

    def set_code(self, code: grpc.StatusCode | int) -> None:
        self._code = code.value[0] if isinstance(code, grpc.StatusCode) else code

    def code(self) -> Any:
        return self._code or 0

    def set_details(self, details: str) -> None:
        self._details = details

    def details(self) -> str:
        return self._details

    def set_compression(self, compression: grpc.Compression) -> None:
        if self._are_headers_sent:
            raise grpc.aio.UsageError("the compression must be set before anything is sent")
        if compression is not grpc.Compression.NoCompression and self._accepts_gzip:
            self._call.compress()

    def disable_next_message_compression(self) -> None:
        raise NotImplementedError("the native door compresses all messages of a call or none")

    def peer(self) -> str:
        return self._peer

    def peer_identities(self) -> Any:
        return None

    def peer_identity_key(self) -> str | None:
        return None

    def auth_context(self) -> Mapping[str, Any]:
        return {"transport_security_type": [b"ssl"]} if self._is_tls else {}

    def time_remaining(self) -> Any:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        return self._is_cancelled

    def done(self) -> bool:
        return self._is_finished or self._is_cancelled

    def _run_callbacks(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def _must_be_open(self) -> None:
        if self._is_cancelled or self._call.is_over:
            raise CallIsOver("the client has ended the call")
        if self._is_finished:
            raise grpc.aio.UsageError("the call has its status already")

    # Running a handler.

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    async def run(self) -> None:
        """Run the handler to its end, and give the call a status whatever happens."""
        try:
            await self._serve()
            self.finish()
        except grpc.aio.AbortError:
            pass
        except CallIsOver:
            pass
        except _BadRequest:
            self.fail(_bad_request("not a valid message of its type"))
        except asyncio.CancelledError:
            if not self.done():
                self.finish(grpc.StatusCode.CANCELLED, "the server cancelled the call")
            raise
        except Exception as error:
            logger.exception("a handler failed")
            self.finish(grpc.StatusCode.UNKNOWN, f"unexpected {type(error).__name__}")

    async def _serve(self) -> None:
        handler = self._handler
        if handler.request_streaming:
            behaviour: Any = handler.stream_stream if handler.response_streaming else handler.stream_unary
            argument: Any = self._read_all()
        else:
            behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
            argument = self.take_request()
        answer = behaviour(argument, self)
        if not handler.response_streaming:
            response = await answer
            if not self._code:
                await self.write(response)
        elif inspect.isasyncgen(answer):
            # Closed here and not by the garbage collector when the call is cancelled.
            async with contextlib.aclosing(answer):
                async for response in answer:
                    await self.write(response)
        else:
            await answer

    async def _read_all(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message


class CallIsOver(grpc.aio.BaseError):
    """A handler wrote to a call that its client has ended; its task is about to be cancelled."""


class _BadRequest(Exception):
    """Bytes that a deserializer did not take."""


class NativeDoor:
    """Serves handlers through csrc/door; see doors.Door."""

    name = "native"

    def __init__(self, settings: ServerSettings) -> None:
        from twinjet import _core

        self._settings = settings
        self._door = _core.Door(
            num_threads=settings.door_threads,
            max_message_bytes=settings.max_request_bytes,
            max_streams=settings.max_connection_calls,
            max_connections=settings.max_connections,
            max_address_connections=settings.max_connections_per_address,
            client_ipv6_prefix=settings.client_ipv6_prefix,
            keepalive_s=settings.keepalive_s,
            keepalive_timeout_s=settings.keepalive_timeout_s,
            client_ping_s=settings.client_ping_s,
            linger_s=settings.stalled_reader_s,
            max_unsent_bytes=max(4 * settings.max_pending_bytes, 64 << 20),
            overload=_own_status(overload_failure()),
            deadline=_own_status(to_failure(DeadlinePassed("the deadline has passed"))),
            # As the gate would, but before Python hears of it.
            bounded_paths=list(STREAM_PATHS),
            max_open=settings.max_streams,
            full=_own_status(to_failure(full(settings.max_streams))),
        )
        self._tell_refused: Callable[[str, int], None] = _nothing
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._by_path: dict[str, _Handler] = {}
        self._calls: dict[int, CallContext] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._plain: PlainCalls | None = None
        self._is_stopping = False
        self._address = ""
        self._tls_files: tuple[Path, ...] = ()
        self._tls_times: tuple[int, ...] = ()
        self._tls_watch: asyncio.Task[None] | None = None

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        self._handlers.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """Called by generated code, which gives the same handlers as generic ones, too."""

    def watch_refusals(self, tell: Callable[[str, int], None]) -> None:
        """Call tell with the method and number of streams that the door refuses by itself, max_streams being open."""
        self._tell_refused = tell

    def channelz_servicer(self) -> NativeChannelz:
        return NativeChannelz(lambda: self._address, self._door.totals, self._door.connections)

    def take_plain_calls(self, sharing: Sharing, load_reports: LoadReports) -> None:
        from twinjet.server import plain

        self._plain = plain.PlainCalls(sharing, load_reports, self._door, self._go_on)
        self._door.pick_plain(plain.PATH)

    def bind(self) -> str:
        """Listen on the settings' address and give it. Raises ConfigError."""
        settings = self._settings
        files = (settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        self._tls_files = tuple(file for file in files if file is not None)
        if self._tls_files:
            self._use_tls()
        try:
            port = self._door.listen(settings.host, settings.port, bool(self._tls_files))
        except OSError as error:
            where = f"{settings.literal_host}:{settings.port}"
            raise ConfigError(f"cannot listen on {where}: {why_not(settings) or error}") from None
        self._address = f"{settings.literal_host}:{port}"
        return self._address

    async def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._door.fileno(), self._on_events)
        self._door.start()
        logger.info("the native door sends %s io_uring", "through" if self._door.has_ring else "without")
        if self._tls_files:
            self._tls_watch = asyncio.create_task(self._watch_tls(), name="tls")

    def send_away(self) -> None:
        """Tell clients to make new calls on other connections, which are still accepted."""
        self._door.drain()

    async def stop(self, grace_s: float) -> None:
        """Refuse calls, let the running ones go on for grace_s, end the rest and close all connections."""
        self._is_stopping = True
        for _, call_id, payload in self._door.stop_picking():
            self._begin(call_id, payload)
        self._door.drain()
        if grace_s > 0:
            await self._wait_for_calls(grace_s)
        if self._plain is not None:
            self._plain.end_all(shutdown_failure())
        for context in list(self._calls.values()):
            context.fail(shutdown_failure())
            context.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLEANUP_S)
        if self._tls_watch is not None:
            self._tls_watch.cancel()
            await asyncio.gather(self._tls_watch, return_exceptions=True)
        await asyncio.to_thread(self._door.stop, _LINGER_S)
        asyncio.get_running_loop().remove_reader(self._door.fileno())

    async def _wait_for_calls(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        if self._plain is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._plain.wait_idle()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(deadline - time.monotonic(), 0))

    def _on_events(self) -> None:
        # What is answered at once leaves together.
        self._door.hold()
        try:
            events, plain = self._door.take()
            left = self._take_plain(plain) if plain else ()
        finally:
            self._door.let_go()
        for call_id, call, *_ in left:
            try:
                self._serve_picked(call_id, call)
            except Exception:
                logger.exception("a call could not be begun")
                _refuse(call, internal_failure())
        for kind, call_id, payload in events:
            if kind == _CALL:
                try:
                    self._begin(call_id, payload)
                except Exception:  # one call's fault must not lose the events of the others
                    logger.exception("a call could not be begun")
                    _refuse(payload[0], internal_failure())
                continue
            if kind == _REFUSED:
                self._tell_refused(payload.rpartition("/")[2], call_id)
                continue
            context = self._calls.get(call_id)
            if context is None:
                if kind == _CANCELLED and self._plain is not None:
                    self._plain.cancel(call_id)
                continue
            if kind == _MESSAGE:
                context.put_request(payload)
                if context.task is None:
                    self._run(call_id, context)
            elif kind == _HALF_CLOSED:
                context.half_close()
                if context.task is None:
                    del self._calls[call_id]
                    context.fail(_bad_request("there is no message"))
            elif kind == _CANCELLED:
                if context.task is None:
                    del self._calls[call_id]
                context.cancel()
            else:
                context.give_room()

    def _take_plain(self, items: list[PlainItem]) -> list[PlainItem]:
        assert self._plain is not None, "without it none are picked"
        return items if self._is_stopping else self._plain.take(items)

    def _serve_picked(self, call_id: int, call: _core.PlainCall) -> None:
        """Serve a plain call as all others are."""
        payload, message = call.unpack()
        self._begin(call_id, payload)
        context = self._calls.get(call_id)
        if context is not None:
            context.put_request(message)
            self._run(call_id, context)

    def _go_on(
        self,
        call_id: int,
        call: _core.DoorCall,
        peer: str,
        behaviour: Callable[[Any, Any], Awaitable[Any]],
        on_done: Callable[[], None],
    ) -> None:
        """Let a handler finish a call whose initial metadata has been sent; on_done: called in any case."""
        handler: _Handler = grpc.unary_stream_rpc_method_handler(behaviour)
        context = CallContext(call, handler, peer, (), None, accepts_gzip=False, is_tls=bool(self._tls_files))
        context.resume()
        self._calls[call_id] = context
        self._run(call_id, context).add_done_callback(lambda _: on_done())

    def _begin(self, call_id: int, payload: Any) -> None:
        call, path, peer, metadata, timeout_s, accepts_gzip = payload
        if self._is_stopping:
            _refuse(call, shutdown_failure())
            return
        handler = self._find(path, metadata)
        if handler is None:
            call.finish(grpc.StatusCode.UNIMPLEMENTED.value[0], f"there is no method {path}", ())
            return
        context = CallContext(
            call, handler, peer, metadata, timeout_s, accepts_gzip=accepts_gzip, is_tls=bool(self._tls_files)
        )
        self._calls[call_id] = context
        if handler.request_streaming:
            self._run(call_id, context)

    def _find(self, path: str, metadata: Any) -> _Handler | None:
        found = self._by_path.get(path)
        if found is not None:
            return found
        details = _CallDetails(path, metadata)
        for generic in self._handlers:
            handler = generic.service(details)
            if handler is not None:
                self._by_path[path] = handler
                return handler
        return None

    def _run(self, call_id: int, context: CallContext) -> asyncio.Task[None]:
        task = asyncio.create_task(context.run())
        context.task = task
        self._tasks.add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            self._calls.pop(call_id, None)
            # A cancelled task keeps the frames that it left, and with them the request: no cycle for the garbage collector.
            context.task = None

        task.add_done_callback(forget)
        return task

    def _use_tls(self) -> None:
        """Raises ConfigError, or OSError for a file that vanishes meanwhile."""
        server_credentials(self._settings)  # names what is wrong with which file
        certificate, key, *client_ca = self._tls_files
        # Times first: a file that changes while it is read is read again.
        self._tls_times = _times(self._tls_files)
        texts = [file.read_bytes() for file in (certificate, key, *client_ca)]
        try:
            self._door.use_tls(*texts, *([] if client_ca else [b""]))
        except ValueError as error:
            raise ConfigError(f"server.tls_cert, server.tls_key: {error}") from None

    async def _watch_tls(self) -> None:
        """Take new TLS files into use when they have changed; keep the old ones while the new ones are unfit."""
        while True:
            await asyncio.sleep(_TLS_CHECK_S)
            try:
                if _times(self._tls_files) != self._tls_times:
                    self._use_tls()
                    logger.info("new TLS files are in use")
            except (OSError, ConfigError) as error:
                logger.warning("the new TLS files are not used: %s", error)


def _own_status(failure: Failure) -> tuple[str, bytes]:
    return failure.message, failure.trailing_metadata[0][1]


def _refuse(call: _core.DoorCall | _core.PlainCall, failure: Failure) -> None:
    call.finish(failure.code.value[0], failure.message, failure.trailing_metadata)


def _bad_request(what: str) -> Failure:
    return to_failure(InvalidRequest.of("request", what))


def _nothing(_: str, __: int) -> None:
    pass


def _times(files: Sequence[Path]) -> tuple[int, ...]:
    return tuple(file.stat().st_mtime_ns for file in files)


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


def _pairs(metadata: Any) -> list[tuple[str, str | bytes]]:
    return [(key, value) for key, value in metadata or ()]
