"""Load reports for gRPC load balancers: the values, and their wire form for the trailer.

Open Request Cost Aggregation, message xds.data.orca.v3.OrcaLoadReport. A server sends it in the trailing
metadata TRAILER of a call; weighted-round-robin clients read application_utilization.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from twinjet.scheduler.events import SchedulerLoad

TRAILER: Final = "endpoint-load-metrics-bin"


@dataclass(frozen=True, slots=True)
class OrcaReport:
    """cpu, mem, utilization: shares from 0; cpu and application_utilization may exceed 1 under overload.

    application_utilization: the fullest of running slots and KV blocks, plus the queue in units of the slots.
    """

    cpu_utilization: float
    mem_utilization: float
    application_utilization: float
    utilization: Mapping[str, float]
    named_metrics: Mapping[str, float]

    def encode(self) -> bytes:
        """Protobuf wire form."""
        message = b"".join(
            _double(number, value)
            for number, value in (
                (1, self.cpu_utilization),
                (2, self.mem_utilization),
                (9, self.application_utilization),
            )
            if value
        )
        for number, values in ((5, self.utilization), (8, self.named_metrics)):
            for key, value in values.items():
                name = key.encode()
                item = b"\x0a" + _varint(len(name)) + name + _double(2, value)
                message += _varint(number << 3 | 2) + _varint(len(item)) + item
        return message


def orca_report(
    load: SchedulerLoad, *, max_running: int, cpu_utilization: float = 0.0, mem_utilization: float = 0.0
) -> OrcaReport:
    """Turn a reading of the scheduler into a report.

    max_running: sequences that may run at once, at least 1. cpu_utilization, mem_utilization: of the process
    or machine, as the caller measures them.
    """
    slots = load.running / max_running
    kv = (load.kv_blocks_used or 0) / load.kv_blocks_total if load.kv_blocks_total else 0.0
    named = {
        "waiting": float(load.waiting),
        "running": float(load.running),
        "waiting_tokens": float(load.waiting_tokens),
        "output_tokens_per_second": load.output_tokens_per_s,
    }
    if load.expected_wait_s is not None:
        named["expected_wait_s"] = load.expected_wait_s
    return OrcaReport(
        cpu_utilization=cpu_utilization,
        mem_utilization=mem_utilization,
        application_utilization=max(slots, kv) + load.waiting / max_running,
        utilization={"kv_cache": min(kv, 1.0)},
        named_metrics=named,
    )


def _double(number: int, value: float) -> bytes:
    return bytes((number << 3 | 1,)) + struct.pack("<d", value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
