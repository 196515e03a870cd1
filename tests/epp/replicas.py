"""Twinjet servers with fake engines in this process, and pickers beside them or as processes."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from twinjet.config import Config
from twinjet.engines.supervisor import State
from twinjet.epp.main import Epp
from twinjet.epp.settings import EppConfig
from twinjet.server.main import Server

OPTIONS = {"output_tokens": 4, "max_context_tokens": 200_000, "num_blocks": 20_000, "step_s": 0.001}


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def start_replica(options: dict[str, Any] | None = None, port: int = 0, **sections: Any) -> Server:
    """Start a server with one fake engine; sections: of its configuration."""
    tree = {
        "server": {"port": port, "door": "grpc", "grace_s": 1.0},
        "deployments": {"fake": {"engine": "fake", "options": OPTIONS | (options or {})}},
    } | sections
    server = Server(Config.model_validate(tree))
    await server.start()
    await until(lambda: all(d.supervisor.state is State.READY for d in server.deployments.by_name.values()))
    return server


@asynccontextmanager
async def replicas(
    count: int, options: dict[str, Any] | None = None, **sections: Any
) -> AsyncIterator[list[Server]]:
    """Run some servers."""
    servers = [await start_replica(options, **sections) for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            await server.drain(0.0)
            await server.stop()


@asynccontextmanager
async def epp_beside(servers: list[Server], **sections: Any) -> AsyncIterator[Epp]:
    """Run a picker in this process until all servers are up."""
    tree = {
        "server": {"port": 0, "grace_s": 0.5},
        "replicas": {"addresses": [s.address for s in servers], "report_s": 0.1},
    } | sections
    epp = Epp(EppConfig.model_validate(tree))
    await epp.start()
    try:
        await until(lambda: sum(r.is_up for r in epp.picker.replicas.values()) == len(servers))
        yield epp
    finally:
        await epp.stop()


class EppProcess:
    """`twinjet epp` as a process."""

    def __init__(self, folder: Path, servers: list[str], port: int = 0, settings: str = "") -> None:
        self._path = folder / "epp.toml"
        self._path.write_text(
            f"[server]\nport = {port}\ngrace_s = 1\n"
            f"[replicas]\naddresses = {servers!r}\nreport_s = 0.1\n{settings}"
        )
        self._log = folder / "epp.log"
        self._file = self._log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twinjet.cli", "epp", "--config", str(self._path)],
            stdout=self._file,
            stderr=self._file,
            env=os.environ,
        )
        self.address = ""

    async def until_listening(self) -> str:
        """Wait until it listens; gives its address."""
        found: list[str] = []

        def look() -> bool:
            assert self.process.poll() is None, self._log.read_text()
            found[:] = re.findall(r"picking endpoints on (\S+)", self._log.read_text())
            return bool(found)

        await until(look)
        self.address = found[0]
        return self.address

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        self._file.close()
