"""Answers of envoy.service.ext_proc.v3.ExternalProcessor, made as bytes; reading them is native (_core).

Written by hand since the packages that carry Envoy's messages bring 23 MB of others. tests/epp/test_wire.py holds them
against Envoy's own descriptors' numbers, tests/epp/test_envoy.py against Envoy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from twinjet.protobuf_bytes import field, number_field

SERVICE_NAME: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
DESTINATION: Final = "x-gateway-destination-endpoint"
METADATA_NAMESPACE: Final = "envoy.lb"

REQUEST_HEADERS, RESPONSE_HEADERS, REQUEST_BODY, RESPONSE_BODY, REQUEST_TRAILERS, RESPONSE_TRAILERS = range(
    2, 8
)
"""Kinds of ProcessingRequest, as read_processing_request gives them: its field numbers."""

NONE, STREAMED, BUFFERED, BUFFERED_PARTIAL, FULL_DUPLEX_STREAMED = range(5)
"""ProcessingMode.BodySendMode."""

MAX_CHUNK: Final = 60_000
"""Bytes of a body in one message; Envoy's buffers take 64 KiB."""

_OVERWRITE = 2


def _header_mutation(headers: Iterable[tuple[str, str]]) -> bytes:
    options = b""
    for name, value in headers:
        header = field(1, name.encode()) + field(3, value.encode())
        options += field(1, field(1, header) + number_field(3, _OVERWRITE))
    return options


def _metadata(destination: str) -> bytes:
    """Struct {"envoy.lb": {"x-gateway-destination-endpoint": destination}}, as ProcessingResponse.dynamic_metadata."""
    inner = field(1, field(1, DESTINATION.encode()) + field(2, field(3, destination.encode())))
    outer = field(1, field(1, METADATA_NAMESPACE.encode()) + field(2, field(5, inner)))
    return field(8, outer)


def _common(destination: str, *, clear_route: bool) -> bytes:
    if not destination:
        return b""
    mutation = field(2, _header_mutation([(DESTINATION, destination)]))
    return mutation + (number_field(5, 1) if clear_route else b"")


def request_headers(destination: str = "") -> bytes:
    """Let the request go on, to a destination: addresses joined by commas, the best first; "" leaves it to Envoy."""
    common = _common(destination, clear_route=False)
    return field(1, field(1, common)) + (_metadata(destination) if destination else b"")


def buffered_body(destination: str = "") -> bytes:
    """The same in answer to a body that Envoy held back."""
    common = _common(destination, clear_route=False)
    return field(3, field(1, common)) + (_metadata(destination) if destination else b"")


def request_body(body: bytes, *, ends: bool) -> bytes:
    """Give a piece of the request's body back."""
    return field(3, field(1, field(3, _streamed(body, ends=ends))))


def response_body(body: bytes, *, ends: bool) -> bytes:
    """Give a piece of the response's body back."""
    return field(4, field(1, field(3, _streamed(body, ends=ends))))


def _streamed(body: bytes, *, ends: bool) -> bytes:
    return field(3, field(1, body) + (number_field(2, 1) if ends else b""))


RESPONSE_HEADERS_GO_ON: Final = field(2, field(1, b""))
RESPONSE_BODY_GOES_ON: Final = field(4, field(1, b""))
REQUEST_TRAILERS_GO_ON: Final = field(5, b"")
RESPONSE_TRAILERS_GO_ON: Final = field(6, b"")


def immediate(http_status: int, grpc_status: int, message: str, trailers: Iterable[tuple[str, str]]) -> bytes:
    """End the request: what a gRPC client gets as its status, with trailing metadata."""
    response = field(1, number_field(1, http_status)) + field(2, _header_mutation(trailers))
    response += field(3, message.encode()) + field(4, number_field(1, grpc_status)) + field(5, b"twinjet_epp")
    return field(7, response)
