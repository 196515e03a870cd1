"""CPU a message of the native door and of Python over both doors, interleaved; prints JSON lines.

    PYTHONPATH=python python bench/door/run.py BUILD_FOLDER [--rounds 3] [--rows core,core_tls,native,grpc]

Rows: core is door_bench's own server (messages made by a thread, no Python), core_tls the same with TLS; native and
grpc are a constant-bytes handler in Python behind each door. Figures are medians over the rounds; on a machine with other work only the
ratios between rows mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

CELLS = [(1, 1), (32, 8), (256, 8), (1024, 8), (32, 32), (256, 256)]
"""Streams and connections."""
NUM_BYTES = 40
HERE = Path(__file__).parent


def certificate(folder: Path) -> list[str]:
    """Paths of a certificate and its key."""
    paths = [str(folder / "certificate.pem"), str(folder / "key.pem")]
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    subprocess.run([*command.split(), "-out", paths[0], "-keyout", paths[1]], check=True, capture_output=True)
    return paths


def measure(bench: Path, row: str, streams: int, connections: int, tls: list[str]) -> float:
    """Microseconds of server CPU a message."""
    is_core = row.startswith("core")
    tls = tls if row == "core_tls" else []
    budget = 400_000 if is_core else 20_000
    tokens = max(16, min(1000, budget // streams))
    shape = [str(streams), str(tokens), str(NUM_BYTES)]
    command = (
        [str(bench), "serve", *shape, *tls]
        if is_core
        else [sys.executable, str(HERE / "python_server.py"), row, *shape]
    )
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        port = server.stdout.readline().strip()
        steps = server.stdin.fileno()
        load = [
            str(bench),
            "load",
            port,
            str(server.pid),
            str(streams),
            str(connections),
            *shape[1:],
            str(steps),
            *(["tls"] if tls else []),
        ]
        done = subprocess.run(load, pass_fds=[steps], capture_output=True, text=True, timeout=300, check=True)
        server.stdin.close()
        server.wait(30)
    return float(json.loads(done.stdout)["us_per_message"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default="core,core_tls,native,grpc")
    arguments = parser.parse_args()
    bench = arguments.build / "bench" / "door" / "door_bench"
    found: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        tls = certificate(Path(folder))
        for _ in range(arguments.rounds):
            for streams, connections in CELLS:
                for row in arguments.rows.split(","):
                    found[row, streams, connections].append(measure(bench, row, streams, connections, tls))
    for (row, streams, connections), values in found.items():
        print(
            json.dumps(
                {
                    "row": row,
                    "streams": streams,
                    "connections": connections,
                    "us_per_message": round(statistics.median(values), 2),
                    "messages_a_second_and_core": round(1e6 / statistics.median(values)),
                    "range": [round(min(values), 2), round(max(values), 2)],
                    "load_average": round(os.getloadavg()[0], 1),
                }
            )
        )


if __name__ == "__main__":
    main()
