"""One stream of Envoy's for each HTTP request: reads as much of it as a decision needs, and gives it all back."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import grpc

from twinjet._core import EppPrompt, read_processing_request
from twinjet.addresses import address_of_source
from twinjet.epp import wire
from twinjet.epp.frames import FrameError, FrameReader
from twinjet.epp.picking import Ask, EndpointPicker, Pick
from twinjet.errors import Overloaded, TwinjetError
from twinjet.server.status import DETAILS_KEY, to_failure

if TYPE_CHECKING:
    from twinjet.epp.metrics import EppMetrics
    from twinjet.epp.settings import PickingSettings
    from twinjet.server.doors import HandlerRegistry

logger = logging.getLogger("twinjet.epp")

_PREFIX: Final = "/twinjet.v1.InferenceService/"
_READ_METHODS: Final = ("Generate", "Chat")

Tokenise = Callable[[EppPrompt, bytes, str, str], Awaitable[bytes | None]]
"""(prompt, message, method, client address) -> token ids as int32s, or None where there is no tokenizer for the model."""


class ExtProc:
    """envoy.service.ext_proc.v3.ExternalProcessor."""

    def __init__(
        self,
        picker: EndpointPicker,
        settings: PickingSettings,
        metrics: EppMetrics,
        tokenise: Tokenise | None,
    ) -> None:
        self.picker = picker
        self.settings = settings
        self.metrics = metrics
        self.tokenise = tokenise

    def add_to(self, server: HandlerRegistry) -> None:
        """Answer Process, on bytes."""
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(self._process)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(wire.SERVICE_NAME, {"Process": handler}),)
        )

    async def _process(self, _: Any, context: Any) -> None:
        stream = _Stream(self, context)
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                await stream.take(data)
        except ValueError as error:
            logger.warning("a message of Envoy's cannot be read: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            stream.end()


class _Stream:
    """The state of one request on its way."""

    def __init__(self, parent: ExtProc, context: Any) -> None:
        self._parent = parent
        self._context = context
        self._mode = self._response_mode = wire.FULL_DUPLEX_STREAMED
        self._method = ""
        self._allowed: list[str] | None = None
        self._client_address = ""
        self._frames: FrameReader | None = None
        self._held: list[tuple[bytes, bool]] = []
        self._pick: Pick | None = None
        self._is_decided = False
        self._are_headers_held = False
        self._is_refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._late: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._spent_s = 0.0

    async def take(self, data: bytes) -> None:
        """Answer one message. Raises ValueError if it cannot be read."""
        kind, ends, headers, body, mode, response_mode, allowed, source = read_processing_request(data)
        async with self._writing:
            if self._is_refused:
                return
            match kind:
                case wire.REQUEST_HEADERS:
                    if mode >= 0:
                        self._mode, self._response_mode = mode, response_mode
                    self._allowed = allowed
                    if source:
                        self._client_address = address_of_source(
                            source, self._parent.settings.client_ipv6_prefix
                        )
                    await self._take_headers(headers, ends=ends)
                case wire.REQUEST_BODY:
                    await self._take_body(body, ends=ends)
                case wire.REQUEST_TRAILERS:
                    await self._decide()
                    await self._write(wire.REQUEST_TRAILERS_GO_ON)
                case wire.RESPONSE_HEADERS:
                    await self._write(wire.RESPONSE_HEADERS_GO_ON)
                case wire.RESPONSE_BODY:
                    if self._response_mode == wire.FULL_DUPLEX_STREAMED:
                        await self._give_back(wire.response_body, body, ends=ends)
                    else:
                        await self._write(wire.RESPONSE_BODY_GOES_ON)
                case wire.RESPONSE_TRAILERS:
                    await self._write(wire.RESPONSE_TRAILERS_GO_ON)

    def end(self) -> None:
        """Envoy has ended the stream: the request is over."""
        if self._timer is not None:
            self._timer.cancel()
        if self._late is not None:
            self._late.cancel()
        if self._pick is not None:
            self._parent.picker.finish(self._pick)
            self._pick = None

    async def _take_headers(self, headers: dict[str, str], *, ends: bool) -> None:
        path = headers.get(":path", "")
        method = path.removeprefix(_PREFIX)
        if method is not path and method in _READ_METHODS:
            self._method = method
        has_body = not ends and self._mode != wire.NONE
        if self._method and has_body and self._mode != wire.STREAMED:
            settings = self._parent.settings
            self._frames = FrameReader(headers.get("grpc-encoding", ""), settings.max_body_bytes)
            if self._mode == wire.FULL_DUPLEX_STREAMED:
                self._are_headers_held = True
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(settings.decide_s, self._is_late)
                return
            # Envoy sends the body of such a mode when the headers have been answered, and holds both back.
            await self._write(wire.request_headers())
            return
        self._are_headers_held = True
        await self._decide()

    async def _take_body(self, body: bytes, *, ends: bool) -> None:
        if self._frames is not None:
            self._frames.add(body)
        if self._mode in (wire.BUFFERED, wire.BUFFERED_PARTIAL):
            if self._is_decided:
                await self._write(wire.buffered_body())
            await self._decide()
            return
        if self._mode == wire.STREAMED:
            await self._write(wire.buffered_body())
            return
        if self._is_decided:
            await self._give_back(wire.request_body, body, ends=ends)
            return
        self._held.append((body, ends))
        if ends or self._frames is None or self._frames.has_enough:
            await self._decide()

    def _is_late(self) -> None:
        """The body takes too long to come: what has come must do."""

        async def decide() -> None:
            async with self._writing:
                await self._decide()

        self._late = asyncio.ensure_future(decide())
        self._late.add_done_callback(_log_late)

    async def _decide(self) -> None:
        if self._is_decided:
            return
        self._is_decided = True
        if self._timer is not None:
            self._timer.cancel()
        began = time.perf_counter()
        ask = await self._ask()
        try:
            self._pick = self._parent.picker.pick(ask)
        except TwinjetError as error:
            await self._refuse(error)
            return
        finally:
            self._parent.metrics.observe_pick(time.perf_counter() - began)
        self._parent.metrics.count_pick(self._pick, is_read=ask.prompt is not None)
        destination = self._pick.destination
        if self._are_headers_held:
            await self._write(wire.request_headers(destination))
        else:
            await self._write(wire.buffered_body(destination))
        for body, ends in self._held:
            await self._give_back(wire.request_body, body, ends=ends)
        self._held.clear()

    async def _ask(self) -> Ask:
        ask = Ask(allowed=self._allowed, client_address=self._client_address)
        if self._frames is None:
            return ask
        try:
            message = self._frames.message()
            prompt = EppPrompt(message, self._method)
        except (FrameError, ValueError) as error:
            # The replica tells the client what is wrong.
            logger.debug("a request cannot be read and goes by load alone: %s", error)
            return ask
        finally:
            self._frames = None
        token_ids = None
        if self._parent.tokenise is not None and not prompt.has_token_ids:
            token_ids = await self._parent.tokenise(prompt, message, self._method, self._client_address)
        return replace(ask, prompt=prompt, token_ids=token_ids)

    async def _refuse(self, error: TwinjetError) -> None:
        self._is_refused = True
        failure = to_failure(error)
        details = base64.b64encode(dict(failure.trailing_metadata)[DETAILS_KEY]).decode().rstrip("=")
        http_status = 429 if isinstance(error, Overloaded) else 503
        self._parent.metrics.count_refusal(failure.code.name)
        self._held.clear()
        await self._write(
            wire.immediate(http_status, failure.code.value[0], failure.message, [(DETAILS_KEY, details)])
        )

    async def _give_back(self, make: Callable[..., bytes], body: bytes, *, ends: bool) -> None:
        for place in range(0, max(len(body), 1), wire.MAX_CHUNK):
            piece = body[place : place + wire.MAX_CHUNK]
            await self._write(make(piece, ends=ends and place + wire.MAX_CHUNK >= len(body)))

    async def _write(self, message: bytes) -> None:
        await self._context.write(message)


def _log_late(task: asyncio.Task[None]) -> None:
    # Envoy may have ended the stream meanwhile.
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.debug("a late decision came to nothing: %s", error)
