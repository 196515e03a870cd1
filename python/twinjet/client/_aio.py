"""The asyncio client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc

from twinjet.client._address import check_address, check_token
from twinjet.client._channel import CHANNEL_OPTIONS, call_metadata
from twinjet.client._errors import IncompleteStream, from_rpc_error
from twinjet.client._events import (
    Collector,
    Completion,
    Delta,
    Embeddings,
    Event,
    Summary,
    Tokens,
    event_of,
    usage_of,
)
from twinjet.client._health import wait_aio
from twinjet.client._requests import (
    Conversation,
    Message,
    Options,
    Prompt,
    chat_request,
    embed_request,
    generate_request,
    tokenize_request,
)
from twinjet.client._retry import Attempts, Pause, RetryPolicy
from twinjet.request import SamplingOverrides
from twinjet.v1 import admin_pb2, model_pb2, routing_pb2, service_pb2_grpc, tokenization_pb2

_Answer = TypeVar("_Answer")
_OpenStream = Callable[[float | None], Any]
_Wait = Callable[[Pause], Awaitable[None]]


class AsyncStream:
    """The events of one call, read once: `async for event in stream`, or text(), pieces(), completion().

    The call begins with the first read. Leaving `async with stream`, aclose() and cancelling the reading task cancel
    it, and the server stops working on it. Reading raises the exceptions of this package.
    """

    def __init__(self, open_stream: _OpenStream, wait: _Wait, attempts: Attempts) -> None:
        self._open = open_stream
        self._wait = wait
        self._attempts = attempts
        self._events = self._run()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the call if it still runs."""
        await self._events.aclose()

    async def pieces(self, output_index: int = 0) -> AsyncIterator[str]:
        """Give the text of one output as it comes."""
        async with self:
            async for event in self:
                if isinstance(event, Delta) and event.output_index == output_index and event.text:
                    yield event.text

    async def text(self) -> str:
        """Read to the end and give the text of the first output."""
        return (await self.completion()).text

    async def completion(self) -> Completion:
        """Read to the end and give everything."""
        collector = Collector()
        async with self:
            async for event in self:
                collector.add(event)
        return collector.completion()

    async def _run(self) -> AsyncGenerator[Event, None]:
        while True:
            call = self._open(self._attempts.remaining_s)
            last: Event | None = None
            has_begun = False
            try:
                while (message := await call.read()) is not grpc.aio.EOF:
                    has_begun = True
                    if isinstance(last, Summary):
                        raise IncompleteStream("an event came after the summary")
                    if (event := event_of(message)) is not None:
                        last = event
                        # The summary is handed out once the status behind it has come and is OK.
                        if not isinstance(event, Summary):
                            yield event
                if not isinstance(last, Summary):
                    raise IncompleteStream("the stream ended without a summary")
                yield last
                return
            except grpc.aio.AioRpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            finally:
                call.cancel()
            if has_begun:
                raise error
            await self._wait(self._attempts.pause_after(error))


class AsyncClient:
    """A connection to a Twinjet server, for one event loop. Close it, or use `async with`.

    address: host:port. credentials: for TLS, None is plain text. token: the admin token. retry: when to try again.
    timeout_s: deadline of calls that name none; None is no deadline.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str = "",
        retry: RetryPolicy | None = None,
        timeout_s: float | None = None,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        check_address(address)
        check_token(token)
        options = [*CHANNEL_OPTIONS, *channel_options]
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._metadata = call_metadata(token)
        self._retry = retry or RetryPolicy()
        self._timeout_s = timeout_s
        self._inference = service_pb2_grpc.InferenceServiceStub(self._channel)
        self._models = service_pb2_grpc.ModelServiceStub(self._channel)
        self._admin = service_pb2_grpc.AdminServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what runs and close the connection."""
        await self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingOverrides | None = None,
        *,
        model: str = "",
        options: Options | None = None,
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """Continue a prompt, given as text or token ids."""
        request = generate_request(prompt, sampling, options, model)
        return self._stream(self._inference.Generate, request, timeout_s)

    def chat(
        self,
        messages: Conversation,
        sampling: SamplingOverrides | None = None,
        *,
        model: str = "",
        options: Options | None = None,
        continue_final_message: bool = False,
        parse_control_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """Continue a conversation; a plain string is what the user says.

        parse_control_tokens: control tokens in the content count as such, instead of being plain text.
        """
        request = chat_request(
            messages, sampling, options, model, continue_final_message, parse_control_tokens
        )
        return self._stream(self._inference.Chat, request, timeout_s)

    async def tokenize(
        self,
        text: str | Sequence[Message],
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> Tokens:
        """Give the token ids of a text or a conversation."""
        request = tokenize_request(text, model, add_special_tokens)
        answer = await self._unary(self._inference.Tokenize, request, timeout_s)
        return Tokens(tuple(answer.token_ids), answer.text, answer.max_context_tokens)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """Give the text of token ids."""
        request = tokenization_pb2.DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return (await self._unary(self._inference.Detokenize, request, timeout_s)).text

    async def embed(
        self,
        inputs: Sequence[Prompt],
        *,
        model: str = "",
        dimensions: int | None = None,
        options: Options | None = None,
        timeout_s: float | None = None,
    ) -> Embeddings:
        """Give one vector for each input."""
        request = embed_request(inputs, dimensions, options, model)
        answer = await self._unary(self._inference.Embed, request, timeout_s)
        return Embeddings(tuple(tuple(e.values) for e in answer.embeddings), usage_of(answer.usage))

    async def models(self, *, timeout_s: float | None = None) -> list[model_pb2.Model]:
        """List what is served, loaded or not."""
        answer = await self._unary(self._models.ListModels, model_pb2.ListModelsRequest(), timeout_s)
        return list(answer.models)

    async def get_model(self, model: str = "", *, timeout_s: float | None = None) -> model_pb2.Model:
        """Describe one model; answers while it loads."""
        request = model_pb2.GetModelRequest(model=model)
        return (await self._unary(self._models.GetModel, request, timeout_s)).model

    async def get_load(self, model: str = "", *, timeout_s: float | None = None) -> list[admin_pb2.ModelLoad]:
        """Report queues, running requests, KV blocks and speeds; needs the admin token or a local server."""
        request = admin_pb2.GetLoadRequest(model=model)
        return list((await self._unary(self._admin.GetLoad, request, timeout_s)).models)

    async def get_routes(self, *, timeout_s: float | None = None) -> routing_pb2.GetRoutesResponse:
        """Tell which deployments answer for each model; needs the admin token or a local server."""
        request = routing_pb2.GetRoutesRequest()
        response: routing_pb2.GetRoutesResponse = await self._unary(self._admin.GetRoutes, request, timeout_s)
        return response

    async def set_route(
        self,
        route: routing_pb2.Route,
        *,
        revision: int | None = None,
        remove: bool = False,
        timeout_s: float | None = None,
    ) -> int:
        """Replace the route of route.model, or remove it; gives the new revision of the routes.

        revision: refused if the routes are at another one by now. Needs the admin token or a local server.
        """
        request = routing_pb2.SetRouteRequest(route=route, revision=revision, remove=remove)
        response: routing_pb2.SetRouteResponse = await self._unary(self._admin.SetRoute, request, timeout_s)
        return response.revision

    async def abort(self, request_id: str, *, timeout_s: float | None = None) -> None:
        """End a request, whoever sent it; needs the admin token or a local server."""
        await self._unary(self._admin.Abort, admin_pb2.AbortRequest(request_id=request_id), timeout_s)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retry, self._timeout_s if timeout_s is None else timeout_s)

    def _stream(self, method: Any, request: Any, timeout_s: float | None) -> AsyncStream:
        return AsyncStream(
            lambda left_s: method(request, timeout=left_s, metadata=self._metadata),
            lambda pause: wait_aio(self._channel, request.model, pause),
            self._attempts(timeout_s),
        )

    async def _unary(
        self, method: Callable[..., Awaitable[_Answer]], request: object, timeout_s: float | None
    ) -> _Answer:
        attempts = self._attempts(timeout_s)
        while True:
            try:
                return await method(request, timeout=attempts.remaining_s, metadata=self._metadata)
            except grpc.aio.AioRpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            await wait_aio(self._channel, getattr(request, "model", ""), attempts.pause_after(error))
