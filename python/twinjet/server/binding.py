"""What the server needs to listen: TLS files that can work, and the reason when a port cannot be had.

gRPC itself says neither: a file without a certificate in it and a taken port are the same failure to it.
"""

from __future__ import annotations

import re
import socket
import ssl
from pathlib import Path

import grpc

from twinjet.config import ServerSettings
from twinjet.errors import ConfigError

_CERTIFICATE = re.compile(rb"-----BEGIN (TRUSTED |X509 )?CERTIFICATE-----")
_KEY = re.compile(rb"-----BEGIN ([A-Z]+ )?PRIVATE KEY-----")
_ENCRYPTED_KEY = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type: 4,ENCRYPTED", re.MULTILINE)


def server_credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    """Give the server's credentials, None for plain text.

    Raises ConfigError naming the setting whose file cannot be read or is not what it should be.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    cert, key = _read("tls_cert", settings.tls_cert), _read("tls_key", settings.tls_key)
    _check_pair(settings.tls_cert, cert, settings.tls_key, key)
    client_ca = None
    if settings.tls_client_ca is not None:
        client_ca = _read("tls_client_ca", settings.tls_client_ca)
        _check_authorities("tls_client_ca", settings.tls_client_ca, client_ca)
    return grpc.ssl_server_credentials([(key, cert)], client_ca, require_client_auth=client_ca is not None)


def why_not(settings: ServerSettings) -> str:
    """Try to bind as gRPC did, and say in the system's words why it cannot be done; "" if it can."""
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        return f"{settings.host!r} cannot be resolved ({getattr(error, 'strerror', None) or error})"
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                probe.listen()
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"server.{name}: cannot read {path}: {error.strerror}") from error


def _check_pair(cert_path: Path, cert: bytes, key_path: Path, key: bytes) -> None:
    if not _CERTIFICATE.search(cert):
        raise ConfigError(f"server.tls_cert: {cert_path} holds no PEM certificate")
    if _ENCRYPTED_KEY.search(key):
        raise ConfigError(
            f"server.tls_key: the key in {key_path} is encrypted; gRPC takes keys without a passphrase only"
        )
    if not _KEY.search(key):
        raise ConfigError(f"server.tls_key: {key_path} holds no PEM private key")
    # OpenSSL takes the two from files only; the files may be replaced meanwhile, which gRPC would not see either.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert_path, key_path, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"server.tls_key: the key in {key_path} does not belong to the certificate in {cert_path}"
            ) from error
        _check_authorities("tls_cert", cert_path, cert)
        raise ConfigError(
            f"server.tls_cert, server.tls_key: {cert_path} and {key_path} cannot be used: "
            f"{error.reason or error}"
        ) from error


def _check_authorities(name: str, path: Path, pem: bytes) -> None:
    if not _CERTIFICATE.search(pem):
        raise ConfigError(f"server.{name}: {path} holds no PEM certificate")
    try:
        ssl.create_default_context(cadata=pem.decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise ConfigError(
            f"server.{name}: the certificate in {path} is damaged: {error.reason or error}"
        ) from error
