"""ModelService: what is served, and its adapters."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from twinjet.engines.base import AdapterEngine
from twinjet.engines.supervisor import State
from twinjet.errors import InvalidRequest, Unsupported
from twinjet.server import convert
from twinjet.server.admin import authorise
from twinjet.v1 import model_pb2 as pb

if TYPE_CHECKING:
    from twinjet.server.deployments import Deployment, Deployments

_STATES = {
    State.LOADING: pb.MODEL_STATE_LOADING,
    State.READY: pb.MODEL_STATE_READY,
    State.RESTARTING: pb.MODEL_STATE_RESTARTING,
    State.FAILED: pb.MODEL_STATE_FAILED,
}


class ModelServicer:
    """See proto ModelService. token: of those who may change adapters, as AdminService's."""

    def __init__(self, deployments: Deployments, token: str) -> None:
        self._deployments = deployments
        self._token = token

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[self._describe(name) for name in self._deployments.models])

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self._describe(self._deployments.resolve(request.model)))

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> pb.LoadAdapterResponse:
        authorise(self._token, context)
        if not 1 <= len(request.name.encode()) <= convert.MAX_LABEL_BYTES:
            raise InvalidRequest.of("name", f"must have 1 to {convert.MAX_LABEL_BYTES} bytes")
        if not os.path.isabs(request.path):
            raise InvalidRequest.of("path", "must be an absolute folder on the server")
        loaded = [
            await engine.load_adapter(request.name, request.path)
            for engine in self._adapter_engines(request.model)
        ]
        return pb.LoadAdapterResponse(already_loaded=all(loaded))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Any) -> pb.UnloadAdapterResponse:
        authorise(self._token, context)
        for engine in self._adapter_engines(request.model):
            await engine.unload_adapter(request.name)
        return pb.UnloadAdapterResponse()

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        adapters: dict[str, str] = {}
        for engine in self._adapter_engines(request.model):
            adapters |= engine.adapters()
        items = [pb.Adapter(name=name, path=path) for name, path in sorted(adapters.items())]
        return pb.ListAdaptersResponse(adapters=items)

    def _adapter_engines(self, model: str) -> list[AdapterEngine]:
        engines: list[AdapterEngine] = []
        for deployment in self._deployments.of_model(self._deployments.resolve(model)):
            engine, info = deployment.ready()
            if "adapters" not in info.capabilities:
                raise Unsupported("adapters")
            engines.append(cast("AdapterEngine", engine))
        return engines

    def _describe(self, name: str) -> pb.Model:
        deployment = self._best(name)
        supervisor = deployment.supervisor
        model = pb.Model(
            name=name,
            state=_STATES[supervisor.state],
            failure=supervisor.failure,
            deployment=deployment.name,
            engine=pb.EngineInfo(name=deployment.settings.engine, source=deployment.settings.model),
        )
        if self._deployments.is_draining and supervisor.state is State.READY:
            model.state = pb.MODEL_STATE_DRAINING
        if supervisor.state in (State.LOADING, State.RESTARTING):
            model.loading.phase = supervisor.progress.phase
            model.loading.done = supervisor.progress.done
            model.loading.elapsed.CopyFrom(convert.duration(supervisor.elapsed_s))
        if supervisor.info is not None:
            convert.fill_engine_info(model, supervisor.info)
        return model

    def _best(self, name: str) -> Deployment:
        """The deployment to describe: the first that is ready, else the first."""
        candidates = self._deployments.of_model(name)
        return next((d for d in candidates if d.supervisor.state is State.READY), candidates[0])
