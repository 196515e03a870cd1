"""Memory of an open stream through the whole service: what each of the second half adds to the server's process.

    PYTHONPATH=python python bench/door/memory.py [--streams 4000] [--connections 8] [--doors native,grpc]

The engine is the fake one, whose requests here wait for ever; the client is in this process. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from twinjet.v1 import generation_pb2, service_pb2_grpc

SETTINGS = """
[server]
port = 0
door = "{door}"
max_streams = 0
max_connection_calls = 100000
stalled_reader_s = 3600

[deployments.fake]
engine = "fake"
options = {{max_num_seqs = 100000, num_blocks = 10000000}}
"""


@contextmanager
def served(door: str) -> Iterator[tuple[int, str]]:
    """A server's process id and address."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "twinjet.toml"
        settings.write_text(SETTINGS.format(door=door))
        command = [sys.executable, "-m", "twinjet.cli", "serve", "--config", str(settings)]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as server:
            assert server.stderr is not None
            try:
                address = ""
                for line in server.stderr:
                    if "listening on " in line:
                        address = line.split("listening on ")[1].split()[0]
                    if " ready after " in line:
                        break
                yield server.pid, address
            finally:
                server.kill()


def resident_bytes(pid: int) -> int:
    """Memory of a process that nobody shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return (
        sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
        << 10
    )


async def measure(pid: int, address: str, num_streams: int, num_connections: int) -> dict[str, Any]:
    """Open the streams, and see what the server holds at half of them and at all."""
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(num_connections)
    ]
    stubs = [service_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
    calls = []
    held = []
    for number in range(num_streams):
        request = generation_pb2.GenerateRequest(text="!stall", options={"report_queue": True})
        call = stubs[number % num_connections].Generate(request)
        calls.append(call)
        if len(calls) % 100 == 0:
            await asyncio.gather(*(one.initial_metadata() for one in calls[-100:]))
        if len(calls) * 2 in (num_streams, 2 * num_streams):
            await asyncio.sleep(2)  # for what is under way to be freed
            held.append(resident_bytes(pid))
    for call in calls:
        call.cancel()
    for channel in channels:
        await channel.close()
    return {
        "streams": num_streams,
        "connections": num_connections,
        "bytes_a_stream": round((held[1] - held[0]) / (num_streams - num_streams // 2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=4000)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--doors", default="native,grpc")
    arguments = parser.parse_args()
    for door in arguments.doors.split(","):
        with served(door) as (pid, address):
            found = asyncio.run(measure(pid, address, arguments.streams, arguments.connections))
        print(json.dumps({"door": door} | found))


if __name__ == "__main__":
    main()
