"""WatchKvEvents: an engine's journal of KV blocks as messages of the contract."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from twinjet.engines.base import KvCleared, KvEvent, KvEventEngine, KvRemoved, KvStored
from twinjet.errors import InvalidRequest, NotFound, Unavailable, Unsupported
from twinjet.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    import grpc

    from twinjet.engines.kv_journal import KvBatch
    from twinjet.server.deployments import Deployment, Deployments

    Context = grpc.aio.ServicerContext[object, object]

DEFAULT_HEARTBEAT_S = 10.0
MIN_HEARTBEAT_S = 0.1
MAX_HEARTBEAT_S = 3600.0
RETRY_S = 1.0
MAX_EPOCH_BYTES = 128

_KINDS = {
    "delta": pb.KV_BATCH_KIND_DELTA,
    "snapshot": pb.KV_BATCH_KIND_SNAPSHOT,
    "snapshot_end": pb.KV_BATCH_KIND_SNAPSHOT_END,
    "heartbeat": pb.KV_BATCH_KIND_HEARTBEAT,
}
_MEDIA = {
    None: pb.KV_MEDIUM_UNSPECIFIED,
    "device": pb.KV_MEDIUM_DEVICE,
    "host": pb.KV_MEDIUM_HOST,
    "disk": pb.KV_MEDIUM_DISK,
}


async def watch_kv_events(
    deployments: Deployments, request: pb.WatchKvEventsRequest, context: Context
) -> None:
    """Write what the watcher asks for until the engine ends. Raises Unavailable then."""
    heartbeat_s = _heartbeat_s(request)
    if len(request.epoch.encode()) > MAX_EPOCH_BYTES:
        raise InvalidRequest.of("epoch", f"is longer than {MAX_EPOCH_BYTES} bytes")
    deployment = _deployment(deployments, request)
    engine, info = deployment.ready()
    if "kv_events" not in info.capabilities:
        raise Unsupported("kv_events")
    journal = cast("KvEventEngine", engine).kv_journal
    async with aclosing(journal.watch(request.epoch, request.start_sequence, heartbeat_s)) as batches:
        async for batch in batches:
            await context.write(_message(batch, journal.epoch, deployment.name))
    raise Unavailable("the engine has ended", reason="ENGINE_ENDED", retry_after_s=RETRY_S)


def _deployment(deployments: Deployments, request: pb.WatchKvEventsRequest) -> Deployment:
    candidates = {d.name: d for d in deployments.of_model(deployments.resolve(request.model))}
    names = ", ".join(candidates)
    if not request.deployment:
        if len(candidates) > 1:
            raise InvalidRequest.of(
                "deployment", f"is empty, and several stand behind the model; set one of {names}"
            )
        return next(iter(candidates.values()))
    if request.deployment not in candidates:
        raise NotFound("deployment", request.deployment, f"the model has {names}")
    return candidates[request.deployment]


def _heartbeat_s(request: pb.WatchKvEventsRequest) -> float:
    if not request.HasField("heartbeat_interval"):
        return DEFAULT_HEARTBEAT_S
    seconds = request.heartbeat_interval.seconds + request.heartbeat_interval.nanos / 1e9
    if not MIN_HEARTBEAT_S <= seconds <= MAX_HEARTBEAT_S:
        raise InvalidRequest.of(
            "heartbeat_interval",
            f"{seconds:g} s is out of range; allowed: {MIN_HEARTBEAT_S:g} to {MAX_HEARTBEAT_S:g} s",
        )
    return seconds


def _message(batch: KvBatch, epoch: str, deployment: str) -> pb.WatchKvEventsResponse:
    message = pb.WatchKvEventsResponse(
        sequence=batch.sequence,
        events=map(_event, batch.events),
        epoch=epoch,
        kind=_KINDS[batch.kind],
        deployment=deployment,
    )
    message.time.FromNanoseconds(int(batch.time_s * 1e9))
    return message


def _event(event: KvEvent) -> pb.KvEvent:
    match event:
        case KvStored():
            stored = pb.KvBlocksStored(
                block_hashes=event.block_hashes,
                parent_hash=event.parent_hash,
                token_ids=event.token_ids,
                block_size=event.block_size,
                salt=event.facts.salt,
                adapter=event.facts.adapter,
                medium=_MEDIA[event.facts.medium],
            )
            return pb.KvEvent(stored=stored)
        case KvRemoved():
            return pb.KvEvent(removed=pb.KvBlocksRemoved(block_hashes=event.block_hashes))
        case KvCleared():
            return pb.KvEvent(cleared=pb.KvCleared())
