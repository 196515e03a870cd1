"""New TLS files come into use without a restart; unfit ones do not."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.server.harness import Serve
from twinjet.server import native_door


@pytest.fixture
def door() -> str:
    if not native_door.is_available():
        pytest.skip("this build has no native door")
    return "native"


def _make(folder: Path, name: str) -> None:
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {folder}/key.pem -out {folder}/cert.pem -subj /CN={name}"
    subprocess.run(command.split(), check=True, capture_output=True)


async def _shown(address: str) -> bytes:
    """The certificate that the server shows now."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    tls = writer.get_extra_info("ssl_object")
    assert tls.selected_alpn_protocol() == "h2"
    shown = bytes(tls.getpeercert(binary_form=True))
    writer.transport.abort()
    return shown


async def test_new_tls_files_are_taken_and_unfit_ones_are_not(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_door, "_TLS_CHECK_S", 0.02)
    caplog.set_level("INFO", "twinjet.server")
    _make(tmp_path, "first")
    files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    h = await serve(server=files)
    first = await _shown(h.server.address)
    assert first == ssl.PEM_cert_to_DER_cert((tmp_path / "cert.pem").read_text())
    good_key = (tmp_path / "key.pem").read_bytes()
    (tmp_path / "key.pem").write_text("no key\n")
    await h.until(lambda: "holds no PEM private key" in caplog.text)
    assert await _shown(h.server.address) == first
    (tmp_path / "key.pem").write_bytes(good_key)
    await h.until(lambda: "new TLS files are in use" in caplog.text)
    caplog.clear()
    _make(tmp_path, "second")
    await h.until(lambda: "new TLS files are in use" in caplog.text)
    second = await _shown(h.server.address)
    assert second == ssl.PEM_cert_to_DER_cert((tmp_path / "cert.pem").read_text()) != first
