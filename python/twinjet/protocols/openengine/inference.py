"""openengine.v1.Inference on top of InferenceService: what that checks, refuses, counts and bounds holds here too."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from twinjet.errors import InvalidRequest, NotFound, SlowReader, TwinjetError
from twinjet.protocols.openengine import requests
from twinjet.protocols.openengine.events import Translator
from twinjet.server.handlers import ErrorTold
from twinjet.server.inference import ACCEPTED_ID_KEY
from twinjet.v1 import generation_pb2 as ours

if TYPE_CHECKING:
    import grpc

    from twinjet.config import OpenEngineSettings
    from twinjet.protocols.openengine.v1 import generation_pb2 as pb
    from twinjet.server.deployments import Deployments
    from twinjet.server.inference import InferenceServicer as OurInference

    Context = grpc.aio.ServicerContext[object, object]

logger = logging.getLogger("twinjet.openengine")

MAX_FINISHED = 16_384
"""Ids of requests that are over, remembered for an Abort that comes late."""


class Running:
    """The requests that came by this protocol, by id: those that run, and the last ones that have ended."""

    def __init__(self) -> None:
        self._live: dict[str, asyncio.Event] = {}
        self._finished: OrderedDict[str, None] = OrderedDict()

    @property
    def live(self) -> tuple[str, ...]:
        return tuple(self._live)

    def begin(self, request_id: str) -> None:
        self._live[request_id] = asyncio.Event()

    def end(self, request_id: str) -> None:
        if (over := self._live.pop(request_id, None)) is not None:
            over.set()
        self._finished[request_id] = None
        self._finished.move_to_end(request_id)
        if len(self._finished) > MAX_FINISHED:
            self._finished.popitem(last=False)

    def is_live(self, request_id: str) -> bool:
        return request_id in self._live

    def has_finished(self, request_id: str) -> bool:
        return request_id in self._finished

    async def wait(self, request_id: str) -> None:
        """Return when the request is over."""
        if (over := self._live.get(request_id)) is not None:
            await over.wait()


class InferenceServicer:
    """See proto openengine.v1.Inference."""

    def __init__(
        self,
        inference: OurInference,
        deployments: Deployments,
        settings: OpenEngineSettings,
        running: Running,
    ) -> None:
        self._inference = inference
        self._deployments = deployments
        self._settings = settings
        self._running = running

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        translated = requests.generate_request(
            request,
            requests.metadata_of(context),
            model=public_name(self._deployments, request.model),
            tenant=self._settings.tenant,
        )
        translator = Translator(
            max(translated.sampling.n, 1),
            wants_text=requests.wants_text(request),
            token_texts=self._token_texts(),
            prompt_start=request.response.prompt_logprob_start,
        )
        async with self._call(context, translator) as call:
            await self._inference.Generate(translated, cast("Any", call))

    @asynccontextmanager
    async def _call(self, context: Context, translator: Translator) -> AsyncIterator[_Call]:
        """Run a call of ours; say its failure as the protocol does: a status before, an event after acceptance."""
        call = _Call(context, translator, self._running, self._settings.deadline_s)
        try:
            yield call
        except SlowReader:
            # Nothing more can be told to who does not read.
            raise
        except InvalidRequest as error:
            if not translator.has_started:
                raise requests.in_their_words(error) from error
            await call.tell(error)
        except Exception as error:
            if not translator.has_started:
                raise
            if not isinstance(error, TwinjetError):
                logger.exception("Generate failed")
            await call.tell(error)
        finally:
            call.close()

    def _token_texts(self) -> Callable[[str], Callable[[int], str]]:
        # One that is being removed still serves what it has, and is not listed any more.
        known = dict(self._deployments.by_name)

        def of(deployment: str) -> Callable[[int], str]:
            engine, _ = (self._deployments.by_name.get(deployment) or known[deployment]).ready()
            return engine.tokenizer.vocabulary.token_text

        return of


class _Call:
    """What InferenceService sees of the call: a context that translates what is written to it."""

    def __init__(self, context: Context, translator: Translator, running: Running, deadline_s: float) -> None:
        self._context: Any = context
        self._translator = translator
        self._running = running
        self._request_id = ""
        self._deadline = time.monotonic() + deadline_s if deadline_s else None

    def peer(self) -> str:
        return str(self._context.peer())

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata()

    def time_remaining(self) -> float | None:
        left_s = self._context.time_remaining()
        if left_s is None and self._deadline is not None:
            return max(self._deadline - time.monotonic(), 0.0)
        return cast("float | None", left_s)

    async def send_initial_metadata(self, metadata: Any) -> None:
        """The request has its id. Nothing is sent yet: it can still be refused with a status."""
        self._request_id = dict(metadata)[ACCEPTED_ID_KEY]
        if not self._running.is_live(self._request_id):
            self._running.begin(self._request_id)
        else:
            self._request_id = ""

    async def write(self, message: bytes) -> None:
        for response in self._translator.translate(ours.GenerateResponse.FromString(message)):
            await self._context.write(response)

    async def tell(self, error: Exception) -> None:
        for response in self._translator.end(error):
            await self._context.write(response)
        raise ErrorTold(error)

    def close(self) -> None:
        if self._request_id:
            self._running.end(self._request_id)


def public_name(deployments: Deployments, model: str) -> str:
    """Give the public name for a model field, which may be the configured source of a model instead.

    Raises NotFound, InvalidRequest.
    """
    if not model or model in deployments.table.routes:
        return deployments.resolve(model)
    found = [name for name in deployments.models if model in sources(deployments, name)]
    if len(found) > 1:
        raise InvalidRequest.of(
            "model", f"{model[:200]!r} is the source of several; set one of {', '.join(found)}"
        )
    if not found:
        raise NotFound("model", model, f"this server has {', '.join(deployments.models)}")
    return found[0]


def sources(deployments: Deployments, name: str) -> list[str]:
    """Where the weights of a model come from, as configured and as its engines say, each once."""
    found: dict[str, None] = {}
    for deployment in deployments.of_model(name):
        found[deployment.settings.model] = None
        if deployment.supervisor.info is not None and deployment.supervisor.info.source:
            found[deployment.supervisor.info.source] = None
    return list(found)
