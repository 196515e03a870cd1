"""Where the list of replicas comes from. A source yields the whole list whenever it may have changed.

What is known stays known: a source that fails, or names nothing that can be used, says so in the log and changes
nothing, since replicas that are gone are found out by their silence.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinjet.epp.settings import KubernetesSettings, ReplicaSettings, check_address
from twinjet.errors import ConfigError

if TYPE_CHECKING:
    from http.client import HTTPResponse

logger = logging.getLogger("twinjet.epp")

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_WATCH_S = 240
_REQUEST_S = 30.0
_PAUSE_S = 2.0


def make_source(settings: ReplicaSettings) -> AsyncIterator[list[str]]:
    """Make the source that the settings name. Raises ConfigError for one that cannot work."""
    if settings.addresses:
        return _fixed(settings.addresses)
    if settings.file is not None:
        read_file(settings.file)
        return _file(settings.file, settings.refresh_s)
    if settings.dns:
        return _dns(settings.dns, settings.refresh_s)
    return KubernetesSource(settings.kubernetes).watch()


async def _fixed(addresses: list[str]) -> AsyncIterator[list[str]]:
    yield list(addresses)


def read_file(path: Path) -> list[str]:
    """Read addresses, one a line; "#" begins a comment. Raises ConfigError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"replicas.file: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"replicas.file: {path} is not UTF-8") from error
    addresses = []
    for number, line in enumerate(lines, start=1):
        if text := line.partition("#")[0].strip():
            try:
                addresses.append(check_address(text))
            except ValueError as error:
                raise ConfigError(f"replicas.file: {path}, line {number}: {error}") from None
    return addresses


async def _file(path: Path, refresh_s: float) -> AsyncIterator[list[str]]:
    seen = None
    while True:
        stamp = _stamp(path)
        if stamp != seen:
            try:
                addresses = read_file(path)
            except ConfigError as error:
                logger.error("the replicas stay as they are: %s", error)
            else:
                yield addresses
            seen = stamp
        await asyncio.sleep(refresh_s)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


async def _dns(name_and_port: str, refresh_s: float) -> AsyncIterator[list[str]]:
    host, _, port = name_and_port.rpartition(":")
    loop = asyncio.get_running_loop()
    last: list[str] | None = None
    while True:
        try:
            found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            logger.warning("replicas.dns: %s cannot be resolved: %s", host, error.strerror or error)
        else:
            addresses = sorted({check_address(_joined(str(where[0]), int(port))) for *_, where in found})
            if addresses != last:
                last = addresses
                yield addresses
        await asyncio.sleep(refresh_s)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class KubernetesSource:
    """The ready endpoints of a Service: a list of its EndpointSlices, then a watch from there.

    Raises ConfigError if it is not clear how the API is reached.
    """

    def __init__(self, settings: KubernetesSettings, environ: Mapping[str, str] = os.environ) -> None:
        self._settings = settings
        self._api = settings.api.rstrip("/")
        if not self._api:
            host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
            if not host:
                raise ConfigError("replicas.kubernetes.api: not inside a cluster, so it must be set")
            self._api = f"https://{_joined(host, int(port))}"
        self._namespace = settings.namespace or _own_namespace()
        self._slices: dict[str, Any] = {}
        self._response: HTTPResponse | None = None
        self._is_closed = threading.Event()

    async def watch(self) -> AsyncIterator[list[str]]:
        """Yield the addresses, at first and after each change."""
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[list[str]] = asyncio.Queue()

        def tell() -> None:
            addresses = self.addresses()
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.put_nowait, addresses)

        # A thread of its own, which does not keep the process from ending while it waits for the API.
        thread = threading.Thread(target=self._follow, args=(tell,), name="kubernetes", daemon=True)
        thread.start()
        last: list[str] | None = None
        try:
            while True:
                addresses = await told.get()
                if addresses != last:
                    last = addresses
                    yield addresses
        finally:
            self._is_closed.set()

    def addresses(self) -> list[str]:
        """Give the addresses of endpoints that are ready."""
        found: set[str] = set()
        for one in self._slices.values():
            port = self._port_of(one)
            for endpoint in one.get("endpoints") or [] if port else []:
                conditions = endpoint.get("conditions") or {}
                # Unset means ready.
                if conditions.get("ready") is not False and conditions.get("terminating") is not True:
                    found.update(_joined(address, int(port)) for address in endpoint.get("addresses") or [])
        return sorted(check_address(address) for address in found)

    def _port_of(self, one: Mapping[str, Any]) -> int:
        wanted = self._settings.port
        ports = [p for p in one.get("ports") or [] if p.get("protocol", "TCP") == "TCP" and p.get("port")]
        for port in ports:
            if wanted in (port.get("name"), str(port["port"])):
                return int(port["port"])
        if not wanted and len(ports) == 1:
            return int(ports[0]["port"])
        logger.warning("replicas.kubernetes.port: %r is none of the endpoint slice's ports", wanted)
        return 0

    def _follow(self, tell: Callable[[], None]) -> None:
        while not self._is_closed.is_set():
            try:
                version = self._list()
                tell()
                self._watch_from(version, tell)
            except (OSError, urllib.error.URLError, ValueError, KeyError, TypeError) as error:
                logger.warning("the Kubernetes API: %s; the replicas stay as they are", error)
                self._is_closed.wait(_PAUSE_S)

    def _list(self) -> str:
        with self._open({}, _REQUEST_S) as response:
            listed = json.load(response)
        self._slices = {item["metadata"]["name"]: item for item in listed["items"]}
        return str(listed["metadata"]["resourceVersion"])

    def _watch_from(self, version: str, tell: Callable[[], None]) -> None:
        parameters = {"watch": "1", "resourceVersion": version, "timeoutSeconds": str(_WATCH_S)}
        with self._open(parameters, _WATCH_S + _REQUEST_S) as response:
            for line in response:
                if self._is_closed.is_set():
                    return
                event = json.loads(line)
                if event["type"] == "ERROR":
                    # The version is too old, mostly: list anew.
                    logger.info(
                        "the watch of endpoint slices begins anew: %s", event["object"].get("message")
                    )
                    return
                name = event["object"]["metadata"]["name"]
                if event["type"] == "DELETED":
                    self._slices.pop(name, None)
                elif event["type"] in ("ADDED", "MODIFIED"):
                    self._slices[name] = event["object"]
                tell()

    def _open(self, parameters: Mapping[str, str], timeout_s: float) -> HTTPResponse:
        selector = f"kubernetes.io/service-name={self._settings.service}"
        query = urllib.parse.urlencode({"labelSelector": selector, **parameters})
        space = urllib.parse.quote(self._namespace, safe="")
        url = f"{self._api}/apis/discovery.k8s.io/v1/namespaces/{space}/endpointslices?{query}"
        request = urllib.request.Request(url, headers={"Accept": "application/json"})
        # The token is renewed on disk.
        if self._settings.token_file.exists():
            token = self._settings.token_file.read_text().strip()
            request.add_header("Authorization", f"Bearer {token}")
        context = None
        if url.startswith("https:"):
            ca = self._settings.ca_file
            context = ssl.create_default_context(cafile=str(ca) if ca.exists() else None)
        response: HTTPResponse = urllib.request.urlopen(request, timeout=timeout_s, context=context)
        return response


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        raise ConfigError("replicas.kubernetes.namespace: not inside a cluster, so it must be set") from None
