"""Replicas as processes of their own: through either door, killed and started again at the same address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.processes import MAIN
from twinjet.server import native_door
from twinjet.v1 import admin_pb2, service_pb2_grpc

STEERED_MAIN = """
import asyncio, os
from pathlib import Path
from twinjet.engines.fake import FakeEngine

async def pause(self, step_s):
    await asyncio.sleep(float(Path(os.environ["STEP_FILE"]).read_text()))

FakeEngine._pause = pause
"""


class Replica:
    """One server with the fake engine. Its deployment's name, which answers tell, is `name`.

    is_steerable: steer() changes the time of a step while it runs.
    """

    def __init__(
        self, folder: Path, name: str, door: str, options: str = "", *, is_steerable: bool = False
    ) -> None:
        self.name = name
        folder.mkdir()
        self._step = folder / "step"
        port, self._metrics_port = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self._config, self._main, self.log = (
            folder / "twinjet.toml",
            folder / "main.py",
            folder / "server.log",
        )
        self._main.write_text(STEERED_MAIN + MAIN if is_steerable else MAIN)
        self._config.write_text(
            f'[server]\nport = {port}\nmetrics_port = {self._metrics_port}\ngrace_s = 20\ndoor = "{door}"\n'
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
            environment = os.environ | {"STEP_FILE": str(self._step)}
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def steer(self, step_s: float) -> None:
        """Set the time of every step from the next on."""
        new = self._step.with_suffix(".new")
        new.write_text(str(step_s))
        new.replace(self._step)

    async def num_served(self) -> int:
        """How many calls for an answer it has ended with OK."""

        def read() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=10) as page:
                return str(page.read().decode())

        found = re.search(
            r'^twinjet_calls_total\{code="OK",method="Generate"\} (\S+)',
            await asyncio.to_thread(read),
            re.MULTILINE,
        )
        return int(float(found[1])) if found else 0

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


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, none twice."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@asynccontextmanager
async def replicas(
    folder: Path, count: int, options: str | Sequence[str] = "", *, steerable: bool = False
) -> AsyncIterator[list[Replica]]:
    """Start replicas, every other one with the native door where this build has it. options: for all, or for each."""
    doors = ["grpc", "native" if native_door.is_available() else "grpc"]
    each = [options] * count if isinstance(options, str) else options
    made = [
        Replica(folder / f"replica-{i}", f"r{i}", doors[i % 2], each[i], is_steerable=steerable)
        for i in range(count)
    ]
    if steerable:
        for replica in made:
            replica.steer(0.02)
    try:
        await asyncio.gather(*(replica.start() for replica in made))
        yield made
    finally:
        for replica in made:
            replica.end()
