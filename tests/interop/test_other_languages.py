"""gRPC's interoperability cases with the stock clients of other languages, where their tools are.

grpc-js comes through npm; C++ needs libgrpc++-dev; Go needs golang-google-grpc-dev and golang-google-protobuf-dev;
Java needs openjdk-17-jdk-headless, libgrpc-java, libguava-java, libnetty-java, libopencensus-java and
libperfmark-java.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from twinjet.server import native_door

pytestmark = pytest.mark.skipif(not native_door.is_available(), reason="this build has no native door")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NODE_MODULES = ROOT / ".cache" / "interop" / "node_modules"
NODE_PACKAGES = ["@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.0"]
GO_PATH = Path("/usr/share/gocode")
JARS = [
    Path("/usr/share/java") / f"{name}.jar"
    for name in (
        "grpc-api", "grpc-context", "grpc-core", "grpc-netty", "grpc-stub", "guava", "netty-buffer", "netty-codec",
        "netty-codec-http", "netty-codec-http2", "netty-common", "netty-handler", "netty-resolver",
        "netty-transport", "opencensus-api", "perfmark-api", "perfmark-impl",
    )
]  # fmt: skip
CASES = {
    "empty_unary", "large_unary", "compressed_unary", "client_streaming", "server_streaming", "ping_pong",
    "empty_stream", "cancel_after_begin", "cancel_after_first_response", "timeout_on_sleeping_server",
    "status_code_and_message", "custom_metadata", "unimplemented_method_and_service",
}  # fmt: skip


def _has_grpc_cpp() -> bool:
    if shutil.which("pkg-config") is None:
        return False
    return subprocess.run(["pkg-config", "--exists", "grpc++"], check=False).returncode == 0


@pytest.fixture
def port() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.interop.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )
    with process:
        assert process.stdout is not None and process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        assert process.wait(20) == 0


def _passed(command: list[str], **environment: str) -> set[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is missing")
def test_grpc_js(port: str) -> None:
    if not (NODE_MODULES / "@grpc" / "proto-loader").exists():
        install = ["npm", "install", "--prefix", str(NODE_MODULES.parent), "--no-fund", "--no-audit"]
        subprocess.run([*install, *NODE_PACKAGES], check=True, capture_output=True, timeout=240)
    assert _passed(["node", str(HERE / "client.js"), port], NODE_PATH=str(NODE_MODULES)) == CASES


@pytest.mark.skipif(
    shutil.which("go") is None or not (GO_PATH / "src" / "google.golang.org" / "grpc").exists(),
    reason="Go or its gRPC library is missing",
)
def test_go(port: str, tmp_path: Path) -> None:
    client = tmp_path / "client"
    subprocess.run(
        ["go", "build", "-o", str(client), str(HERE / "client.go")],
        check=True,
        timeout=280,
        env=os.environ | {"GO111MODULE": "off", "GOPATH": str(GO_PATH)},
    )
    assert _passed([str(client), port]) == CASES


@pytest.mark.skipif(not _has_grpc_cpp(), reason="gRPC C++ is missing")
def test_cpp(port: str, tmp_path: Path) -> None:
    client = tmp_path / "client"
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "grpc++"], check=True, capture_output=True, text=True
    ).stdout.split()
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-O1", str(HERE / "client.cc"), *flags, "-o", str(client)]
    subprocess.run(command, check=True, timeout=280)
    assert _passed([str(client), port]) == CASES


@pytest.mark.skipif(
    shutil.which("javac") is None or not all(jar.exists() for jar in JARS),
    reason="Java or its gRPC library is missing",
)
def test_java(port: str) -> None:
    # One compiler and few threads: it runs for a second.
    flags = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", os.pathsep.join(map(str, JARS))]
    assert _passed(["java", *flags, str(HERE / "Client.java"), port]) == CASES
