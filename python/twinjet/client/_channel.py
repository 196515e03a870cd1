"""What both clients say when they connect."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

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


_SEVERAL = re.compile(r"(dns|ipv4|ipv6):", re.IGNORECASE)

SERVICE_CONFIG = {
    "loadBalancingConfig": [
        {
            "weighted_round_robin": {
                "enableOobLoadReport": True,
                "oobReportingPeriod": "0.25s",
                "blackoutPeriod": "2s",
                "weightUpdatePeriod": "0.25s",
                "weightExpirationPeriod": "180s",
                "errorUtilizationPenalty": 1.0,
            }
        },
        {"round_robin": {}},
    ],
    "healthCheckConfig": {"serviceName": ""},
}
"""How calls are spread over several servers: by the load that each of them reports, past those that do not serve."""


def channel_options(address: str, further: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Give the options of a channel. An address that may stand for several servers is balanced; further ones win."""
    options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
    if _SEVERAL.match(address):
        options.append(("grpc.service_config", json.dumps(SERVICE_CONFIG)))
    given = {name for name, _ in further}
    return [*((name, value) for name, value in options if name not in given), *further]


def call_metadata(token: str) -> list[tuple[str, str]]:
    """Give the metadata of every call. token: the admin token, "" for none."""
    return [("authorization", f"Bearer {token}")] if token else []
