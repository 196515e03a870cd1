"""InferenceService: convert, admit, stream, map errors."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

import grpc

from twinjet.engines.base import ChatTurn, EmbeddingEngine, Engine, EngineInfo, RenderedChat, Tokenizer
from twinjet.engines.text import make_stream
from twinjet.errors import DeadlinePassed, InvalidRequest, NotFound, Unsupported
from twinjet.request import EngineRequest, draw_seed
from twinjet.server import convert
from twinjet.server.gate import Gate
from twinjet.server.grammar import Grammars
from twinjet.server.samplings import Samplings, Wish
from twinjet.server.stream import StreamWriter, WriterWatch
from twinjet.v1 import embedding_pb2, generation_pb2, tokenization_pb2

if TYPE_CHECKING:
    from twinjet.config import ServerSettings
    from twinjet.routing.mirror import Mirror
    from twinjet.server.deployments import Deployment, Deployments
    from twinjet.server.live import LiveRequests
    from twinjet.server.metrics import Metrics

    Context = grpc.aio.ServicerContext[object, object]

REQUEST_ID_KEY = "x-request-id"
ACCEPTED_ID_KEY = "twinjet-request-id"
INLINE_TOKENIZE_CHARS = 2048
"""Longer texts are tokenized in a thread, so that other streams go on meanwhile."""
MAX_EMBED_INPUTS = 256


class _Arrival(NamedTuple):
    """When a call came in and when it must have ended, in time.monotonic() seconds; deadline None is none.

    Read once, before any work: the time that gRPC still gives shrinks while the request is looked at.
    """

    at: float
    deadline: float | None
    trace_headers: Mapping[str, str]

    @classmethod
    def of(cls, context: Context) -> _Arrival:
        now = time.monotonic()
        left_s = context.time_remaining()
        trace = convert.trace_headers(context.invocation_metadata())
        return cls(now, None if left_s is None else now + left_s, trace)


class _Prompt(NamedTuple):
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
        mirror: Mirror,
        grammars: Grammars,
    ) -> None:
        self._deployments = deployments
        self._settings = settings
        self._live = live
        self._metrics = metrics
        self._mirror = mirror
        self._watch = WriterWatch(settings.stalled_reader_s)
        self._grammars = grammars
        self._gate = Gate(settings)
        self._samplings = Samplings()

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Context) -> None:
        arrival = _Arrival.of(context)
        with self._gate.enter(context.peer()):
            await self._generate(request, context, arrival)

    async def _generate(
        self, request: generation_pb2.GenerateRequest, context: Context, arrival: _Arrival
    ) -> None:
        model = self._deployments.resolve(request.model)
        convert.one_prompt(request.text, request.token_ids, self._settings.max_prompt_bytes)
        wish = self._samplings.wish(request.sampling)
        options = _options(request, context)
        deployment = self._deployments.pick(model, options.tenant, options.session)
        engine, info = deployment.ready()
        _need(info, "generate")
        deployment.dispatcher.check(options.request_id, options.tenant)
        if request.token_ids:
            ids = convert.token_ids(request.token_ids, info.limits.vocab_size, "token_ids")
            prompt = _Prompt(ids, "token_ids")
        else:
            ids = await _encode(engine.tokenizer, request.text, add_special_tokens=True)
            prompt = _Prompt(ids, "text")
        accepted = _accept(prompt, wish, options, info, arrival)
        accepted = await self._with_grammar(accepted, engine)
        await self._stream(accepted, options, deployment, engine, info, model, context, arrival.at)

    async def Chat(self, request: generation_pb2.ChatRequest, context: Context) -> None:
        arrival = _Arrival.of(context)
        with self._gate.enter(context.peer()):
            await self._chat(request, context, arrival)

    async def _chat(self, request: generation_pb2.ChatRequest, context: Context, arrival: _Arrival) -> None:
        model = self._deployments.resolve(request.model)
        turns = convert.chat_turns(
            request.messages,
            self._settings.max_prompt_bytes,
            continue_final=request.continue_final_message,
        )
        wish = self._samplings.wish(request.sampling)
        options = _options(request, context)
        deployment = self._deployments.pick(model, options.tenant, options.session)
        engine, info = deployment.ready()
        _need(info, "chat")
        deployment.dispatcher.check(options.request_id, options.tenant)
        _, ids = await _encode_chat(
            engine.tokenizer, turns, request.continue_final_message, parse=request.parse_control_tokens
        )
        accepted = _accept(_Prompt(ids, "messages"), wish, options, info, arrival)
        accepted = await self._with_grammar(accepted, engine)
        await self._stream(accepted, options, deployment, engine, info, model, context, arrival.at)

    async def Embed(
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        model = self._deployments.resolve(request.model)
        if not 1 <= len(request.inputs) <= MAX_EMBED_INPUTS:
            raise InvalidRequest.of(
                "inputs", f"{len(request.inputs)} inputs; allowed: 1 to {MAX_EMBED_INPUTS}"
            )
        options = _options(request, context)
        engine, info = self._deployments.pick(model).ready()
        _need(info, "embed")
        prompts = [
            await self._embed_prompt(item, f"inputs[{i}].", engine, info)
            for i, item in enumerate(request.inputs)
        ]
        dimensions = request.dimensions if request.HasField("dimensions") else None
        request_id = options.request_id
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
            text, ids = await _encode_chat(
                engine.tokenizer, turns, False, parse=request.parse_control_tokens,
                add_special_tokens=request.add_special_tokens,
            )  # fmt: skip
        else:
            convert.one_prompt(request.text, (), limit)
            text = request.text
            add_special = request.add_special_tokens or not request.HasField("add_special_tokens")
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

    def _copy(self, request: EngineRequest, model: str) -> None:
        """Send a copy of the request to the model's mirror, if it has one that can take it."""
        copy_to = self._deployments.mirror_of(model)
        # A grammar is compiled for one engine's vocabulary.
        if copy_to is not None and request.grammar is None:
            self._mirror.copy(request, model, copy_to.name, copy_to.dispatcher)

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
        engine: Engine,
        info: EngineInfo,
        model: str,
        context: Context,
        arrived_at: float,
    ) -> None:
        self._copy(request, model)
        stream = make_stream(
            engine.tokenizer.vocabulary,
            request.sampling,
            info.eos_token_ids,
            request_id=request.request_id,
            model=model,
            engine=info.name,
            deployment=deployment.name,
            sampler=info.sampler.implementation,
            num_prompt_tokens=len(request.prompt_token_ids),
            seed=request.sampling.seed,
            arrived_at=arrived_at,
            max_pending_bytes=self._settings.max_pending_bytes,
        )
        writer = StreamWriter(context.write)
        check = self._grammars.output_check(request)
        key = object()
        with self._live.hold(key):
            await context.send_initial_metadata(((ACCEPTED_ID_KEY, request.request_id),))
            ticket = deployment.dispatcher.open(
                request,
                stream,
                report_queue=options.report_queue,
                on_overflow=writer.interrupt,
            )
            try:
                writer.watch_carried(stream, ticket.fail)
                self._watch.add(writer)
                # Where the door can, it sends what the engine's steps bring, and only the end comes back here.
                if check is None and (carry := getattr(context, "carry", None)) is not None:
                    carry(stream)
                while messages := await ticket.read():
                    if check is not None:
                        await check.look_at(messages)
                    for message in messages:
                        await writer.write(message)
                await writer.write(stream.summary())
                self._metrics.observe_finished(model, deployment.name, stream)
            finally:
                # Reached by success, by cancellation and, when gRPC drops a handler that is blocked in a
                # write, by GeneratorExit, which allows no await.
                self._watch.discard(writer)
                writer.close()
                ticket.close()


def _accept(
    prompt: _Prompt,
    wish: Wish,
    options: convert.Options,
    info: EngineInfo,
    arrival: _Arrival,
) -> EngineRequest:
    """Check everything that needs no engine, and make the engine's request."""
    num_tokens, limit = len(prompt.token_ids), info.limits.max_context_tokens
    if not 1 <= num_tokens < limit:
        raise InvalidRequest.of(
            prompt.field,
            f"the prompt has {num_tokens} tokens; the model's context is {limit}, allowed: 1 to {limit - 1}",
        )
    sampling = wish.resolve(info, num_prompt_tokens=num_tokens, seed=draw_seed())
    if options.priority and "priority" not in info.capabilities:
        raise Unsupported("priority")
    if options.adapter and "adapters" not in info.capabilities:
        raise NotFound("adapter", options.adapter, "this model has no adapters")
    if options.data_parallel_rank is not None:
        _need(info, "data_parallel_rank")
    if options.kv_retention is not None:
        _need(info, "kv_retention")
    if arrival.deadline is not None and arrival.deadline <= time.monotonic():
        raise DeadlinePassed("the deadline passed before the request was accepted")
    return EngineRequest(
        request_id=options.request_id,
        prompt_token_ids=prompt.token_ids,
        sampling=sampling,
        priority=options.priority,
        tenant=options.tenant,
        cache_salt=options.cache_salt,
        adapter=options.adapter,
        deadline=arrival.deadline,
        data_parallel_rank=options.data_parallel_rank,
        kv_retention=options.kv_retention,
        trace_headers=arrival.trace_headers,
    )


def _need(info: EngineInfo, capability: str) -> None:
    if capability not in info.capabilities:
        raise Unsupported(capability)


def _options(
    request: generation_pb2.GenerateRequest | generation_pb2.ChatRequest | embedding_pb2.EmbedRequest,
    context: Context,
) -> convert.Options:
    """Check and convert a request's options; one without an id gets one. Raises InvalidRequest."""
    if not request.HasField("options"):
        return convert.Options(_new_request_id(context))
    options = convert.options(request.options)
    return options if options.request_id else options._replace(request_id=_new_request_id(context))


def _new_request_id(context: Context) -> str:
    """Draw an id. It begins with the caller's x-request-id, which may come more than once, if that can be shown."""
    sent = ""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str):
            sent = value
    drawn = secrets.token_hex(12)
    if not sent or convert.request_id_violation(REQUEST_ID_KEY, sent):
        return drawn
    return f"{sent[: convert.MAX_ID_CHARS - len(drawn) - 1]}-{drawn}"


async def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    ids: Sequence[int]
    if len(text) <= INLINE_TOKENIZE_CHARS:
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    else:
        ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return tuple(ids)


async def _encode_chat(
    tokenizer: Tokenizer,
    turns: Sequence[ChatTurn],
    continue_final: bool,
    *,
    parse: bool,
    add_special_tokens: bool = False,
) -> tuple[str, tuple[int, ...]]:
    """Give a conversation as text and as token ids. parse: control tokens in its content count as such."""

    def encode() -> tuple[str, tuple[int, ...]]:
        if parse:
            rendered = RenderedChat(tokenizer.render_chat(turns, continue_final=continue_final))
        else:
            rendered = tokenizer.render_as_data(turns, continue_final=continue_final)
        return rendered.text, tuple(
            tokenizer.encode_rendered(rendered, add_special_tokens=add_special_tokens)
        )

    is_short = sum(len(turn.content) for turn in turns) <= INLINE_TOKENIZE_CHARS
    return encode() if is_short else await asyncio.to_thread(encode)
