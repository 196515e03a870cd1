"""Servers as processes of their own, and what runs below them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from twinjet.v1 import admin_pb2, service_pb2_grpc

MAIN = """
import logging, sys
from pathlib import Path
from twinjet import config
from twinjet.server.main import serve

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(serve(config.load(Path(sys.argv[1]))))
"""


@contextmanager
def server(
    folder: Path,
    settings: str,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
    grace_s: float = 3,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server until its first model is ready or has failed; gives the process and its address."""
    path, main = folder / "twinjet.toml", folder / "main.py"
    path.write_text(f"[server]\nport = {port}\ngrace_s = {grace_s}\n{settings}")
    main.write_text(MAIN)
    log = (folder / "server.log").open("w+")
    process = subprocess.Popen(
        [sys.executable, str(main), str(path)],
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
        env=os.environ | (environment or {}),
    )
    try:
        yield process, _wait_for_first(process, folder / "server.log")
    finally:
        process.kill()
        process.wait()
        log.close()


def _wait_for_first(process: subprocess.Popen[str], log: Path, timeout_s: float = 240.0) -> str:
    address = ""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        text = log.read_text()
        for line in text.splitlines():
            if line.startswith("listening on "):
                address = line.split()[-1]
        if " ready after " in text or " failed: " in text or process.poll() is not None:
            return address
        time.sleep(0.05)
    raise AssertionError(f"the server is not ready after {timeout_s:g} s:\n{log.read_text()[-4000:]}")


def descendants(pid: int) -> dict[int, int]:
    """Processes below one, zombies left out: pid to parent."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    below: dict[int, int] = {}
    grew = True
    while grew:
        grew = False
        for child, parent in parents.items():
            if child not in below and (parent == pid or parent in below):
                below[child] = parent
                grew = True
    return below


def command_of(pid: int) -> bytes:
    """A process's command line, its words ended by null bytes; nothing if it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Service:
    """A running server process and stubs for it."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address
        self.channel = grpc.insecure_channel(address)
        self.inference = service_pb2_grpc.InferenceServiceStub(self.channel)
        self.models = service_pb2_grpc.ModelServiceStub(self.channel)
        self.admin = service_pb2_grpc.AdminServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def load(self, deployment: str = "") -> admin_pb2.ModelLoad:
        """Give a deployment's load, the first one's without a name."""
        loads = self.admin.GetLoad(admin_pb2.GetLoadRequest()).models
        return next(load for load in loads if deployment in ("", load.deployment))

    def until(self, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it did not come true in time"
            time.sleep(0.05)

    def until_idle(self, timeout_s: float = 10.0, deployment: str = "") -> None:
        def is_idle() -> bool:
            load = self.load(deployment)
            return (load.waiting, load.running, load.engine_running, load.kv_blocks_used) == (0, 0, 0, 0)

        self.until(is_idle, timeout_s)

    def status(self, service: str = "smollm2") -> int:
        return self.health.Check(health_pb2.HealthCheckRequest(service=service)).status
