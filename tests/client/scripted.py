"""A server on a real socket that answers as a test tells it: events, statuses with details, silence."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from twinjet.config import ServerSettings
from twinjet.server.doors import make_door
from twinjet.v1 import admin_pb2, embedding_pb2, generation_pb2, model_pb2, service_pb2_grpc, tokenization_pb2

pb = generation_pb2


class Fails:
    """A step of a script: the call ends with this status."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str = "because",
        *,
        reason: str = "",
        retry_after_s: float | None = None,
        violations: dict[str, str] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.code = code
        self.message = message
        self.details: list[any_pb2.Any] = []
        if reason:
            info = error_details_pb2.ErrorInfo(domain="twinjet", reason=reason, metadata=metadata)
            self._pack(info)
        if retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(retry_after_s * 1e9))
            self._pack(error_details_pb2.RetryInfo(retry_delay=delay))
        if violations:
            self._pack(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(field=f, description=d)
                        for f, d in violations.items()
                    ]
                )
            )

    def _pack(self, message: Any) -> None:
        packed = any_pb2.Any()
        packed.Pack(message)
        self.details.append(packed)

    async def abort(self, context: Any) -> None:
        number = getattr(code_pb2, self.code.name)
        status = status_pb2.Status(code=number, message=self.message, details=self.details)
        await context.abort_with_status(rpc_status.to_status(status))


class Stalls:
    """A step of a script: nothing happens until the call is cancelled."""


Step = pb.GenerateResponse | Fails | Stalls


def started(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.Started(request_id="r1", model="m", engine="fake", prompt_tokens=3, **fields)
    )


def delta(text: str, index: int = 0, **fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(output_index=index, text=text, token_ids=[len(text)], **fields))


def finished(index: int = 0, **fields: Any) -> pb.GenerateResponse:
    fields = {"reason": pb.FINISH_REASON_STOP, "eos_token_id": 2} | fields
    return pb.GenerateResponse(finished=pb.Finished(output_index=index, output_tokens=2, **fields))


def summary() -> pb.GenerateResponse:
    return pb.GenerateResponse(
        summary=pb.Summary(
            usage=pb.Usage(prompt_tokens=3, output_tokens=2),
            timings=pb.Timings(
                queue=duration_pb2.Duration(nanos=500_000_000), total=duration_pb2.Duration(seconds=2)
            ),
            seed=2**64 - 1,
            sampler="engine",
        )
    )


def whole(*texts: str) -> list[Step]:
    """A complete stream with these deltas."""
    return [started(), *(delta(t) for t in texts), finished(), summary()]


class Scripted(
    service_pb2_grpc.InferenceServiceServicer,
    service_pb2_grpc.ModelServiceServicer,
    service_pb2_grpc.AdminServiceServicer,
):
    """scripts: one list of steps for each call in turn; the last one repeats. requests: what came in.

    health: what a health watch is told, on the wire, before it falls silent; None refuses it. watched: its requests.
    """

    def __init__(self) -> None:
        self.scripts: list[list[Step]] = [whole("hello")]
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.time_left_s: list[float | None] = []
        self.cancelled = threading.Event()
        self.health: list[bytes] | None = None
        self.watched: list[bytes] = []
        self.address = ""
        # In the initial metadata of streams.
        self.request_id = ""
        # Streams at one time.
        self.running = 0
        self.most_running = 0
        # What GetModel says in turn; the last one repeats.
        self.states: list[model_pb2.Model] = []

    @property
    def num_calls(self) -> int:
        return len(self.requests)

    def _next(self, request: Any, context: Any) -> list[Step]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_left_s.append(context.time_remaining())
        return self.scripts[min(len(self.requests), len(self.scripts)) - 1]

    async def _play(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.request_id:
                await context.send_initial_metadata((("twinjet-request-id", self.request_id),))
            for step in self._next(request, context):
                if isinstance(step, Fails):
                    await step.abort(context)
                elif isinstance(step, Stalls):
                    await asyncio.Event().wait()
                else:
                    yield step
        except (asyncio.CancelledError, GeneratorExit):
            # Also between two steps: a client may cancel before the stall has begun.
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for message in self._play(request, context):
            yield message

    async def Chat(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for message in self._play(request, context):
            yield message

    async def _unary(self, request: Any, context: Any, answer: Any) -> Any:
        for step in self._next(request, context):
            if isinstance(step, Fails):
                await step.abort(context)
        return answer

    async def Watch(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.watched.append(request)
        if self.health is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no health here")
        for status in self.health or ():
            yield status
        await asyncio.Event().wait()

    async def Tokenize(self, request: Any, context: Any) -> Any:
        answer = tokenization_pb2.TokenizeResponse(token_ids=[1, 2], max_context_tokens=8, text="ab")
        return await self._unary(request, context, answer)

    async def Detokenize(self, request: Any, context: Any) -> Any:
        return await self._unary(request, context, tokenization_pb2.DetokenizeResponse(text="ab"))

    async def Embed(self, request: Any, context: Any) -> Any:
        answer = embedding_pb2.EmbedResponse(
            embeddings=[embedding_pb2.Embedding(values=[0.5, 1.0]) for _ in request.inputs],
            usage=pb.Usage(prompt_tokens=4),
        )
        return await self._unary(request, context, answer)

    async def ListModels(self, request: Any, context: Any) -> Any:
        model = model_pb2.Model(name="m", state=model_pb2.MODEL_STATE_READY)
        return await self._unary(request, context, model_pb2.ListModelsResponse(models=[model]))

    async def GetModel(self, request: Any, context: Any) -> Any:
        model = model_pb2.Model(name=request.model or "m", state=model_pb2.MODEL_STATE_READY)
        if self.states:
            model = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return await self._unary(request, context, model_pb2.GetModelResponse(model=model))

    async def GetLoad(self, request: Any, context: Any) -> Any:
        load = admin_pb2.ModelLoad(model="m", waiting=0, running=3)
        return await self._unary(request, context, admin_pb2.GetLoadResponse(models=[load]))

    async def Abort(self, request: Any, context: Any) -> Any:
        return await self._unary(request, context, admin_pb2.AbortResponse())


@contextmanager
def running(door: str = "auto") -> Iterator[Scripted]:
    """Serve through a door, in a thread of its own, so that blocking clients can be tested as well."""
    scripted = Scripted()
    up: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        server: Any = make_door(ServerSettings(port=0, door=door))  # type: ignore[arg-type]
        for add in (
            service_pb2_grpc.add_InferenceServiceServicer_to_server,
            service_pb2_grpc.add_ModelServiceServicer_to_server,
            service_pb2_grpc.add_AdminServiceServicer_to_server,
        ):
            add(scripted, server)
        watch = grpc.unary_stream_rpc_method_handler(scripted.Watch)
        health = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Watch": watch})
        server.add_generic_rpc_handlers((health,))
        scripted.address = server.bind()
        await server.start()
        done = asyncio.Event()
        up.set_result((asyncio.get_running_loop(), done))
        await done.wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    loop, done = up.result(timeout=10)
    try:
        yield scripted
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
