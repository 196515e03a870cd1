"""Fixtures of the service tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tests.server.harness import Harness, Serve
from twinjet.config import Config
from twinjet.engines.base import Engine
from twinjet.engines.factory import make_engine
from twinjet.engines.fake import FakeEngine
from twinjet.server import native_door
from twinjet.server.main import Server


@pytest.fixture(params=["grpc", "native"])
def door(request: pytest.FixtureRequest) -> str:
    """The way gRPC comes in: a test that serves runs once for each that this build has."""
    if request.param == "native" and not native_door.is_available():
        pytest.skip("this build has no native door")
    return str(request.param)


@pytest.fixture(autouse=True)
def _starts_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """die_at_start counts over a process, in which a test may run once for each door."""
    monkeypatch.setattr(FakeEngine, "_num_starts", {})


@pytest.fixture
async def serve(door: str) -> AsyncIterator[Serve]:
    """Start a server: serve(options for the fake engine, server={...}, deployments={...}, ready=False)."""
    running: list[Harness] = []

    async def start(
        options: dict[str, Any] | None = None,
        *,
        server: dict[str, Any] | None = None,
        ready: bool = True,
        channel_options: list[tuple[str, Any]] | None = None,
        **sections: Any,
    ) -> Harness:
        tree: dict[str, Any] = {
            "server": {"port": 0, "grace_s": 2.0, "door": door} | (server or {}),
            "deployments": {"fake": {"engine": "fake", "options": options or {}}},
        } | sections
        engines: list[Engine] = []

        def make(name: str, settings: Any) -> Engine:
            engines.append(make_engine(name, settings))
            return engines[-1]

        twinjet = Server(Config.model_validate(tree), make)
        await twinjet.start()
        channel = grpc.aio.insecure_channel(twinjet.address, options=channel_options)
        harness = Harness(twinjet, channel, engines)
        running.append(harness)
        if ready:
            await harness.until_ready()
        return harness

    yield start
    for harness in running:
        await harness.channel.close()
        await harness.server.drain(0.0)
        await harness.server.stop()
