"""Whatever is sent to whatever method, the answer is no fault of ours, says which field is wrong, and a neighbour's stream
is what it was."""

from __future__ import annotations

import asyncio
import logging
import math

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings

from tests.server.any_call import Rpc, call, calls, fault, governs, rpcs
from tests.server.full_fake import FullFakeEngine
from tests.server.harness import Serve, collect, kinds, text_of
from twinjet.v1 import generation_pb2, routing_pb2, sampling_pb2


class _Complaints(logging.Handler):
    """What a log has of faults."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.found.append(self.format(record))


@pytest.mark.parametrize(
    ("name", "request_", "expected"),
    [
        ("AddDeployment", routing_pb2.AddDeploymentRequest(name="extra"), True),
        (
            "AddDeployment",
            routing_pb2.AddDeploymentRequest(name="x", settings={"engine": "tensorrt_llm"}),
            True,
        ),
        ("AddDeployment", routing_pb2.AddDeploymentRequest(name="x", settings={"engine": "fake"}), False),
        ("AddDeployment", routing_pb2.AddDeploymentRequest(name="x", settings={"engine": math.nan}), False),
        ("RemoveDeployment", routing_pb2.RemoveDeploymentRequest(name="fake"), True),
        ("RemoveDeployment", routing_pb2.RemoveDeploymentRequest(name="extra"), False),
        ("SetRoute", routing_pb2.SetRouteRequest(route={"model": "fake"}, remove=True), True),
        ("SetRoute", routing_pb2.SetRouteRequest(route={"model": "spare"}, remove=True), False),
    ],
)
def test_an_operators_orders_are_no_attack(name: str, request_: Message, expected: bool) -> None:
    (rpc,) = (rpc for rpc in rpcs("fake", "fake") if rpc.name == name)
    assert governs(rpc, request_.SerializeToString(), "fake", "fake") == expected


async def test_no_message_is_too_bad(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinjet.engines.fake.FakeEngine", FullFakeEngine)
    h = await serve(protocols={"openengine": {"enabled": True}})
    neighbours = generation_pb2.GenerateRequest(
        model="fake", text="Once upon a time", sampling=sampling_pb2.SamplingParams(max_tokens=200, seed=7)
    )
    due = text_of(await collect(h.inference.Generate(neighbours)))
    complaints = _Complaints()
    logging.getLogger().addHandler(complaints)
    methods = rpcs("fake", "fake")
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.insecure_channel(h.server.address, options=options)

    # The same calls as long as the code is the same, whose constants hypothesis draws from; `hostile.py --only any_calls`
    # makes others.
    @settings(max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(calls(methods, "fake", "fake"))
    def attack(sent: tuple[Rpc, bytes]) -> None:
        rpc, data = sent
        wrong = fault(rpc, call(channel, rpc, data))
        found, complaints.found = complaints.found, []
        assert (wrong, found) == ("", []), rpc.base.FromString(data)

    async def neighbour() -> None:
        while True:
            messages = await collect(h.inference.Generate(neighbours))
            assert kinds(messages)[-1] == "summary" and text_of(messages) == due

    other = asyncio.create_task(neighbour())
    try:
        await asyncio.to_thread(attack)
        assert not other.done(), other.exception()
    finally:
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        channel.close()
        logging.getLogger().removeHandler(complaints)
    await h.until_idle()
