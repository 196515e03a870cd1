"""InferenceService: convert, admit, stream, map errors."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import grpc

from twinjet.engines.base import EmbeddingEngine, Engine, EngineInfo, OutputEvent, Tokenizer
from twinjet.errors import DeadlinePassed, InvalidRequest, NotFound, TwinjetError, Unsupported
from twinjet.request import EngineRequest, SamplingOverrides, resolve_sampling
from twinjet.scheduler import orca_report
from twinjet.scheduler.orca import TRAILER as ORCA_TRAILER
from twinjet.server import convert
from twinjet.server.grammar import Grammars
from twinjet.server.responses import ResponseBuilder
from twinjet.server.stream import StreamBuffer, StreamWriter
from twinjet.v1 import embedding_pb2, generation_pb2, tokenization_pb2

if TYPE_CHECKING:
    from twinjet.config import ServerSettings
    from twinjet.server.deployments import Deployment, Deployments
    from twinjet.server.live import LiveRequests
    from twinjet.server.metrics import Metrics

    Context = grpc.aio.ServicerContext[object, object]

REQUEST_ID_KEY = "x-request-id"
ACCEPTED_ID_KEY = "twinjet-request-id"
INLINE_TOKENIZE_CHARS = 8192
"""Longer texts are tokenized in a thread, so that other streams go on meanwhile."""
MAX_EMBED_INPUTS = 256


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt as token ids, and the field it came from."""

    token_ids: tuple[int, ...]
    field: str


class InferenceServicer:
    """See proto InferenceService."""

    def __init__(
        self,
        deployments: Deployments,
        settings: ServerSettings,
        live: LiveRequests,
        metrics: Metrics,
        grammars: Grammars,
    ) -> None:
        self._deployments = deployments
        self._settings = settings
        self._live = live
        self._metrics = metrics
        self._grammars = grammars

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Context) -> None:
        arrived_at = time.monotonic()
        model = self._deployments.resolve(request.model)
        convert.one_prompt(request.text, request.token_ids, self._settings.max_prompt_bytes)
        overrides = convert.sampling_overrides(request.sampling)
        options = self._options(request.options, context)
        deployment = self._deployments.pick(model)
        engine, info = deployment.ready()
        _need(info, "generate")
        if request.token_ids:
            ids = convert.token_ids(request.token_ids, info.limits.vocab_size, "token_ids")
            prompt = _Prompt(ids, "token_ids")
        else:
            ids = await _encode(engine.tokenizer, request.text, add_special_tokens=True)
            prompt = _Prompt(ids, "text")
        accepted = _accept(prompt, overrides, options, info, context, arrived_at)
        accepted = await self._with_grammar(accepted, engine)
        await self._stream(accepted, options, deployment, info, model, context, arrived_at)

    async def Chat(self, request: generation_pb2.ChatRequest, context: Context) -> None:
        arrived_at = time.monotonic()
        model = self._deployments.resolve(request.model)
        turns = convert.chat_turns(
            request.messages,
            self._settings.max_prompt_bytes,
            continue_final=request.continue_final_message,
        )
        overrides = convert.sampling_overrides(request.sampling)
        options = self._options(request.options, context)
        deployment = self._deployments.pick(model)
        engine, info = deployment.ready()
        _need(info, "chat")
        text = engine.tokenizer.render_chat(turns, continue_final=request.continue_final_message)
        ids = await _encode(engine.tokenizer, text, add_special_tokens=False)
        accepted = _accept(_Prompt(ids, "messages"), overrides, options, info, context, arrived_at)
        accepted = await self._with_grammar(accepted, engine)
        await self._stream(accepted, options, deployment, info, model, context, arrived_at)

    async def Embed(
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        model = self._deployments.resolve(request.model)
        if not 1 <= len(request.inputs) <= MAX_EMBED_INPUTS:
            raise InvalidRequest.of(
                "inputs", f"{len(request.inputs)} inputs; allowed: 1 to {MAX_EMBED_INPUTS}"
            )
        options = self._options(request.options, context)
        engine, info = self._deployments.pick(model).ready()
        _need(info, "embed")
        prompts = [
            await self._embed_prompt(item, f"inputs[{i}].", engine, info)
            for i, item in enumerate(request.inputs)
        ]
        dimensions = request.dimensions if request.HasField("dimensions") else None
        request_id = options.request_id or _new_request_id()
        embed = cast("EmbeddingEngine", engine).embed
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(embed(f"{request_id}-{i}", ids, dimensions))
                for i, ids in enumerate(prompts)
            ]
        response = embedding_pb2.EmbedResponse()
        for task in tasks:
            response.embeddings.add(values=task.result())
        response.usage.prompt_tokens = sum(map(len, prompts))
        return response

    async def Tokenize(
        self, request: tokenization_pb2.TokenizeRequest, context: Context
    ) -> tokenization_pb2.TokenizeResponse:
        model = self._deployments.resolve(request.model)
        if bool(request.text) == bool(request.messages):
            raise InvalidRequest.of("text", "set exactly one of text and messages")
        engine, info = self._deployments.pick(model).ready()
        limit = self._settings.max_prompt_bytes
        if request.messages:
            _need(info, "chat")
            turns = convert.chat_turns(request.messages, limit)
            text, add_special = engine.tokenizer.render_chat(turns, continue_final=False), False
        else:
            convert.one_prompt(request.text, (), limit)
            text, add_special = request.text, True
        if request.HasField("add_special_tokens"):
            add_special = request.add_special_tokens
        ids = await _encode(engine.tokenizer, text, add_special_tokens=add_special)
        return tokenization_pb2.TokenizeResponse(
            token_ids=ids, max_context_tokens=info.limits.max_context_tokens, text=text
        )

    async def Detokenize(
        self, request: tokenization_pb2.DetokenizeRequest, context: Context
    ) -> tokenization_pb2.DetokenizeResponse:
        model = self._deployments.resolve(request.model)
        if not request.token_ids:
            raise InvalidRequest.of("token_ids", "is empty; at least one token id is needed")
        engine, info = self._deployments.pick(model).ready()
        ids = convert.token_ids(request.token_ids, info.limits.vocab_size, "token_ids")
        text = engine.tokenizer.decode(ids, skip_special_tokens=request.skip_special_tokens)
        return tokenization_pb2.DetokenizeResponse(text=text)

    def _options(self, message: generation_pb2.RequestOptions, context: Context) -> convert.Options:
        options = convert.options(message)
        if options.request_id:
            return options
        sent = dict(context.invocation_metadata() or ()).get(REQUEST_ID_KEY, "")
        request_id = sent if isinstance(sent, str) else sent.decode("ascii", "replace")
        if violations := convert.request_id_violation(REQUEST_ID_KEY, request_id):
            raise InvalidRequest(violations)
        return convert.Options(
            request_id or _new_request_id(), options.priority, options.tenant, options.cache_salt,
            options.adapter, options.report_queue,
        )  # fmt: skip

    async def _with_grammar(self, request: EngineRequest, engine: Engine) -> EngineRequest:
        """Have the request's constraint compiled, if it has one. Raises InvalidRequest, DeadlinePassed, Overloaded."""
        constraint = request.sampling.constraint
        if constraint is None:
            return request
        grammar = await self._grammars.prepare(
            engine, constraint, tenant=request.tenant, deadline=request.deadline
        )
        return replace(request, grammar=grammar)

    async def _embed_prompt(
        self, item: embedding_pb2.EmbedInput, prefix: str, engine: Engine, info: EngineInfo
    ) -> tuple[int, ...]:
        convert.one_prompt(item.text, item.token_ids, self._settings.max_prompt_bytes, prefix)
        if item.token_ids:
            ids = convert.token_ids(item.token_ids, info.limits.vocab_size, f"{prefix}token_ids")
        else:
            ids = await _encode(engine.tokenizer, item.text, add_special_tokens=True)
        if len(ids) > info.limits.max_context_tokens:
            limit = info.limits.max_context_tokens
            raise InvalidRequest.of(f"{prefix}text", f"{len(ids)} tokens; the model's context is {limit}")
        return ids

    async def _stream(
        self,
        request: EngineRequest,
        options: convert.Options,
        deployment: Deployment,
        info: EngineInfo,
        model: str,
        context: Context,
        arrived_at: float,
    ) -> None:
        builder = ResponseBuilder(
            request, info, model=model, deployment=deployment.name, arrived_at=arrived_at
        )
        writer = StreamWriter(context.write, self._settings.stalled_reader_s)
        buffer = StreamBuffer(self._settings.max_pending_bytes, on_overflow=writer.interrupt)
        key = object()
        with self._live.hold(key):
            await context.send_initial_metadata(((ACCEPTED_ID_KEY, request.request_id),))
            producer = self._live.start(
                key, _produce(deployment, request, options.report_queue, builder, buffer, self._grammars)
            )
            try:
                async for event in buffer:
                    for message in builder.messages(event):
                        await writer.write(message)
                await writer.write(builder.summary())
                self._metrics.observe_finished(model, builder)
                report = orca_report(deployment.dispatcher.totals(), max_running=info.limits.max_num_seqs)
                context.set_trailing_metadata(((ORCA_TRAILER, report.encode()),))
            finally:
                # Reached by success, by cancellation and, when gRPC drops a handler that is blocked in a
                # write, by GeneratorExit, which allows no await: the producer cleans up by itself.
                producer.cancel()


async def _produce(
    deployment: Deployment,
    request: EngineRequest,
    report_queue: bool,
    builder: ResponseBuilder,
    buffer: StreamBuffer,
    grammars: Grammars,
) -> None:
    """Move a request's events from the dispatcher into its buffer; leaves nothing behind when cancelled."""
    try:
        running = deployment.dispatcher.run(request, report_queue=report_queue)
        async with contextlib.aclosing(grammars.verified(request, running)) as events:
            async for event in events:
                if isinstance(event, OutputEvent):
                    builder.note_token()
                buffer.put(event)
        buffer.close()
    except (Exception, asyncio.CancelledError) as error:
        buffer.close(error)
        if not isinstance(error, TwinjetError):
            raise


def _accept(
    prompt: _Prompt,
    overrides: SamplingOverrides,
    options: convert.Options,
    info: EngineInfo,
    context: Context,
    arrived_at: float,
) -> EngineRequest:
    """Check everything that needs no engine, and make the engine's request."""
    num_tokens, limit = len(prompt.token_ids), info.limits.max_context_tokens
    if not 1 <= num_tokens < limit:
        raise InvalidRequest.of(
            prompt.field,
            f"the prompt has {num_tokens} tokens; the model's context is {limit}, allowed: 1 to {limit - 1}",
        )
    sampling = resolve_sampling(overrides, info, num_prompt_tokens=num_tokens, seed=secrets.randbits(64))
    if options.priority and "priority" not in info.capabilities:
        raise Unsupported("priority")
    if options.adapter and "adapters" not in info.capabilities:
        raise NotFound("adapter", options.adapter, "this model has no adapters")
    left_s = context.time_remaining()
    if left_s is not None and left_s <= 0:
        raise DeadlinePassed("the deadline had passed when the request arrived")
    return EngineRequest(
        request_id=options.request_id,
        prompt_token_ids=prompt.token_ids,
        sampling=sampling,
        priority=options.priority,
        tenant=options.tenant,
        cache_salt=options.cache_salt,
        adapter=options.adapter,
        deadline=None if left_s is None else arrived_at + left_s,
    )


def _need(info: EngineInfo, capability: str) -> None:
    if capability not in info.capabilities:
        raise Unsupported(capability)


def _new_request_id() -> str:
    return secrets.token_hex(12)


async def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    ids: Sequence[int]
    if len(text) <= INLINE_TOKENIZE_CHARS:
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    else:
        ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return tuple(ids)
