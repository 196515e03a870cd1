"""Listening: addresses of both kinds, ports that are taken, TLS files that cannot work; each says what is wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.server.harness import Serve
from twinjet.config import Config, ServerSettings
from twinjet.errors import ConfigError
from twinjet.server import native_door
from twinjet.server.binding import server_credentials
from twinjet.server.doors import make_door
from twinjet.server.main import Server
from twinjet.v1 import model_pb2, service_pb2_grpc


def _config(**server: object) -> Config:
    return Config.model_validate({"server": server, "deployments": {"a": {"engine": "fake"}}})


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of key and certificate, one encrypted key, and files that are none of these."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True, cwd=folder)

    for name in ("one", "two"):
        openssl(f"req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {name}.key -out {name}.pem -subj /CN=x")
    openssl("rsa -aes128 -passout pass:secret -in one.key -out locked.key")
    openssl("pkcs8 -topk8 -passout pass:secret -in one.key -out locked8.key")
    (folder / "text.pem").write_text("no certificate\n")
    begin, end = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
    (folder / "damaged.pem").write_bytes(begin + b"MIIB" * 16 + b"\n" + end)
    return folder


@pytest.mark.parametrize(
    ("cert", "key", "ca", "message"),
    [
        ("none.pem", "one.key", "", "server.tls_cert: cannot read .*: No such file"),
        ("one.pem", "none.key", "", "server.tls_key: cannot read .*: No such file"),
        ("one.pem", "one.key", "none.pem", "server.tls_client_ca: cannot read"),
        ("text.pem", "one.key", "", "server.tls_cert: .*text.pem holds no PEM certificate"),
        ("one.key", "one.key", "", "server.tls_cert: .*one.key holds no PEM certificate"),
        ("damaged.pem", "one.key", "", "server.tls_cert: the certificate in .*damaged.pem is damaged"),
        ("one.pem", "one.pem", "", "server.tls_key: .*one.pem holds no PEM private key"),
        ("one.pem", "two.key", "", "server.tls_key: the key in .*two.key does not belong to the certificate"),
        ("one.pem", "locked.key", "", "server.tls_key: the key in .*locked.key is encrypted"),
        ("one.pem", "locked8.key", "", "server.tls_key: the key in .*locked8.key is encrypted"),
        ("one.pem", "one.key", "text.pem", "server.tls_client_ca: .*text.pem holds no PEM certificate"),
        ("one.pem", "one.key", "damaged.pem", "server.tls_client_ca: the certificate in .* is damaged"),
    ],
)
def test_an_unusable_tls_file_is_named(
    certificates: Path, cert: str, key: str, ca: str, message: str
) -> None:
    settings = ServerSettings(
        tls_cert=certificates / cert,
        tls_key=certificates / key,
        tls_client_ca=certificates / ca if ca else None,
    )
    with pytest.raises(ConfigError, match=message):
        server_credentials(settings)


def test_a_usable_pair_is_taken(certificates: Path) -> None:
    settings = ServerSettings(
        tls_cert=certificates / "one.pem",
        tls_key=certificates / "one.key",
        tls_client_ca=certificates / "two.pem",
    )
    assert server_credentials(settings) is not None
    assert server_credentials(ServerSettings()) is None


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (
            lambda port: {"port": port},
            r"cannot listen on 127\.0\.0\.1:{port}: Address already in use",
        ),
        (
            lambda port: {"port": 0, "metrics_port": port},
            r"server\.metrics_port: cannot listen on 127\.0\.0\.1 port {port}: Address already in use",
        ),
        (lambda port: {"port": 0, "host": "nowhere.invalid"}, r"'nowhere\.invalid' cannot be resolved"),
        (lambda port: {"port": 0, "host": "192.0.2.1"}, r"cannot listen on 192\.0\.2\.1:0: Cannot assign"),
    ],
)
async def test_a_port_that_cannot_be_had_is_told_with_the_reason(
    server: Callable[[int], dict[str, object]], message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        twinjet = Server(_config(**server(port)))
        with pytest.raises(ConfigError, match=message.replace("{port}", str(port))):
            await twinjet.start()
        await twinjet.stop()


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_ipv6_is_listened_on(serve: Serve, host: str) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
        metrics_port = free.getsockname()[1]
    h = await serve(server={"host": host, "metrics_port": metrics_port})
    assert h.server.address.startswith("[::1]:")
    async with grpc.aio.insecure_channel(h.server.address) as channel:
        stub = service_pb2_grpc.ModelServiceStub(channel)
        assert (await stub.ListModels(model_pb2.ListModelsRequest(), timeout=5)).models
    with socket.create_connection(("::1", metrics_port), timeout=5):
        pass


async def test_a_build_without_the_native_door_serves_through_grpcs_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert make_door(ServerSettings()).name == ("native" if native_door.is_available() else "grpc")
    monkeypatch.setattr(native_door, "is_available", lambda: False)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert make_door(ServerSettings()).name == "grpc"
    assert ["no native door" in record.message for record in caplog.records] == [True]
    with pytest.raises(ConfigError, match="has no native door"):
        make_door(ServerSettings(door="native"))


@pytest.mark.parametrize(
    ("host", "targets"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("localhost", ["127.0.0.1", "[::1]"]),
        ("LOCALHOST", ["127.0.0.1", "[::1]"]),
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2", "[::1]"]),
        ("::", ["127.0.0.1", "127.0.0.2", "[::1]"]),
        ("::ffff:127.0.0.1", ["127.0.0.1"]),
    ],
)
async def test_a_host_means_the_same_through_every_door(
    serve: Serve, door: str, host: str, targets: list[str]
) -> None:
    if door == "grpc" and len(targets) == 2:
        pytest.skip("gRPC's library leaves out an address at which the port that it picked is taken")
    h = await serve(server={"host": host})
    port = h.server.address.rpartition(":")[2]
    refused = []
    for target in targets if _has_ipv6() else targets[:1]:
        async with grpc.aio.insecure_channel(f"{target}:{port}") as channel:
            stub = service_pb2_grpc.ModelServiceStub(channel)
            try:
                await stub.ListModels(model_pb2.ListModelsRequest(), timeout=5)
            except grpc.aio.AioRpcError as error:
                refused.append((target, error.code()))
    assert refused == []


@pytest.mark.parametrize(
    ("file", "environ", "message"),
    [
        (b"[server]\nport = 0\nmetrics_port = {port}\n", {}, "server.metrics_port: cannot listen"),
        (b"[admin]\ntoken = '\xe9'\n", {}, "is not UTF-8"),
        (b"[server]\nport = 0\n", {"TWINJET_SERVER_PORT": "1"}, "unknown variable TWINJET_SERVER_PORT"),
        (b"[server]\nport = 0\nkeepalive_s = inf\n", {}, "server.keepalive_s: inf is refused"),
        (b"[server]\nport = 0\ntls_cert = '/none'\ntls_key = '/none'\n", {}, "server.tls_cert: cannot read"),
    ],
)
def test_serve_ends_with_2_and_one_line(
    tmp_path: Path, file: bytes, environ: dict[str, str], message: str
) -> None:
    path = tmp_path / "twinjet.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1]).encode()
        path.write_bytes(file.replace(b"{port}", port) + b'[deployments.a]\nengine = "fake"\n')
        done = subprocess.run(
            [sys.executable, "-m", "twinjet.cli", "serve", "--config", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | environ,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
