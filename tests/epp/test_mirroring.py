"""KV events of a stand-in for a replica: snapshot and deltas, a restart that goes on, and a replica that lies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from tests.epp.replicas import until
from twinjet._core import EppPrompt
from twinjet.epp.main import Epp
from twinjet.epp.mirroring import EventError, Mirrored
from twinjet.epp.picking import Ask, EndpointPicker, ModelFacts, Replica
from twinjet.epp.settings import EppConfig, IndexSettings, PickingSettings, SheddingSettings
from twinjet.scheduler.orca import OrcaReport
from twinjet.v1 import admin_pb2, generation_pb2, model_pb2, service_pb2, service_pb2_grpc

SIZE = 16
DELTA, SNAPSHOT = admin_pb2.KV_BATCH_KIND_DELTA, admin_pb2.KV_BATCH_KIND_SNAPSHOT
SNAPSHOT_END, HEARTBEAT = admin_pb2.KV_BATCH_KIND_SNAPSHOT_END, admin_pb2.KV_BATCH_KIND_HEARTBEAT


def names(tokens: list[int]) -> list[bytes]:
    """Block hashes as some engine makes them."""
    return [repr(tokens[: end * SIZE]).encode()[-16:].rjust(16) for end in range(1, len(tokens) // SIZE + 1)]


def stored(tokens: list[int], start: int = 0, **fields: Any) -> admin_pb2.KvEvent:
    blocks = names(tokens)
    parent = blocks[start - 1] if start else b""
    return admin_pb2.KvEvent(
        stored=admin_pb2.KvBlocksStored(
            block_hashes=blocks[start:],
            parent_hash=parent,
            token_ids=tokens[start * SIZE :],
            block_size=SIZE,
            **fields,
        )
    )


def removed(*blocks: bytes) -> admin_pb2.KvEvent:
    return admin_pb2.KvEvent(removed=admin_pb2.KvBlocksRemoved(block_hashes=blocks))


def batch(
    kind: int, sequence: int, *events: admin_pb2.KvEvent, epoch: str = "e"
) -> admin_pb2.WatchKvEventsResponse:
    return admin_pb2.WatchKvEventsResponse(kind=kind, sequence=sequence, events=events, epoch=epoch)  # type: ignore[arg-type]


TOKENS = list(range(1000, 1000 + 10 * SIZE))


def made(max_blocks: int = 1000) -> tuple[EndpointPicker, Replica, Mirrored]:
    picker = EndpointPicker(PickingSettings(), IndexSettings(mode="events"), SheddingSettings())
    ((replica,), _) = picker.set_replicas(["10.0.0.1:1"])
    picker.set_up(replica, is_up=True)
    return picker, replica, Mirrored(picker, replica, "m", max_blocks)


def cached(picker: EndpointPicker, tokens: list[int], model: str = "m", **options: str) -> int:
    """Tokens of a prompt that the picker takes for cached."""
    request = generation_pb2.GenerateRequest(model=model, token_ids=[*tokens, 1, 2], options=options)
    pick = picker.pick(Ask(EppPrompt(request.SerializeToString(), "Generate")))
    picker.finish(pick)
    return pick.cached_tokens


def test_it_holds_what_it_was_told() -> None:
    picker, replica, mirrored = made()
    mirrored.take(batch(SNAPSHOT, 0, stored(TOKENS[: 4 * SIZE])))
    assert not mirrored.can_go_on
    mirrored.take(batch(SNAPSHOT_END, 7, stored(TOKENS, 4)))
    assert cached(picker, TOKENS) == 10 * SIZE and mirrored.can_go_on
    assert cached(picker, TOKENS, cache_salt="other") == 0
    picker.set_facts(replica, {"m": ModelFacts(True, "d")})
    assert cached(picker, TOKENS, model="") == 10 * SIZE
    mirrored.take(batch(DELTA, 8, removed(names(TOKENS)[5])))
    assert cached(picker, TOKENS) == 5 * SIZE
    mirrored.take(batch(HEARTBEAT, 8))
    mirrored.take(batch(DELTA, 9, admin_pb2.KvEvent(cleared=admin_pb2.KvCleared()), stored(TOKENS[:SIZE])))
    assert cached(picker, TOKENS) == SIZE
    mirrored.take(batch(DELTA, 10, stored(TOKENS, salt="s", adapter="a")))
    assert cached(picker, TOKENS, cache_salt="s", adapter="a") == 10 * SIZE
    mirrored.forget()
    assert cached(picker, TOKENS) == 0 and picker.told.num_links == 0


@pytest.mark.parametrize(
    "message",
    [
        batch(DELTA, 9),
        batch(DELTA, 7),
        batch(HEARTBEAT, 8),
        batch(DELTA, 8, epoch="another"),
        batch(
            DELTA, 8, admin_pb2.KvEvent(stored=admin_pb2.KvBlocksStored(block_hashes=[b"x"], block_size=0))
        ),
        batch(
            DELTA, 8, admin_pb2.KvEvent(stored=admin_pb2.KvBlocksStored(block_hashes=[b"x"], block_size=48))
        ),
        batch(
            DELTA, 8, admin_pb2.KvEvent(stored=admin_pb2.KvBlocksStored(block_hashes=[b"x"], block_size=16))
        ),
        batch(DELTA, 8, stored(list(range(2000 * SIZE)))),
    ],
)
def test_what_cannot_be_is_told(message: admin_pb2.WatchKvEventsResponse) -> None:
    _, _, mirrored = made()
    mirrored.take(batch(SNAPSHOT_END, 7, stored(TOKENS)))
    with pytest.raises(EventError):
        mirrored.take(message)


def test_blocks_whose_beginning_is_unknown_are_left_out() -> None:
    picker, _, mirrored = made()
    mirrored.take(batch(SNAPSHOT_END, 7, stored(TOKENS, 4)))
    assert cached(picker, TOKENS) == 0 and picker.told.num_links == 0
    mirrored.take(batch(DELTA, 8, removed(b"never told")))


@dataclass
class StandIn:
    """A replica that answers what a picker asks, and tells events as it is told to."""

    messages: list[admin_pb2.WatchKvEventsResponse] = field(default_factory=list)
    asked: list[admin_pb2.WatchKvEventsRequest] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, *messages: admin_pb2.WatchKvEventsResponse) -> None:
        self.messages += messages
        self.changed.set()
        self.changed = asyncio.Event()

    async def ListModels(self, request: Any, context: Any) -> model_pb2.ListModelsResponse:
        model = model_pb2.Model(name="m", state=model_pb2.MODEL_STATE_READY, deployment="d")
        return model_pb2.ListModelsResponse(models=[model])

    async def WatchKvEvents(self, request: Any, context: Any) -> None:
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        told = 0
        if request.epoch:
            told = sum(m.sequence < request.start_sequence for m in self.messages)
        while True:
            changed = self.changed
            for message in self.messages[told:]:
                await context.write(message)
            told = len(self.messages)
            await changed.wait()

    async def report(self, request: bytes, context: Any) -> None:
        while True:
            await context.write(OrcaReport(0.1, 1, 0, {}, {"waiting": 0.0, "d.serving": 1.0}).encode())
            await asyncio.sleep(0.1)


@asynccontextmanager
async def serving(stand_in: StandIn, port: int = 0) -> AsyncIterator[str]:
    server = grpc.aio.server()
    service_pb2_grpc.add_ModelServiceServicer_to_server(stand_in, server)  # type: ignore[arg-type]
    service_pb2_grpc.add_AdminServiceServicer_to_server(stand_in, server)  # type: ignore[arg-type]
    handler: Any = grpc.unary_stream_rpc_method_handler(stand_in.report)
    name = "xds.service.orca.v3.OpenRcaService"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(name, {"StreamCoreMetrics": handler}),)
    )
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(None)


def stand_in() -> StandIn:
    """Lacks most methods of the services, which nobody calls."""
    one = StandIn()
    others = {m.name for service in ("ModelService", "AdminService") for m in
              service_pb2.DESCRIPTOR.services_by_name[service].methods}  # fmt: skip
    for name in others - {"ListModels", "WatchKvEvents"}:
        setattr(one, name, None)
    return one


@asynccontextmanager
async def picker_over(*addresses: str) -> AsyncIterator[Epp]:
    tree = {
        "server": {"port": 0, "grace_s": 0},
        "replicas": {"addresses": addresses, "report_s": 0.1, "admin_token": "secret"},
        "index": {"mode": "events"},
    }
    epp = Epp(EppConfig.model_validate(tree))
    await epp.start()
    try:
        yield epp
    finally:
        await epp.stop()


async def test_a_picker_that_starts_anew_knows_all_from_the_snapshot() -> None:
    one = stand_in()
    one.tell(batch(SNAPSHOT_END, 4, stored(TOKENS)))
    async with serving(one) as address:
        for start in range(2):
            async with picker_over(address) as epp:
                await until(lambda epp=epp: epp.picker.told.num_links == 10)
                assert cached(epp.picker, TOKENS) == 10 * SIZE
            assert len(one.asked) == start + 1 and not one.asked[-1].epoch
        assert one.metadata[-1]["authorization"] == "Bearer secret"


async def test_a_connection_that_breaks_goes_on_with_the_next_delta() -> None:
    one = stand_in()
    one.tell(batch(SNAPSHOT_END, 4, stored(TOKENS[: 5 * SIZE])))
    running = serving(one)
    address = await running.__aenter__()
    async with picker_over(address) as epp:
        await until(lambda: epp.picker.told.num_links == 5)
        await running.__aexit__(None, None, None)
        await until(lambda: not any(r.is_up for r in epp.picker.replicas.values()))
        one.tell(batch(DELTA, 5, stored(TOKENS, 5)))
        async with serving(one, int(address.rpartition(":")[2])):
            await until(lambda: epp.picker.told.num_links == 10)
    assert (one.asked[-1].epoch, one.asked[-1].start_sequence) == ("e", 5)


async def test_a_gap_makes_it_begin_anew() -> None:
    one = stand_in()
    one.tell(batch(SNAPSHOT_END, 4, stored(TOKENS)))
    async with serving(one) as address, picker_over(address) as epp:
        await until(lambda: epp.picker.told.num_links == 10)
        one.tell(batch(DELTA, 6, stored(TOKENS)))
        await until(lambda: epp.picker.told.num_links == 0)
        one.messages[:] = [batch(SNAPSHOT_END, 9, stored(TOKENS[: 3 * SIZE]))]
        await until(lambda: epp.picker.told.num_links == 3)
        gaps = epp.metrics.registry.get_sample_value("twinjet_epp_event_gaps_total", {"replica": address})
        assert gaps is not None and gaps >= 1
