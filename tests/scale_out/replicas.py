"""Replicas as processes of their own: through either door, killed and started again at the same address."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.processes import MAIN
from twinjet.server import native_door
from twinjet.v1 import admin_pb2, service_pb2_grpc


class Replica:
    """One server with the fake engine. Its deployment's name, which answers tell, is `name`."""

    def __init__(self, folder: Path, name: str, door: str, options: str = "") -> None:
        self.name = name
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._config, self._main, self.log = (
            folder / "twinjet.toml",
            folder / "main.py",
            folder / "server.log",
        )
        self._main.write_text(MAIN)
        self._config.write_text(
            f'[server]\nport = {self.address.split(":")[1]}\ngrace_s = 20\ndoor = "{door}"\n'
            f'[deployments.{name}]\nengine = "fake"\noptions = {{ {options} }}\n'
            f"[routes.m]\nweights = {{ {name} = 1 }}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self, timeout_s: float = 240.0) -> None:
        """Start the process and wait until its health says that it serves."""
        self._process = self._spawn()
        async with asyncio.timeout(timeout_s), grpc.aio.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                assert self._process.poll() is None, self.log.read_text()
                try:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                except grpc.aio.AioRpcError:
                    pass
                await asyncio.sleep(0.05)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            command = [sys.executable, str(self._main), str(self._config)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    async def drain_and_stop(self) -> None:
        """Have its streams finish, then end it as an operator does."""
        assert self._process is not None
        async with grpc.aio.insecure_channel(self.address) as channel:
            await service_pb2_grpc.AdminServiceStub(channel).Drain(admin_pb2.DrainRequest())
        self._process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(self._process.wait)

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


@asynccontextmanager
async def replicas(folder: Path, count: int, options: str = "") -> AsyncIterator[list[Replica]]:
    """Start replicas, every other one with the native door where this build has it."""
    doors = ["grpc", "native" if native_door.is_available() else "grpc"]
    made = [Replica(folder / f"replica-{i}", f"r{i}", doors[i % 2], options) for i in range(count)]
    try:
        await asyncio.gather(*(replica.start() for replica in made))
        yield made
    finally:
        for replica in made:
            replica.end()
