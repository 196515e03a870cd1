"""openengine.v1.Control: what the server and its models are and can do, health, load, abort, adapters."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import secrets
import time
from typing import TYPE_CHECKING

from twinjet.engines.supervisor import State
from twinjet.errors import (
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    TwinjetError,
    Unavailable,
    Unsupported,
    Violation,
)
from twinjet.protocols.openengine import kv
from twinjet.protocols.openengine.inference import public_name, sources
from twinjet.protocols.openengine.v1 import (
    kv_pb2,
    lifecycle_pb2,
    lora_pb2,
    model_pb2,
    server_pb2,
)
from twinjet.request import EngineRequest, SamplingOverrides, resolve_sampling
from twinjet.server.admin import authorise
from twinjet.v1 import model_pb2 as our_model_pb2

if TYPE_CHECKING:
    import grpc

    from twinjet.engines.base import Capability, EngineInfo
    from twinjet.protocols.openengine.inference import Running
    from twinjet.server.deployments import Deployment, Deployments
    from twinjet.server.models import ModelServicer

    Context = grpc.aio.ServicerContext[object, object]

SCHEMA_REVISION = 1
SCHEMA_RELEASE = "v0.1.0"
PROBE_S = 30.0
"""How long an inference probe may take."""
ABORT_S = 10.0
"""How long an aborted request may take to end."""

_GUIDES: dict[Capability, tuple[model_pb2.GuidedDecodingMode.ValueType, ...]] = {
    "json_schema": (model_pb2.GUIDED_DECODING_MODE_JSON_SCHEMA, model_pb2.GUIDED_DECODING_MODE_JSON_OBJECT),
    "regex": (model_pb2.GUIDED_DECODING_MODE_REGEX,),
    "ebnf": (model_pb2.GUIDED_DECODING_MODE_EBNF_GRAMMAR,),
    "structural_tag": (model_pb2.GUIDED_DECODING_MODE_STRUCTURAL_TAG,),
    "choice": (model_pb2.GUIDED_DECODING_MODE_CHOICE,),
}
_STATES = {
    State.LOADING: lifecycle_pb2.HEALTH_STATE_STARTING,
    State.RESTARTING: lifecycle_pb2.HEALTH_STATE_STARTING,
    State.READY: lifecycle_pb2.HEALTH_STATE_READY,
    State.FAILED: lifecycle_pb2.HEALTH_STATE_NOT_READY,
}
# From worst to best.
_ORDER = (
    lifecycle_pb2.HEALTH_STATE_NOT_READY,
    lifecycle_pb2.HEALTH_STATE_DRAINING,
    lifecycle_pb2.HEALTH_STATE_STARTING,
    lifecycle_pb2.HEALTH_STATE_DEGRADED,
    lifecycle_pb2.HEALTH_STATE_READY,
)


class ControlServicer:
    """See proto openengine.v1.Control. token: of the admin setting."""

    def __init__(self, deployments: Deployments, models: ModelServicer, running: Running, token: str) -> None:
        self._deployments = deployments
        self._models = models
        self._running = running
        self._token = token
        self._instance_id = secrets.token_hex(8)
        self._adapter_ids: dict[str, int] = {}

    async def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: Context
    ) -> server_pb2.ServerInfo:
        info = server_pb2.ServerInfo(
            engine_name="twinjet",
            engine_version=_version(),
            engine_role=server_pb2.ENGINE_ROLE_AGGREGATED,
            instance_id=self._instance_id,
            supported_models=self._deployments.models,
            schema_revision=SCHEMA_REVISION,
            minimum_client_revision=SCHEMA_REVISION,
            schema_release=SCHEMA_RELEASE,
        )
        info.kv_connector.enabled = False
        deployments = list(self._deployments.by_name.values())
        if len(deployments) == 1 and deployments[0].is_ready:
            _, engine = deployments[0].ready()
            info.capacity.max_running_requests = engine.limits.max_num_seqs
            if engine.kv_cache is not None:
                info.capacity.kv_block_size = engine.kv_cache.block_size
                info.capacity.total_kv_blocks = engine.kv_cache.num_blocks
        return info

    async def GetModelInfo(
        self, request: model_pb2.GetModelInfoRequest, context: Context
    ) -> model_pb2.ModelInfo:
        name = public_name(self._deployments, request.model)
        infos = self._ready_infos(name)
        can = frozenset.intersection(*(info.capabilities for info in infos))
        if "generate" not in can:
            raise Unsupported("generate")
        source, *others = sources(self._deployments, name)
        max_context = min(info.limits.max_context_tokens for info in infos)
        described = model_pb2.ModelInfo(
            model_id=source,
            served_model_name=name,
            served_model_aliases=[alias for alias in (source, *others) if alias != name],
            max_context_length=max_context,
            max_output_tokens=max_context - 1,
            supports_text_input=True,
            supports_token_ids_input=True,
            supports_lora="adapters" in can,
            supports_multimodal=False,
        )
        _fill_capabilities(described.generation, can, infos)
        return described

    async def GetLoad(self, request: server_pb2.GetLoadRequest, context: Context) -> server_pb2.LoadInfo:
        authorise(self._token, context)
        load = server_pb2.LoadInfo(
            instance_id=self._instance_id,
            timestamp_unix_nanos=time.time_ns(),
            active_kv_sessions=0,
        )
        used: list[int | None] = []
        total: list[int | None] = []
        for deployment in list(self._deployments.by_name.values()):
            ours = deployment.dispatcher.totals()
            theirs = await deployment.supervisor.engine_load()
            load.running_requests += ours.running
            load.queued_requests += ours.waiting
            load.waiting_tokens += ours.waiting_tokens
            used.append(theirs.kv_blocks_used)
            total.append(theirs.kv_blocks_total)
        # A sum of which a part is not known is not known.
        if None not in used:
            load.used_kv_blocks = sum(n for n in used if n is not None)
        if None not in total:
            load.total_kv_blocks = sum(n for n in total if n is not None)
        if request.include_per_rank:
            rank = load.ranks.add(
                data_parallel_rank=0,
                running_requests=load.running_requests,
                queued_requests=load.queued_requests,
            )
            if load.HasField("used_kv_blocks"):
                rank.used_kv_blocks = load.used_kv_blocks
            if load.HasField("total_kv_blocks"):
                rank.total_kv_blocks = load.total_kv_blocks
        return load

    async def Health(
        self, request: lifecycle_pb2.HealthRequest, context: Context
    ) -> lifecycle_pb2.HealthResponse:
        response = lifecycle_pb2.HealthResponse()
        if request.role not in (server_pb2.ENGINE_ROLE_UNSPECIFIED, server_pb2.ENGINE_ROLE_AGGREGATED):
            response.checks.add(
                name="role", state=lifecycle_pb2.HEALTH_STATE_NOT_READY, message="the role here is AGGREGATED"
            )
        names = [public_name(self._deployments, request.model)] if request.model else self._deployments.models
        for name in names:
            check = response.checks.add(name=f"model:{name}")
            check.state, check.message = self._model_health(name)
            if request.include_inference_probe and self._deployments.is_serving(name):
                probe = response.checks.add(name=f"probe:{name}")
                probe.state, probe.message = await self._probe(name)
        response.state = min((check.state for check in response.checks), key=_ORDER.index)
        return response

    async def Abort(
        self, request: lifecycle_pb2.AbortRequest, context: Context
    ) -> lifecycle_pb2.AbortResponse:
        match request.WhichOneof("target"):
            case "request_id":
                aborted = await self._abort(request.request_id)
                if not aborted and not self._running.has_finished(request.request_id):
                    raise NotFound("request", request.request_id)
            case "all_requests":
                authorise(self._token, context)
                live = self._running.live
                aborted = any(await asyncio.gather(*map(self._abort, live)))
            case "kv_session":
                raise Unsupported("kv_session", "no KV blocks are held for others")
            case _:
                raise InvalidRequest.of("target", "nothing is named; set request_id or all_requests")
        if aborted:
            return lifecycle_pb2.AbortResponse(status=lifecycle_pb2.ABORT_STATUS_ABORTED)
        return lifecycle_pb2.AbortResponse(
            status=lifecycle_pb2.ABORT_STATUS_ALREADY_FINISHED, message="the request had ended before"
        )

    async def LoadLora(
        self, request: lora_pb2.LoadLoraRequest, context: Context
    ) -> lora_pb2.LoadLoraResponse:
        adapter = request.adapter
        ours = our_model_pb2.LoadAdapterRequest(
            model=self._only_model(), name=adapter.lora_name, path=adapter.source_path
        )
        try:
            answer = await self._models.LoadAdapter(ours, context)
        except InvalidRequest as error:
            names = {"name": "adapter.lora_name", "path": "adapter.source_path"}
            raise InvalidRequest(
                [Violation(names.get(v.field, v.field), v.message) for v in error.violations]
            ) from error
        return lora_pb2.LoadLoraResponse(
            adapter=self._adapter(adapter.lora_name, adapter.source_path),
            already_loaded=answer.already_loaded,
        )

    async def UnloadLora(
        self, request: lora_pb2.UnloadLoraRequest, context: Context
    ) -> lora_pb2.UnloadLoraResponse:
        authorise(self._token, context)
        model = self._only_model()
        listed = await self._models.ListAdapters(our_model_pb2.ListAdaptersRequest(model=model), context)
        paths = {adapter.name: adapter.path for adapter in listed.adapters}
        ours = our_model_pb2.UnloadAdapterRequest(model=model, name=request.lora_name)
        await self._models.UnloadAdapter(ours, context)
        gone = self._adapter(request.lora_name, paths.get(request.lora_name, ""))
        return lora_pb2.UnloadLoraResponse(adapter=gone)

    async def ListLoras(
        self, request: lora_pb2.ListLorasRequest, context: Context
    ) -> lora_pb2.ListLorasResponse:
        ours = our_model_pb2.ListAdaptersRequest(model=self._only_model())
        listed = await self._models.ListAdapters(ours, context)
        return lora_pb2.ListLorasResponse(adapters=[self._adapter(a.name, a.path) for a in listed.adapters])

    async def GetKvEventSources(
        self, request: kv_pb2.GetKvEventSourcesRequest, context: Context
    ) -> kv_pb2.GetKvEventSourcesResponse:
        kv.check_ranks(request.data_parallel_ranks)
        return kv_pb2.GetKvEventSourcesResponse(sources=kv.sources(self._deployments))

    async def SubscribeKvEvents(self, request: kv_pb2.SubscribeKvEventsRequest, context: Context) -> None:
        authorise(self._token, context)
        await kv.subscribe(self._deployments, request, context, self.adapter_id)

    def adapter_id(self, name: str) -> int:
        """This server's number for an adapter's name, from 1 on."""
        return self._adapter_ids.setdefault(name, len(self._adapter_ids) + 1)

    def _only_model(self) -> str:
        """The model whose adapters are meant: these requests name none. Raises PreconditionFailed if there are several."""
        models = self._deployments.models
        if len(models) > 1:
            raise PreconditionFailed(
                f"this server has {', '.join(models)}; name one to twinjet.v1.ModelService",
                reason="SEVERAL_MODELS",
            )
        return models[0]

    def _adapter(self, name: str, path: str) -> lora_pb2.LoraAdapter:
        return lora_pb2.LoraAdapter(lora_id=self.adapter_id(name), lora_name=name, source_path=path)

    def _ready_infos(self, name: str) -> list[EngineInfo]:
        """What the engines behind a model say. Raises Unavailable if none is ready."""
        infos = [d.ready()[1] for d in self._deployments.of_model(name) if d.is_ready]
        if not infos:
            self._deployments.pick(name)
            raise Unavailable(f"model {name!r} is not ready", reason="LOADING", retry_after_s=1)
        return infos

    def _model_health(self, name: str) -> tuple[lifecycle_pb2.HealthState.ValueType, str]:
        if self._deployments.is_draining:
            return lifecycle_pb2.HEALTH_STATE_DRAINING, "the server is draining"
        deployments = self._deployments.of_model(name)
        states = {d.name: _STATES[d.supervisor.state] for d in deployments}
        ready = lifecycle_pb2.HEALTH_STATE_READY
        if all(state == ready for state in states.values()):
            return ready, ""
        away = ", ".join(n for n, state in states.items() if state != ready)
        if ready in states.values():
            return lifecycle_pb2.HEALTH_STATE_DEGRADED, f"not ready: {away}"
        why = "; ".join(_why(d) for d in deployments)
        return max(states.values(), key=_ORDER.index), why

    async def _probe(self, name: str) -> tuple[lifecycle_pb2.HealthState.ValueType, str]:
        """Have one token made."""
        try:
            deployment = self._deployments.pick(name)
            _, info = deployment.ready()
            sampling = resolve_sampling(
                SamplingOverrides(max_tokens=1, temperature=0.0), info, num_prompt_tokens=1, seed=0
            )
            request = EngineRequest(
                request_id=f"probe-{secrets.token_hex(8)}",
                prompt_token_ids=(0,),
                sampling=sampling,
                deadline=time.monotonic() + PROBE_S,
            )
            async with contextlib.aclosing(deployment.dispatcher.run(request)) as events:
                async for _ in events:
                    pass
        except TwinjetError as error:
            return lifecycle_pb2.HEALTH_STATE_NOT_READY, str(error)
        return lifecycle_pb2.HEALTH_STATE_READY, ""

    async def _abort(self, request_id: str) -> bool:
        """Abort a request of this protocol and wait for its end; False if it does not run."""
        if not self._running.is_live(request_id):
            return False
        for deployment in list(self._deployments.by_name.values()):
            try:
                await deployment.dispatcher.abort(request_id)
            except NotFound:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ABORT_S):
                    await self._running.wait(request_id)
            return True
        return False


def _version() -> str:
    try:
        return importlib.metadata.version("twinjet")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # a source tree that is not installed


def _why(deployment: Deployment) -> str:
    supervisor = deployment.supervisor
    return supervisor.failure or f"{deployment.name}: {supervisor.progress.phase or 'loading'}"


def _fill_capabilities(
    generation: model_pb2.GenerationCapabilities, can: frozenset[Capability], infos: list[EngineInfo]
) -> None:
    max_top = min(info.limits.max_logprobs for info in infos)
    for name, message in (
        ("prompt_logprobs", generation.prompt_logprobs),
        ("logprobs", generation.output_logprobs),
    ):
        message.supported = name in can
        if message.supported:
            message.candidate_selection_modes.append(model_pb2.CANDIDATE_TOKEN_SELECTION_MODE_TOP_N)
            message.max_top_n = max_top
    modes = [mode for capability, found in _GUIDES.items() if capability in can for mode in found]
    generation.guided_decoding.supported = bool(modes)
    generation.guided_decoding.modes.extend(modes)
    most = min(info.limits.max_outputs for info in infos)
    generation.max_num_sequences = most if "multiple_outputs" in can else 1
    generation.supports_priority = "priority" in can
    generation.supports_stop_in_output = True
    generation.supports_cache_salt = "prefix_cache" in can
    generation.supports_prefix_cache_bypass = False
