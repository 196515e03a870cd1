"""Where replicas come from: files that change, names, and a stand-in for the Kubernetes API."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from twinjet.epp.settings import KubernetesSettings, ReplicaSettings, check_address
from twinjet.epp.sources import KubernetesSource, make_source
from twinjet.errors import ConfigError


async def following(source: AsyncIterator[list[str]]) -> list[str]:
    async with asyncio.timeout(30):
        return await anext(source)


async def test_a_file_is_read_again_when_it_changes_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "replicas"
    path.write_text("# ours\n10.0.0.1:50051\n\n[::1]:7  # six\n")
    source = make_source(ReplicaSettings(file=path, refresh_s=0.01))
    assert await following(source) == ["10.0.0.1:50051", "[::1]:7"]
    path.write_text("10.0.0.1\n")
    task = asyncio.ensure_future(following(source))
    async with asyncio.timeout(30):
        while "line 1" not in caplog.text:
            await asyncio.sleep(0.01)
    assert not task.done()
    other = tmp_path / "other"
    other.write_text("10.0.0.2:1\n")
    other.replace(path)
    assert await task == ["10.0.0.2:1"]


async def test_a_file_that_cannot_be_read_at_the_start_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"replicas\.file: cannot read"):
        make_source(ReplicaSettings(file=tmp_path / "none"))
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        make_source(ReplicaSettings(file=bad))


async def test_every_address_of_a_name_is_a_replica() -> None:
    source = make_source(ReplicaSettings(dns="localhost:50051", refresh_s=0.01))
    assert "127.0.0.1:50051" in await following(source)


@pytest.mark.parametrize(
    "text", ["host:1", "1.2.3.4", "1.2.3.4:0", "1.2.3.4:70000", "1.2.3:5", ":5", "", "1.2.3.4:٣"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"IP:PORT|port"):
        check_address(text)


class Api:
    """The part of the Kubernetes API that lists and watches endpoint slices."""

    def __init__(self) -> None:
        self.slices: dict[str, dict[str, Any]] = {}
        self.version = 1
        self.changed = threading.Condition()
        self.events: list[dict[str, Any]] = []
        self.seen: list[tuple[str, dict[str, list[str]], str]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                api.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        query = parse_qs(parts.query)
        self.seen.append((parts.path, query, handler.headers.get("Authorization", "")))
        handler.send_response(200)
        handler.end_headers()
        if "watch" not in query:
            listed = {"items": list(self.slices.values()), "metadata": {"resourceVersion": str(self.version)}}
            handler.wfile.write(json.dumps(listed).encode())
            return
        told = 0
        with self.changed:
            while True:
                for event in self.events[told:]:
                    if event.get("type") == "END":
                        self.events.clear()
                        return
                    handler.wfile.write(json.dumps(event).encode() + b"\n")
                    handler.wfile.flush()
                told = len(self.events)
                self.changed.wait()

    def tell(self, kind: str, one: dict[str, Any]) -> None:
        with self.changed:
            self.events.append({"type": kind, "object": one})
            self.changed.notify_all()

    def close(self) -> None:
        self.tell("END", {})
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def slice_of(name: str, addresses: dict[str, dict[str, bool]], port: int = 50051) -> dict[str, Any]:
    endpoints = [{"addresses": [address], "conditions": c} for address, c in addresses.items()]
    ports = [
        {"name": "grpc", "port": port, "protocol": "TCP"},
        {"name": "metrics", "port": 9, "protocol": "TCP"},
    ]
    return {"metadata": {"name": name}, "endpoints": endpoints, "ports": ports}


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    yield api
    api.close()


async def test_ready_endpoints_of_a_service_are_the_replicas(api: Api, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    unready = {"ready": False}
    api.slices["a"] = slice_of("a", {"10.0.0.1": {"ready": True}, "10.0.0.2": unready, "10.0.0.3": {}})
    settings = KubernetesSettings(
        service="twinjet", namespace="ml", port="grpc", api=api.url, token_file=token
    )
    source = KubernetesSource(settings).watch()
    assert await following(source) == ["10.0.0.1:50051", "10.0.0.3:50051"]
    api.tell("ADDED", slice_of("b", {"fd00::5": {"ready": True}}))
    assert await following(source) == ["10.0.0.1:50051", "10.0.0.3:50051", "[fd00::5]:50051"]
    api.tell("MODIFIED", slice_of("a", {"10.0.0.1": {"ready": True, "terminating": True}, "10.0.0.2": {}}))
    assert await following(source) == ["10.0.0.2:50051", "[fd00::5]:50051"]
    api.tell("DELETED", slice_of("b", {}))
    assert await following(source) == ["10.0.0.2:50051"]
    path, query, authorization = api.seen[0]
    assert path == "/apis/discovery.k8s.io/v1/namespaces/ml/endpointslices"
    assert query["labelSelector"] == ["kubernetes.io/service-name=twinjet"]
    assert authorization == "Bearer secret"
    await source.aclose()  # type: ignore[attr-defined]


async def test_a_watch_that_is_too_old_begins_anew(api: Api) -> None:
    api.slices["a"] = slice_of("a", {"10.0.0.1": {}})
    source = KubernetesSource(
        KubernetesSettings(service="s", namespace="n", port="50051", api=api.url)
    ).watch()
    assert await following(source) == ["10.0.0.1:50051"]
    api.slices["a"] = slice_of("a", {"10.0.0.9": {}})
    api.tell("ERROR", {"message": "too old resource version"})
    assert await following(source) == ["10.0.0.9:50051"]
    await source.aclose()  # type: ignore[attr-defined]


def test_outside_of_a_cluster_the_api_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"kubernetes\.api"):
        KubernetesSource(KubernetesSettings(service="s", namespace="n"), {})
    inside = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert KubernetesSource(KubernetesSettings(service="s", namespace="n"), inside).addresses() == []
