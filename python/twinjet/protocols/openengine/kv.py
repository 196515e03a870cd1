"""KV events of openengine.v1.Control, from an engine's journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from twinjet.engines.base import KvCleared, KvEvent, KvEventEngine, KvRemoved, KvStored
from twinjet.errors import EngineDied, NotFound, PreconditionFailed, Unsupported
from twinjet.protocols.openengine.events import engine_error
from twinjet.protocols.openengine.v1 import kv_pb2 as pb
from twinjet.server.handlers import ErrorTold

if TYPE_CHECKING:
    import grpc

    from twinjet.engines.kv_journal import KvBatch, KvJournal
    from twinjet.server.deployments import Deployments

    Context = grpc.aio.ServicerContext[object, object]

ENCODING = "raw"
_MEDIA = {
    None: pb.STORAGE_MEDIUM_UNSPECIFIED,
    "device": pb.STORAGE_MEDIUM_GPU,
    "host": pb.STORAGE_MEDIUM_CPU_PINNED,
    "disk": pb.STORAGE_MEDIUM_DISK,
}


def check_ranks(ranks: Sequence[int]) -> None:
    """Raises NotFound for another rank than 0, as which all ranks of an engine appear here."""
    if other := [rank for rank in ranks if rank]:
        raise NotFound("rank", str(other[0]), "there is rank 0 alone")


def sources(deployments: Deployments) -> list[pb.KvEventSource]:
    """Where the KV events of the server's only deployment are published, if anybody may connect there."""
    published = [d.kv_publisher for d in deployments.by_name.values()]
    if len(published) != 1 or published[0] is None or (listens := published[0].listens_at) is None:
        return []
    host, port = listens
    settings = published[0].settings
    return [
        pb.KvEventSource(
            transport="zmq",
            endpoint_addr=pb.KvEndpoint(host=host, port=port, protocol="tcp"),
            topic=settings.topic,
            replay_endpoint=published[0].replay_endpoint,
            data_parallel_rank=0,
            encoding="msgpack",
            buffer_steps=settings.kept_batches,
            hwm=settings.queued_batches,
        )
    ]


async def subscribe(
    deployments: Deployments,
    request: pb.SubscribeKvEventsRequest,
    context: Context,
    adapter_id: Callable[[str], int],
) -> None:
    """Write the events of the server's only deployment until its engine ends, which is told by an error event."""
    check_ranks(request.data_parallel_ranks)
    if len(deployments.by_name) != 1:
        raise PreconditionFailed(
            "this server has several engines; name one to twinjet.v1.AdminService/WatchKvEvents",
            reason="SEVERAL_MODELS",
        )
    (deployment,) = deployments.by_name.values()
    engine, info = deployment.ready()
    if "kv_events" not in info.capabilities:
        raise Unsupported("kv_events")
    journal = cast("KvEventEngine", engine).kv_journal
    async with aclosing(journal.watch(*_beginning(journal, request))) as batches:
        async for batch in batches:
            await context.write(pb.SubscribeKvEventsResponse(batch=_batch(batch, adapter_id)))
    error = EngineDied("the engine has ended")
    await context.write(pb.SubscribeKvEventsResponse(error=engine_error(error)))
    raise ErrorTold(error)


def _beginning(journal: KvJournal, request: pb.SubscribeKvEventsRequest) -> tuple[str, int]:
    if request.include_snapshot:
        return "", 0
    return journal.epoch, request.start_sequence_number or journal.sequence + 1


def _batch(batch: KvBatch, adapter_id: Callable[[str], int]) -> pb.KvEventBatch:
    return pb.KvEventBatch(
        sequence_number=batch.sequence,
        timestamp_unix_nanos=int(batch.time_s * 1e9),
        data_parallel_rank=0,
        events=[_event(event, adapter_id) for event in batch.events],
    )


def _event(event: KvEvent, adapter_id: Callable[[str], int]) -> pb.KvEvent:
    match event:
        case KvStored():
            facts = event.facts
            stored = pb.BlockStored(
                block_hashes=map(_hash, event.block_hashes),
                token_ids=event.token_ids,
                block_size=event.block_size,
                lora_id=adapter_id(facts.adapter) if facts.adapter else 0,
                lora_name=facts.adapter,
                medium=_MEDIA[facts.medium],
            )
            if event.parent_hash:
                stored.parent_block_hash.CopyFrom(_hash(event.parent_hash))
            if facts.salt:
                stored.extra_keys.extend(pb.OpaqueKeyTuple(values=[facts.salt]) for _ in event.block_hashes)
            return pb.KvEvent(block_stored=stored)
        case KvRemoved():
            return pb.KvEvent(block_removed=pb.BlockRemoved(block_hashes=map(_hash, event.block_hashes)))
        case KvCleared():
            return pb.KvEvent(all_blocks_cleared=pb.AllBlocksCleared())


def _hash(value: bytes) -> pb.KvBlockHash:
    return pb.KvBlockHash(value=value, encoding=ENCODING)
