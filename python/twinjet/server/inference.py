"""InferenceService: convert, admit, stream, map errors."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import grpc

from twinjet.addresses import caller_of
from twinjet.engines.base import EmbeddingEngine, Engine, EngineInfo
from twinjet.engines.text import make_stream
from twinjet.errors import DeadlinePassed, InvalidRequest, NotFound, TwinjetError, Unsupported
from twinjet.request import EngineRequest, Sampling, draw_seed
from twinjet.routing.prefix import PREFIX_KEY, prefix_key
from twinjet.server import convert
from twinjet.server.encoding import Encoder
from twinjet.server.failover import Failover, Journey
from twinjet.server.gate import Gate
from twinjet.server.grammar import Grammars
from twinjet.server.samplings import Samplings, Wish
from twinjet.server.stream import StreamWriter, WriterWatch
from twinjet.v1 import embedding_pb2, generation_pb2, tokenization_pb2

if TYPE_CHECKING:
    from twinjet._core import Stream
    from twinjet.config import ServerSettings
    from twinjet.routing.mirror import Mirror
    from twinjet.server.deployments import Deployment, Deployments
    from twinjet.server.live import LiveRequests
    from twinjet.server.metrics import Metrics

    Context = grpc.aio.ServicerContext[object, object]

REQUEST_ID_KEY = "x-request-id"
ACCEPTED_ID_KEY = "twinjet-request-id"
MAX_EMBED_INPUTS = 256
_IDS_AT_ONCE = 16384
MAX_DETOKENIZED_IDS = 1 << 16
"""Or the model's context where that is more."""


class _Arrival(NamedTuple):
    """When a call came in and when it must have ended, in time.monotonic() seconds; deadline None is none. And whence.

    Read once, before any work: the time that gRPC still gives shrinks while the request is looked at.
    """

    at: float
    deadline: float | None
    trace_headers: Mapping[str, str]
    client_address: str

    @classmethod
    def of(cls, context: Context, client_address: str) -> _Arrival:
        now = time.monotonic()
        left_s = context.time_remaining()
        trace = convert.trace_headers(context.invocation_metadata())
        return cls(now, None if left_s is None else now + left_s, trace, client_address)


class _Prompt(NamedTuple):
    """A prompt as token ids, and the field it came from."""

    token_ids: tuple[int, ...]
    field: str


@dataclass(slots=True, eq=False)
class _Call:
    """One request as it is wherever it is served. encode: its prompt in an engine's tokens.

    seed: used if none was sent; drawn once, so that another deployment draws as the first would have. stream: of the
    latest attempt.
    """

    model: str
    capability: Literal["generate", "chat"]
    wish: Wish
    options: convert.Options
    arrival: _Arrival
    encode: Callable[[Engine, EngineInfo], Awaitable[_Prompt]]
    seed: int = field(default_factory=draw_seed)
    stream: Stream | None = None

    @property
    def has_begun(self) -> bool:
        """Whether something of the answer, not counting places in the queue, may have left."""
        return self.stream is not None and self.stream.has_begun


class Lost(NamedTuple):
    """A request's attempt that failed. arrived_at: of the request, in time.monotonic() seconds."""

    model: str
    deployment: Deployment
    wish: Wish
    stream: Stream
    arrived_at: float


class Sharing(NamedTuple):
    """What all ways into the service share."""

    deployments: Deployments
    settings: ServerSettings
    live: LiveRequests
    metrics: Metrics
    watch: WriterWatch
    gate: Gate
    samplings: Samplings
    move: Callable[[EngineRequest, Lost, TwinjetError, str, Context], Awaitable[None]]


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
        self._encoder = Encoder()
        self._failover = Failover(deployments, metrics)

    @property
    def sharing(self) -> Sharing:
        """For server.plain."""
        return Sharing(
            self._deployments, self._settings, self._live, self._metrics, self._watch, self._gate, self._samplings,
            self.move,
        )  # fmt: skip

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Context) -> None:
        with self._gate.enter(context.peer()) as address:
            await self._generate(request, context, _Arrival.of(context, address))

    async def _generate(
        self, request: generation_pb2.GenerateRequest, context: Context, arrival: _Arrival
    ) -> None:
        model = self._deployments.resolve(request.model)
        convert.one_prompt(request.text, request.token_ids, self._settings.max_prompt_bytes)
        wish = self._samplings.wish(request.sampling)
        options = _options(request, context)
        caller = caller_of(options.tenant, arrival.client_address)

        async def encode(engine: Engine, info: EngineInfo) -> _Prompt:
            if request.token_ids:
                _check_length(len(request.token_ids), "token_ids", info)
                ids = convert.token_ids(request.token_ids, info.limits.vocab_size, "token_ids")
                return _Prompt(ids, "token_ids")
            most = info.limits.max_context_tokens
            return _Prompt(
                await self._encoder.prompt(engine.tokenizer, request.text, most, "text", caller=caller),
                "text",
            )

        await self._serve(_Call(model, "generate", wish, options, arrival, encode), context)

    async def Chat(self, request: generation_pb2.ChatRequest, context: Context) -> None:
        with self._gate.enter(context.peer()) as address:
            await self._chat(request, context, _Arrival.of(context, address))

    async def _chat(self, request: generation_pb2.ChatRequest, context: Context, arrival: _Arrival) -> None:
        model = self._deployments.resolve(request.model)
        turns = convert.chat_turns(
            request.messages,
            self._settings.max_prompt_bytes,
            continue_final=request.continue_final_message,
        )
        wish = self._samplings.wish(request.sampling)
        options = _options(request, context)
        caller = caller_of(options.tenant, arrival.client_address)

        async def encode(engine: Engine, info: EngineInfo) -> _Prompt:
            ids = await self._encoder.chat(
                engine.tokenizer,
                turns,
                caller=caller,
                continue_final=request.continue_final_message,
                parse=request.parse_control_tokens,
                most=info.limits.max_context_tokens,
            )
            return _Prompt(ids, "messages")

        await self._serve(_Call(model, "chat", wish, options, arrival, encode), context)

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
        caller = caller_of(options.tenant, self._gate.address(context.peer()))
        with self._encoder.hold(sum(len(item.text) for item in request.inputs), caller):
            prompts = [
                await self._embed_prompt(item, f"inputs[{i}].", engine, info, caller)
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
        caller = caller_of("", self._gate.address(context.peer()))

        def respond(ids: Sequence[int]) -> tokenization_pb2.TokenizeResponse:
            response = tokenization_pb2.TokenizeResponse(max_context_tokens=info.limits.max_context_tokens)
            # In parts: protobuf takes what it gets at once with all threads stopped, a tenth of a second for millions.
            for start in range(0, len(ids), _IDS_AT_ONCE):
                response.token_ids.extend(ids[start : start + _IDS_AT_ONCE])
            return response

        if request.messages:
            _need(info, "chat")
            text, response = await self._encoder.chat_as(
                respond,
                engine.tokenizer,
                convert.chat_turns(request.messages, limit),
                caller=caller,
                parse=request.parse_control_tokens,
                add_special_tokens=request.add_special_tokens,
            )
        else:
            convert.one_prompt(request.text, (), limit)
            text = request.text
            add_special = request.add_special_tokens or not request.HasField("add_special_tokens")
            response = await self._encoder.encode_as(
                respond, engine.tokenizer, text, caller=caller, add_special_tokens=add_special
            )
        response.text = text
        return response

    async def Detokenize(
        self, request: tokenization_pb2.DetokenizeRequest, context: Context
    ) -> tokenization_pb2.DetokenizeResponse:
        model = self._deployments.resolve(request.model)
        if not request.token_ids:
            raise InvalidRequest.of("token_ids", "is empty; at least one token id is needed")
        engine, info = self._deployments.pick(model).ready()
        most = max(MAX_DETOKENIZED_IDS, info.limits.max_context_tokens)
        if len(request.token_ids) > most:
            raise InvalidRequest.of("token_ids", f"{len(request.token_ids)} ids; at most {most} are allowed")
        ids = convert.token_ids(request.token_ids, info.limits.vocab_size, "token_ids")
        text = await self._encoder.decode(
            engine.tokenizer,
            ids,
            caller=caller_of("", self._gate.address(context.peer())),
            skip_special_tokens=request.skip_special_tokens,
        )
        return tokenization_pb2.DetokenizeResponse(text=text)

    def _copy(self, request: EngineRequest, model: str) -> None:
        """Send a copy of the request to the model's mirror, if it has one that can take it."""
        copy_to = self._deployments.mirror_of(model)
        # A grammar is compiled for one engine's vocabulary; a handoff can be used once.
        is_whole = not (request.prefill_only or request.handoff)
        if copy_to is not None and request.grammar is None and is_whole:
            self._mirror.copy(request, model, copy_to.name, copy_to.dispatcher)

    async def _with_grammar(self, request: EngineRequest, engine: Engine) -> EngineRequest:
        """Have the request's constraint compiled, if it has one. Raises InvalidRequest, DeadlinePassed, Overloaded."""
        constraint = request.sampling.constraint
        if constraint is None:
            return request
        grammar = await self._grammars.prepare(
            engine,
            constraint,
            tenant=caller_of(request.tenant, request.client_address),
            deadline=request.deadline,
        )
        return replace(request, grammar=grammar)

    async def _embed_prompt(
        self, item: embedding_pb2.EmbedInput, prefix: str, engine: Engine, info: EngineInfo, caller: str
    ) -> tuple[int, ...]:
        convert.one_prompt(item.text, item.token_ids, self._settings.max_prompt_bytes, prefix)
        if item.token_ids:
            ids = convert.token_ids(item.token_ids, info.limits.vocab_size, f"{prefix}token_ids")
        else:
            most = info.limits.max_context_tokens
            ids = await self._encoder.prompt(
                engine.tokenizer, item.text, most, f"{prefix}text", caller=caller
            )
        if len(ids) > info.limits.max_context_tokens:
            limit = info.limits.max_context_tokens
            raise InvalidRequest.of(f"{prefix}text", f"{len(ids)} tokens; the model's context is {limit}")
        return ids

    async def _serve(self, call: _Call, context: Context) -> None:
        """Answer from the deployment that the route chooses, or from another one if that is lost before it begins."""
        await self._travel(call, self._failover.begin(call.model, call.options), context)

    async def move(
        self, request: EngineRequest, lost: Lost, error: TwinjetError, session: str, context: Context
    ) -> None:
        """Serve on, elsewhere, a request that was accepted and has failed where it was. Raises error if it cannot."""
        options = convert.Options(
            request.request_id, tenant=request.tenant, cache_salt=request.cache_salt, session=session
        )
        arrival = _Arrival(lost.arrived_at, request.deadline, request.trace_headers, request.client_address)

        async def encode(engine: Engine, info: EngineInfo) -> _Prompt:
            return _Prompt(request.prompt_token_ids, "token_ids")

        call = _Call(
            lost.model, "generate", lost.wish, options, arrival, encode, request.sampling.seed, lost.stream
        )
        journey = self._failover.begin(lost.model, options, lost.deployment)
        journey.go_on(error, has_begun=call.has_begun)
        await self._travel(call, journey, context)

    async def _travel(self, call: _Call, journey: Journey, context: Context) -> None:
        with contextlib.ExitStack() as held:
            while True:
                try:
                    return await self._attempt(call, journey.deployment, context, held)
                except TwinjetError as error:
                    journey.go_on(error, has_begun=call.has_begun)

    async def _attempt(
        self, call: _Call, deployment: Deployment, context: Context, held: contextlib.ExitStack
    ) -> None:
        """Answer from one deployment. held: what the call holds over all attempts."""
        engine, info = deployment.ready()
        _need(info, call.capability)
        options = call.options
        _check_priority(options.priority, deployment.dispatcher.max_priority)
        deployment.dispatcher.check(options.request_id, options.tenant, call.arrival.client_address)
        request = _accept(await call.encode(engine, info), call, info)
        request = await self._with_grammar(request, engine)
        if call.stream is None:
            self._copy(request, call.model)
            held.enter_context(self._live.hold(call))
            await context.send_initial_metadata(_told_at_once(request))
        await self._stream(call, request, deployment, engine, info, context)

    async def _stream(
        self,
        call: _Call,
        request: EngineRequest,
        deployment: Deployment,
        engine: Engine,
        info: EngineInfo,
        context: Context,
    ) -> None:
        stream = call.stream = make_stream(
            engine.tokenizer.vocabulary,
            request.sampling,
            info.eos_token_ids,
            request_id=request.request_id,
            model=call.model,
            engine=info.name,
            deployment=deployment.name,
            sampler=info.sampler.implementation,
            num_prompt_tokens=len(request.prompt_token_ids),
            seed=request.sampling.seed,
            arrived_at=call.arrival.at,
            max_pending_bytes=self._settings.max_pending_bytes,
        )
        writer = StreamWriter(context.write)
        check = self._grammars.output_check(request)
        ticket = deployment.dispatcher.open(
            request,
            stream,
            report_queue=call.options.report_queue,
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
            self._metrics.observe_finished(call.model, deployment.name, stream)
        finally:
            # Reached by success, by cancellation and, when gRPC drops a handler that is blocked in a
            # write, by GeneratorExit, which allows no await.
            self._watch.discard(writer)
            writer.close()
            ticket.close()


def _accept(prompt: _Prompt, call: _Call, info: EngineInfo) -> EngineRequest:
    """Check everything that needs no engine, and make the engine's request."""
    options, arrival = call.options, call.arrival
    num_tokens = len(prompt.token_ids)
    _check_length(num_tokens, prompt.field, info)
    seed = call.seed if options.handoff_seed is None else options.handoff_seed
    sampling = call.wish.resolve(info, num_prompt_tokens=num_tokens, seed=seed)
    if options.priority and "priority" not in info.capabilities:
        raise Unsupported("priority")
    if options.adapter and "adapters" not in info.capabilities:
        raise NotFound("adapter", options.adapter, "this model has no adapters")
    if options.data_parallel_rank is not None:
        _need(info, "data_parallel_rank")
    if options.kv_retention is not None:
        _need(info, "kv_retention")
    if options.prefill_only or options.handoff:
        _check_parts(options, sampling, info)
    if arrival.deadline is not None and arrival.deadline <= time.monotonic():
        raise DeadlinePassed("the deadline passed before the request was accepted")
    return EngineRequest(
        request_id=options.request_id,
        prompt_token_ids=prompt.token_ids,
        sampling=sampling,
        priority=options.priority,
        tenant=options.tenant,
        client_address=arrival.client_address,
        cache_salt=options.cache_salt,
        adapter=options.adapter,
        deadline=arrival.deadline,
        data_parallel_rank=options.data_parallel_rank,
        kv_retention=options.kv_retention,
        trace_headers=arrival.trace_headers,
        prefill_only=options.prefill_only,
        handoff=options.handoff,
    )


def _check_length(num_tokens: int, field: str, info: EngineInfo) -> None:
    limit = info.limits.max_context_tokens
    if not 1 <= num_tokens < limit:
        raise InvalidRequest.of(
            field,
            f"the prompt has {num_tokens} tokens; the model's context is {limit}, allowed: 1 to {limit - 1}",
        )


def _check_priority(priority: int, most: int) -> None:
    if priority > most:
        raise InvalidRequest.of(
            "options.priority", f"{priority} is out of range; allowed here: -100 to {most}"
        )


def _check_parts(options: convert.Options, sampling: Sampling, info: EngineInfo) -> None:
    """Check a request whose prompt and output are computed apart."""
    _need(info, "prefill_only" if options.prefill_only else "handoff")
    if sampling.n > 1:
        raise InvalidRequest.of(
            "sampling.n",
            f"{sampling.n} outputs cannot be handed over; allowed: 1 with prefill_only or handoff",
        )
    if options.handoff and sampling.prompt_logprobs is not None:
        raise InvalidRequest.of("sampling.prompt_logprobs", "come with the prefill, not with its handoff")


def _told_at_once(request: EngineRequest) -> tuple[tuple[str, str], ...]:
    """Initial metadata of an accepted request."""
    accepted_id = (ACCEPTED_ID_KEY, request.request_id)
    key = prefix_key(request.prompt_token_ids, request.cache_salt, request.adapter)
    return (accepted_id, (PREFIX_KEY, key)) if key else (accepted_id,)


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
