"""WatchKvEvents on the wire: what a request may say, and what a watcher is told."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.server.full_fake import KV_EVENTS, FullFakeEngine
from tests.server.harness import Harness, Serve, details
from twinjet.v1 import admin_pb2 as pb

Watch = pb.WatchKvEventsRequest


@pytest.fixture(autouse=True)
def _engine_with_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinjet.engines.fake.FakeEngine", FullFakeEngine)


async def first(h: Harness, request: pb.WatchKvEventsRequest) -> pb.WatchKvEventsResponse:
    call: Any = h.admin.WatchKvEvents(request)
    message: pb.WatchKvEventsResponse = await call.read()
    call.cancel()
    return message


async def test_a_watch_is_a_snapshot_heartbeats_and_deltas(serve: Serve) -> None:
    h = await serve()
    call: Any = h.admin.WatchKvEvents(Watch(heartbeat_interval=Duration(nanos=100_000_000)))
    snapshot, beat = await call.read(), await call.read()
    assert (snapshot.kind, snapshot.sequence) == (pb.KV_BATCH_KIND_SNAPSHOT_END, len(KV_EVENTS))
    stored = snapshot.events[1].stored
    assert (stored.salt, stored.adapter, stored.medium) == ("salt", "lora", pb.KV_MEDIUM_DEVICE)
    assert (beat.kind, beat.sequence, len(beat.events)) == (pb.KV_BATCH_KIND_HEARTBEAT, len(KV_EVENTS), 0)
    h.engine.kv_journal.put(KV_EVENTS[0])  # type: ignore[attr-defined]
    while (delta := await call.read()).kind == pb.KV_BATCH_KIND_HEARTBEAT:
        continue
    assert (delta.kind, delta.sequence) == (pb.KV_BATCH_KIND_DELTA, len(KV_EVENTS) + 1)
    call.cancel()


async def test_another_start_of_the_engine_is_another_epoch(serve: Serve) -> None:
    h = await serve()
    before = await first(h, Watch())
    h.engine.die()
    await h.until(lambda: len(h.engines) == 2)
    await h.until_ready()
    after = await first(h, Watch(epoch=before.epoch, start_sequence=before.sequence + 1))
    assert after.epoch != before.epoch
    assert after.kind == pb.KV_BATCH_KIND_SNAPSHOT_END


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (Watch(heartbeat_interval=Duration(nanos=1)), grpc.StatusCode.INVALID_ARGUMENT, "heartbeat_interval"),
        (
            Watch(heartbeat_interval=Duration(seconds=3601)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "heartbeat_interval",
        ),
        (Watch(epoch="e" * 129), grpc.StatusCode.INVALID_ARGUMENT, "epoch"),
        (Watch(model="m"), grpc.StatusCode.INVALID_ARGUMENT, "deployment"),
        (Watch(model="m", deployment="c"), grpc.StatusCode.NOT_FOUND, ""),
        (Watch(model="x"), grpc.StatusCode.NOT_FOUND, ""),
    ],
)
async def test_mistakes_are_named(
    serve: Serve, request_: pb.WatchKvEventsRequest, code: grpc.StatusCode, field: str
) -> None:
    deployments = {name: {"engine": "fake"} for name in "ab"}
    routes = {"m": {"weights": {"a": 1, "b": 1}}, "one": {"weights": {"a": 1}}}
    h = await serve(deployments=deployments, routes=routes)
    request_.model = request_.model or "one"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await first(h, request_)
    assert caught.value.code() is code
    if field:
        assert details(caught.value)["BadRequest"].field_violations[0].field == field
    message = await first(h, Watch(model="m", deployment="b"))
    assert message.deployment == "b"
