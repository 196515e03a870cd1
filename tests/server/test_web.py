"""The console: what it says, to whom, and that a browser shows it without a complaint."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.server.harness import Harness, Serve, collect
from twinjet.server.web import Web
from twinjet.v1 import generation_pb2, sampling_pb2

CHROMIUM = shutil.which("chromium")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kubernetes.md"
SCRAPED = set(re.findall(r"Spec: (twinjet_\w+)", PAGE.read_text()))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def _twins(serve: Serve, **server: Any) -> tuple[Harness, str]:
    port = _free_port()
    h = await serve(
        server={"metrics_port": port} | server,
        deployments={"one": {"engine": "fake"}, "two": {"engine": "fake"}},
        routes={"m": {"weights": {"one": 3, "two": 1}, "sticky": "tenant"}},
    )
    return h, f"http://127.0.0.1:{port}"


async def _get(url: str, method: str = "GET") -> tuple[int, str]:
    def read() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(read)


async def _hold(h: Harness) -> grpc.aio.UnaryStreamCall[Any, Any]:
    """A stream of the tenant acme that runs and never ends."""
    request = generation_pb2.GenerateRequest(
        text="!stall", options=generation_pb2.RequestOptions(tenant="acme", report_queue=True)
    )
    call = h.inference.Generate(request)
    await h.until(
        lambda: sum(d.dispatcher.totals().running for d in h.server.deployments.by_name.values()) == 1
    )
    return call


async def _talk(h: Harness, count: int) -> None:
    for i in range(count):
        request = generation_pb2.GenerateRequest(
            text="x",
            sampling=sampling_pb2.SamplingParams(max_tokens=5),
            options=generation_pb2.RequestOptions(tenant=f"t{i}"),
        )
        await collect(h.inference.Generate(request))


async def test_the_state_tells_both_twins_routes_tenants_and_latencies(serve: Serve) -> None:
    h, url = await _twins(serve)
    await _talk(h, 12)
    stalled = await _hold(h)
    code, text = await _get(f"{url}/console.json")
    stalled.cancel()
    state = json.loads(text)
    assert code == 200
    assert [(d["name"], d["state"]) for d in state["deployments"]] == [("one", "ready"), ("two", "ready")]
    assert state["routes"] == [
        {"model": "m", "weights": {"one": 3, "two": 1}, "fallback": [], "sticky": "tenant", "mirror": "", "mirror_share": 0}
    ]  # fmt: skip
    (tenant,) = (t for d in state["deployments"] for t in d["tenants"])
    assert (tenant["tenant"], tenant["running"], tenant["waiting"]) == ("acme", 1, 0)
    counts = [buckets[-1][1] for buckets in state["latency"]["twinjet_first_token_seconds"].values()]
    assert sum(counts) == 12 and len(counts) == 2


async def test_metrics_are_where_they_were(serve: Serve) -> None:
    h, url = await _twins(serve)
    await _talk(h, 1)
    code, text = await _get(f"{url}/metrics")
    assert code == 200 and re.search(
        r'twinjet_first_token_seconds_count\{deployment="(one|two)",model="m"\} 1.0', text
    )
    # What docs/kubernetes.md has pickers of others read, and the labels in which they look for the cache's sizes.
    assert len(SCRAPED) == 4
    for name in SCRAPED:
        assert re.search(rf'^{name}\{{.*deployment="one"', text, re.MULTILINE), name
    assert re.search(
        r'twinjet_kv_cache_info\{block_size="\d+",deployment="one",num_gpu_blocks="\d+"\} 1.0', text
    )


@pytest.mark.parametrize(
    ("console", "peer", "may"),
    [
        ("loopback", "127.0.0.1", True), ("loopback", "::1", True), ("loopback", "::ffff:127.0.0.1", True),
        ("loopback", "10.0.0.1", False), ("loopback", "", False), ("all", "10.0.0.1", True), ("off", "127.0.0.1", False),
    ],
)  # fmt: skip
async def test_only_those_who_may_look_do(serve: Serve, console: Any, peer: str, may: bool) -> None:
    h = await serve()
    web = Web(h.server.deployments, h.server.metrics, console)
    told: list[str] = []

    def start(status: str, headers: list[tuple[str, str]]) -> None:
        told.append(status)

    await asyncio.to_thread(
        web, {"PATH_INFO": "/console.json", "REQUEST_METHOD": "GET", "REMOTE_ADDR": peer}, start
    )
    assert told == ["200 OK" if may else "403 Forbidden"]


async def test_it_is_read_only_and_knows_its_paths(serve: Serve) -> None:
    _, url = await _twins(serve)
    assert (await _get(f"{url}/", "POST"))[0] == 405
    assert (await _get(f"{url}/else"))[0] == 404
    code, page = await _get(url + "/")
    assert code == 200
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|url\(|@import|https?://(?!www\.w3\.org)", page)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
async def test_a_browser_shows_it_without_a_complaint(serve: Serve, tmp_path: Path) -> None:
    h, url = await _twins(serve)
    await _talk(h, 6)
    stalled = await _hold(h)
    assert CHROMIUM is not None
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path}", "--virtual-time-budget=4000", "--dump-dom", url,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(90):
        dom, log = (part.decode() for part in await browser.communicate())
    stalled.cancel()
    assert "CONSOLE" not in log, log
    assert 'data-deployment="one"' in dom and 'data-deployment="two"' in dom
    for told in ("one 3, two 1", "revision 1", "acme"):
        assert f">{told}<" in dom, told
    assert 'id="lost" role="status"></span>' in dom
