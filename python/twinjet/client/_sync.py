"""The client for code without an event loop; the same calls as the asyncio client, blocking. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import grpc

from twinjet.client import _questions as questions
from twinjet.client._address import check_address, check_token
from twinjet.client._answers import (
    Adapter,
    Drained,
    Embeddings,
    KvEvents,
    KvOrder,
    LoadingProgress,
    Model,
    ModelLoad,
    Tokens,
    kv_events_of,
)
from twinjet.client._calls import (
    READY_POLL_S,
    BatchProgress,
    Metadata,
    Tally,
    check_limit,
    merged_metadata,
    not_ready_in_time,
    ready_or_loading,
    time_limit,
)
from twinjet.client._channel import call_metadata
from twinjet.client._channel import channel_options as all_options
from twinjet.client._compare import CompareEvent, Comparison, compare_event_of, compare_request
from twinjet.client._errors import (
    Cancelled,
    DeadlinePassed,
    TwinjetClientError,
    Unavailable,
    from_rpc_error,
)
from twinjet.client._events import Completion, Delta, Event
from twinjet.client._health import wait
from twinjet.client._questions import Question
from twinjet.client._reading import Reading, Try
from twinjet.client._requests import (
    Conversation,
    Options,
    Prompt,
    Sampling,
    chat_request,
    duration,
    filled,
    generate_request,
)
from twinjet.client._retry import Attempts, Pause, RetryPolicy
from twinjet.client._routes import Route, Routes
from twinjet.v1 import admin_pb2, model_pb2, service_pb2_grpc

_Answer = TypeVar("_Answer")
_OpenStream = Callable[[float | None], Any]
_Begin = Callable[[Callable[[], Any]], Any]
_Wait = Callable[[Pause, _Begin, Callable[[float], object]], None]
_BeginAttempts = Callable[[], Attempts]


class Stream:
    """The events of one call, read once: `for event in stream`, or text(), pieces(), completion().

    The call and its time limit begin with the first read. Leaving `with stream` and close() cancel it, as does
    cancel() from another thread, and the server stops working on it. Reading raises the exceptions of this package,
    which carry what had come before; a second reading raises StreamConsumed.
    """

    def __init__(
        self, open_stream: _OpenStream, wait: _Wait, begin_attempts: _BeginAttempts, address: str
    ) -> None:
        self._open = open_stream
        self._address = address
        self._wait = wait
        self._begin_attempts = begin_attempts
        self._reading = Reading()
        self._call: Any = None
        self._is_cancelled = threading.Event()
        self._lock = threading.Lock()
        self._events = self._run()

    @property
    def request_id(self) -> str:
        """The request's id, "" until the first event."""
        return self._reading.request_id

    def __iter__(self) -> Iterator[Event]:
        self._reading.check_unread(whole=False)
        return self._events

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the call if it still runs."""
        self._reading.end()
        self._events.close()

    def cancel(self) -> None:
        """Cancel the call from any thread; who reads it gets Cancelled, now or with the first read."""
        with self._lock:
            self._is_cancelled.set()
            if self._call is not None:
                self._call.cancel()

    def pieces(self, output_index: int = 0) -> Iterator[str]:
        """Give the text of one output as it comes."""
        with self:
            for event in self:
                if isinstance(event, Delta) and event.output_index == output_index and event.text:
                    yield event.text

    def text(self) -> str:
        """Read to the end and give the text of the first output."""
        return self.completion().text

    def completion(self) -> Completion:
        """Read to the end and give everything."""
        self._reading.check_unread(whole=True)
        with self:
            for _ in self:
                pass
        return self._reading.completion()

    def _run(self) -> Generator[Event]:
        self._reading.begin()
        try:
            with closing(self._tries()) as events:
                for event in events:
                    self._reading.add(event)
                    yield event
        except TwinjetClientError as error:
            self._reading.complete(error)
            raise
        finally:
            self._reading.end()

    def _begin(self, call: Callable[[], Any]) -> Any:
        with self._lock:
            if self._is_cancelled.is_set():
                raise Cancelled("the stream was cancelled before it began", code="CANCELLED")
            self._call = call()
            return self._call

    def _tries(self) -> Generator[Event]:
        attempts = self._begin_attempts()
        while True:
            call = self._begin(partial(self._open, attempts.remaining_s))
            one = Try()
            try:
                while (message := next(call, None)) is not None:
                    if (event := one.take(message)) is not None:
                        yield event
                yield one.end()
                return
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error, self._address)
            finally:
                call.cancel()
            if one.has_begun:
                raise error
            self._wait(attempts.pause_after(error), self._begin, self._is_cancelled.wait)


class Client:
    """A connection to a Twinjet server, for code without an event loop; thread-safe. Close it, or use `with`.

    address: host:port, or several servers, among which calls are spread by their load: "dns:///HOST:PORT" for all
    addresses of a name, "ipv4:IP:PORT,IP:PORT" for a list. credentials: for TLS, None is plain text. token: the admin
    token. retry: when to try again. timeout_s: deadline of calls that name none; None is no deadline. metadata: sent
    with every call; a call's own comes before it. Raises ValueError for an address, token, time or metadata that
    cannot be used.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str = "",
        retry: RetryPolicy | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        check_address(address)
        check_token(token)
        self._address = address
        self._metadata = merged_metadata(call_metadata(token), metadata)
        self._retry = retry or RetryPolicy()
        self._timeout_s = time_limit(timeout_s)
        options = all_options(address, channel_options)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=options)
        self._inference = service_pb2_grpc.InferenceServiceStub(self._channel)
        self._models = service_pb2_grpc.ModelServiceStub(self._channel)
        self._admin = service_pb2_grpc.AdminServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and close the connection."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        model: str = "",
        options: Options | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Stream:
        """Continue a prompt, given as text or token ids."""
        request = generate_request(prompt, sampling, options, model)
        return self._stream(self._inference.Generate, request, timeout_s, metadata)

    def chat(
        self,
        messages: Conversation,
        sampling: Sampling | None = None,
        *,
        model: str = "",
        options: Options | None = None,
        continue_final_message: bool = False,
        parse_control_tokens: bool = False,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Stream:
        """Continue a conversation: Messages or dicts; a plain string is what the user says.

        parse_control_tokens: control tokens in the content count as such, instead of being plain text.
        """
        request = chat_request(
            messages, sampling, options, model, continue_final_message, parse_control_tokens
        )
        return self._stream(self._inference.Chat, request, timeout_s, metadata)

    def batch(
        self,
        streams: Iterable[Stream],
        *,
        limit: int = 16,
        on_progress: Callable[[BatchProgress], None] | None = None,
    ) -> list[Completion | TwinjetClientError]:
        """Read many streams to the end, at most limit at a time; gives their completions in order.

        streams: of generate() and chat(), as a list or made as they are needed. A failure stands in its stream's
        place and does not end the others. on_progress: called after each stream, from one thread at a time.
        """
        check_limit(limit)
        tally, waiting = Tally(streams), enumerate(streams)
        lock, running, is_over = threading.Lock(), set[Stream](), threading.Event()

        def work() -> None:
            while True:
                with lock:
                    if is_over.is_set() or (item := next(waiting, None)) is None:
                        return
                    index, stream = item
                    running.add(stream)
                try:
                    result: Completion | TwinjetClientError = stream.completion()
                except TwinjetClientError as error:
                    result = error
                with lock:
                    running.discard(stream)
                    if is_over.is_set():
                        return
                    progress = tally.add(index, result)
                    if on_progress is not None:
                        on_progress(progress)

        with ThreadPoolExecutor(limit, thread_name_prefix="twinjet-batch") as pool:
            workers = [pool.submit(work) for _ in range(limit)]
            try:
                for worker in as_completed(workers):
                    worker.result()
            except BaseException:
                with lock:
                    is_over.set()
                    for stream in running:
                        stream.cancel()
                raise
        return tally.results()

    def tokenize(
        self,
        text: Conversation,
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        parse_control_tokens: bool = False,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Tokens:
        """Give the token ids of a text or a conversation. parse_control_tokens: as in chat()."""
        return self._ask(
            questions.tokenize(text, model, add_special_tokens, parse_control_tokens), timeout_s, metadata
        )

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> str:
        """Give the text of token ids."""
        return self._ask(questions.detokenize(token_ids, model, skip_special_tokens), timeout_s, metadata)

    def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        model: str = "",
        dimensions: int | None = None,
        options: Options | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Embeddings:
        """Give one vector for each input."""
        return self._ask(questions.embed(inputs, dimensions, options, model), timeout_s, metadata)

    def models(self, *, timeout_s: float | None = None, metadata: Metadata | None = None) -> list[Model]:
        """List what is served, loaded or not."""
        return self._ask(questions.models(), timeout_s, metadata)

    def get_model(
        self, model: str = "", *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> Model:
        """Describe one model; answers while it loads."""
        return self._ask(questions.get_model(model), timeout_s, metadata)

    def wait_ready(
        self,
        model: str = "",
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[LoadingProgress], None] | None = None,
        metadata: Metadata | None = None,
    ) -> Model:
        """Wait until a model answers, the server itself included, and describe it.

        on_progress: called with how far it is, again and again. Raises DeadlinePassed after timeout_s (the
        client's own where None), ServerFailure if the model has failed, Unavailable if it is draining.
        """
        limit_s = self._timeout_s if timeout_s is None else time_limit(timeout_s)
        attempts = Attempts(RetryPolicy(attempts=1), limit_s)
        sent, request = self._call_metadata(metadata), filled(model_pb2.GetModelRequest(), {"model": model})
        last: LoadingProgress | None = None
        while True:
            try:
                answer = self._models.GetModel(
                    request, timeout=attempts.remaining_s, metadata=sent, wait_for_ready=True
                )
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error, self._address)
                # A server that goes away while it answers is waited for as well.
                if not isinstance(error, Unavailable | DeadlinePassed):
                    raise error from None
            except DeadlinePassed:
                raise not_ready_in_time(model, last, limit_s or 0.0) from None
            else:
                found = Model.of(answer.model)
                loading = ready_or_loading(found)
                if loading is None:
                    return found
                last = loading
                if on_progress is not None:
                    on_progress(loading)
            time.sleep(READY_POLL_S)

    def load_adapter(
        self,
        name: str,
        path: str,
        *,
        model: str = "",
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> bool:
        """Load a LoRA adapter from a folder on the server; True if it was loaded before.

        Needs the admin token or a local server.
        """
        return self._ask(questions.load_adapter(name, path, model), timeout_s, metadata)

    def unload_adapter(
        self,
        name: str,
        *,
        model: str = "",
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        """Remove a LoRA adapter; needs the admin token or a local server."""
        self._ask(questions.unload_adapter(name, model), timeout_s, metadata)

    def adapters(
        self, model: str = "", *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> list[Adapter]:
        """List the LoRA adapters of a model, by name."""
        return self._ask(questions.adapters(model), timeout_s, metadata)

    def get_load(
        self, model: str = "", *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> list[ModelLoad]:
        """Report queues, running requests, KV blocks and speeds; needs the admin token or a local server."""
        return self._ask(questions.get_load(model), timeout_s, metadata)

    def get_routes(self, *, timeout_s: float | None = None, metadata: Metadata | None = None) -> Routes:
        """Tell which deployments answer for each model; needs the admin token or a local server."""
        return self._ask(questions.get_routes(), timeout_s, metadata)

    def set_route(
        self,
        route: Route,
        *,
        revision: int | None = None,
        remove: bool = False,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> int:
        """Replace the route of route.model, or remove it; gives the new revision of the routes.

        revision: refused if the routes are at another one by now. Needs the admin token or a local server.
        """
        return self._ask(questions.set_route(route, revision, remove), timeout_s, metadata)

    def add_deployment(
        self,
        name: str,
        settings: Mapping[str, Any],
        *,
        public: bool = False,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> int:
        """Start a deployment and wait until it is ready; gives the revision of the routes.

        settings: those of a [deployments.NAME] section. public: make a route of its name to it. Needs the admin token
        or a local server.
        """
        return self._ask(questions.add_deployment(name, settings, public), timeout_s, metadata)

    def remove_deployment(
        self,
        name: str,
        grace_s: float | None = None,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Drained:
        """Drain a deployment that no route names and end its engine; grace_s: as in drain()."""
        return self._ask(questions.remove_deployment(name, grace_s), timeout_s, metadata)

    def abort(
        self, request_id: str, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> None:
        """End a request, whoever sent it; needs the admin token or a local server."""
        self._ask(questions.abort(request_id), timeout_s, metadata)

    def reset_prefix_cache(
        self, model: str = "", *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> bool:
        """Forget cached prefixes; False if running requests hold some. Needs the admin token or a local server."""
        return self._ask(questions.reset_prefix_cache(model), timeout_s, metadata)

    def drain(
        self,
        grace_s: float | None = None,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Drained:
        """Stop admission and wait for running streams; needs the admin token or a local server.

        grace_s: how long they may go on, None is the server's own time.
        """
        return self._ask(questions.drain(grace_s), timeout_s, metadata)

    def watch_kv_events(
        self,
        model: str = "",
        *,
        epoch: str = "",
        start_sequence: int = 0,
        deployment: str = "",
        heartbeat_s: float | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Generator[KvEvents]:
        """Watch which KV blocks a prefix cache holds; needs the admin token or a local server.

        epoch, start_sequence: of the last batch taken in, its sequence plus 1, to go on from there; else, and where the
        server does not keep what follows, the first batches are a snapshot. heartbeat_s: longest silence, 0.1 to 3600, None
        is 10. Raises Unavailable when the engine ends, IncompleteStream when a batch was missed: watch again then.
        """
        fields = {
            "model": model, "epoch": epoch, "start_sequence": start_sequence, "deployment": deployment,
            "heartbeat_interval": duration("heartbeat_s", heartbeat_s),
        }  # fmt: skip
        request, order = filled(admin_pb2.WatchKvEventsRequest(), fields), KvOrder(epoch, start_sequence)
        left_s = self._attempts(timeout_s).remaining_s
        call: Any = self._admin.WatchKvEvents(request, timeout=left_s, metadata=self._call_metadata(metadata))
        try:
            while (message := next(call, None)) is not None:
                yield order.check(kv_events_of(message))
        except grpc.RpcError as rpc_error:
            raise from_rpc_error(rpc_error, self._address) from None
        finally:
            call.cancel()

    def compare(
        self, comparison: Comparison, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> Generator[CompareEvent]:
        """Run two deployments side by side and say which is faster; needs the admin token or a local server.

        Gives a CompareStarted, a CompareProgress now and then, and the CompareReport. Closing the iterator stops it. Raises
        PreconditionFailed for unequal settings and while another comparison runs.
        """
        left_s = self._attempts(timeout_s).remaining_s
        call: Any = self._admin.Compare(
            compare_request(comparison), timeout=left_s, metadata=self._call_metadata(metadata)
        )
        try:
            while (message := next(call, None)) is not None:
                if (event := compare_event_of(message)) is not None:
                    yield event
        except grpc.RpcError as rpc_error:
            raise from_rpc_error(rpc_error, self._address) from None
        finally:
            call.cancel()

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retry, self._timeout_s if timeout_s is None else time_limit(timeout_s))

    def _call_metadata(self, metadata: Metadata | None) -> tuple[tuple[str, str | bytes], ...]:
        return merged_metadata(self._metadata, metadata)

    def _stream(
        self, method: Any, request: Any, timeout_s: float | None, metadata: Metadata | None = None
    ) -> Stream:
        sent = self._call_metadata(metadata)
        time_limit(timeout_s)
        return Stream(
            lambda left_s: method(request, timeout=left_s, metadata=sent),
            partial(wait, self._channel, request.model),
            lambda: self._attempts(timeout_s),
            self._address,
        )

    def _ask(
        self, question: Question[_Answer], timeout_s: float | None, metadata: Metadata | None = None
    ) -> _Answer:
        stub = {"inference": self._inference, "models": self._models, "admin": self._admin}[question.stub]
        method = getattr(stub, question.method)
        attempts, sent = self._attempts(timeout_s), self._call_metadata(metadata)
        while True:
            try:
                answer = method(question.request, timeout=attempts.remaining_s, metadata=sent)
                return question.answer(answer)
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error, self._address)
            model = getattr(question.request, "model", "")
            wait(self._channel, model, attempts.pause_after(error))
