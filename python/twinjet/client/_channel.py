"""What both clients say when they connect."""

from __future__ import annotations

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that has gone without a word is noticed within a minute, even in a long silent prefill.
    ("grpc.keepalive_time_ms", 40_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # gRPC's own bound is two minutes between two tries to connect: too long once the server is back.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Despite its name, how long one try to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5_000),
]


def call_metadata(token: str) -> list[tuple[str, str]]:
    """Give the metadata of every call. token: the admin token, "" for none."""
    return [("authorization", f"Bearer {token}")] if token else []
