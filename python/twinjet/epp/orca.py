"""Reads xds.data.orca.v3.OrcaLoadReport, which replicas send; a replica may send anything."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Final

_MOST: Final = 1e12


@dataclass(frozen=True, slots=True)
class Reading:
    """What the picker makes of a report. serving: by deployment, where the report tells of deployments."""

    waiting: float
    running: float
    waiting_tokens: float
    kv_utilization: float
    expected_wait_s: float | None
    serving: dict[str, bool]


def read(report: bytes) -> Reading:
    """Read a report. Numbers that cannot be are brought into bounds: what is not a number is the worst.

    Raises ValueError if it is none.
    """
    named: dict[str, float] = {}
    place = 0
    while place < len(report):
        tag, place = _varint(report, place)
        kind = tag & 7
        if kind == 1:
            place += 8
        elif kind == 5:
            place += 4
        elif kind == 0:
            _, place = _varint(report, place)
        elif kind == 2:
            size, place = _varint(report, place)
            if place + size > len(report):
                raise ValueError("a load report is cut short")
            if tag >> 3 == 8:
                _read_entry(report[place : place + size], named)
            place += size
        else:
            raise ValueError("not a load report")
    if place > len(report):
        raise ValueError("a load report is cut short")
    wait = named.get("expected_wait_s")
    return Reading(
        waiting=_bounded(named.get("waiting", 0.0)),
        running=_bounded(named.get("running", 0.0)),
        waiting_tokens=_bounded(named.get("waiting_tokens", 0.0)),
        kv_utilization=min(_bounded(named.get("kv_cache_utilization", 0.0)), 1.0),
        expected_wait_s=None if wait is None or not math.isfinite(wait) or wait < 0 else wait,
        serving={
            name.removesuffix(".serving"): value > 0
            for name, value in named.items()
            if name.endswith(".serving")
        },
    )


def _bounded(value: float) -> float:
    return _MOST if math.isnan(value) else min(max(value, 0.0), _MOST)


def _read_entry(entry: bytes, named: dict[str, float]) -> None:
    key, value, place = "", 0.0, 0
    while place < len(entry):
        tag = entry[place]
        place += 1
        if tag == 0x0A:
            size, place = _varint(entry, place)
            key = entry[place : place + size].decode(errors="replace")
            place += size
        elif tag == 0x11 and place + 8 <= len(entry):
            (value,) = struct.unpack_from("<d", entry, place)
            place += 8
        else:
            raise ValueError("not an entry of a load report")
    named[key] = value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(data):
            raise ValueError("a load report is cut short")
        value |= (data[place] & 0x7F) << shift
        place += 1
        if data[place - 1] < 0x80:
            return value, place
    raise ValueError("a number too long")
