"""The HTTP side of `metrics_port`: Prometheus metrics, and a console to look at. Reads only; changes nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from prometheus_client import make_wsgi_app

from twinjet import http_serving

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from twinjet.server.deployments import Deployment, Deployments
    from twinjet.server.metrics import Metrics

_READ_S = 5.0
"""How long a reading may wait for the server's loop."""

Console = Literal["loopback", "all", "off"]
_Start = Callable[[str, list[tuple[str, str]]], object]

_HEADERS = [
    # The page has all in itself; nothing is fetched from elsewhere, and nobody may frame it.
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
     "connect-src 'self'; img-src data:; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
]  # fmt: skip


class Web:
    """Answers /metrics, / and /console.json; made on the server's loop, answers in threads of its own."""

    def __init__(self, deployments: Deployments, metrics: Metrics, console: Console) -> None:
        self._deployments = deployments
        self._metrics = metrics
        self._console = console
        self._loop = asyncio.get_running_loop()
        self._prometheus = make_wsgi_app(metrics.registry)
        self._page = files("twinjet.server").joinpath("console.html").read_bytes()
        self._server: http_serving.HttpServer | None = None

    def listen(self, host: str, port: int) -> int:
        """Answer on a port from now on; gives the port. Raises OSError if it cannot be bound."""
        self._server = http_serving.listen(self, host, port)
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop answering. Blocks for half a second at most."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __call__(self, environ: dict[str, Any], start: _Start) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path in {"/", "/console.json"}:
            if environ.get("REQUEST_METHOD") not in {"GET", "HEAD"}:
                return _answer(start, "405 Method Not Allowed", "text/plain", b"read only\n")
            if not self._may_look(environ.get("REMOTE_ADDR", "")):
                return _answer(
                    start,
                    "403 Forbidden",
                    "text/plain",
                    b"the console is for this machine alone; set server.console\n",
                )
            if path == "/":
                return _answer(start, "200 OK", "text/html; charset=utf-8", self._page)
            return self._state(start)
        if path == "/metrics":
            answer: Iterable[bytes] = self._prometheus(environ, start)
            return answer
        return _answer(start, "404 Not Found", "text/plain", b"/metrics, or / for the console\n")

    def _may_look(self, peer: str) -> bool:
        if self._console == "all":
            return True
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return self._console == "loopback" and (mapped or address).is_loopback

    def _state(self, start: _Start) -> Iterable[bytes]:
        reading = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        try:
            state = reading.result(_READ_S)
        except TimeoutError:
            reading.cancel()
            return _answer(start, "503 Service Unavailable", "text/plain", b"the server is busy\n")
        return _answer(start, "200 OK", "application/json", json.dumps(state).encode())

    async def _read(self) -> Mapping[str, Any]:
        deployments = [await _deployment(d) for d in list(self._deployments.by_name.values())]
        routes = [
            {"model": model, "weights": dict(route.weights), "fallback": route.fallback, "sticky": route.sticky,
             "mirror": route.mirror, "mirror_share": route.mirror_share}
            for model, route in sorted(self._deployments.table.routes.items())
        ]  # fmt: skip
        return {
            "draining": self._deployments.is_draining,
            "revision": self._deployments.table.revision,
            "routes": routes,
            "deployments": deployments,
            "latency": _histograms(self._metrics.registry),
        }


async def _deployment(deployment: Deployment) -> Mapping[str, Any]:
    supervisor, load = deployment.supervisor, deployment.dispatcher.load()
    engine = await supervisor.engine_load()
    info = supervisor.info
    return {
        "name": deployment.name,
        "engine": deployment.settings.engine,
        "version": "" if info is None else info.version,
        "device": "" if info is None else info.device,
        "state": supervisor.state.value,
        "phase": supervisor.progress.phase,
        "done": supervisor.progress.done,
        "failure": supervisor.failure,
        "restarts": supervisor.num_restarts,
        "sampler": "" if info is None else info.sampler.implementation,
        "waiting": load.waiting,
        "running": load.running,
        "tokens_per_s": load.output_tokens_per_s,
        "prompt_tokens_per_s": load.prompt_tokens_per_s,
        "kv_blocks": engine.kv_blocks_total,
        "kv_blocks_used": engine.kv_blocks_used,
        "tenants": [
            {"tenant": name, "waiting": t.waiting, "running": t.running, "served_tokens": t.served_tokens}
            for name, t in load.tenants.items()
        ],
    }


def _histograms(registry: CollectorRegistry) -> Mapping[str, Mapping[str, list[tuple[str, float]]]]:
    """Cumulative buckets by metric and deployment, from what has been observed so far."""
    found: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for name in ("twinjet_first_token_seconds", "twinjet_per_token_seconds"):
        for metric in registry.restricted_registry([f"{name}_bucket"]).collect():
            for sample in metric.samples:
                if sample.name == f"{name}_bucket":
                    labels = sample.labels
                    key = labels.get("deployment") or labels["model"]
                    found.setdefault(name, {}).setdefault(key, []).append((labels["le"], sample.value))
    return found


def _answer(start: _Start, status: str, kind: str, body: bytes) -> Iterable[bytes]:
    start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS])
    return [body]
