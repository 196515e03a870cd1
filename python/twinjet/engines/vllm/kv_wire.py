"""How KV events go from an engine core to the front end: frames on a Unix socket. Plain data; no vLLM import.

A frame is its kind, its size and its bytes. EVENTS holds records of the native log (csrc/kv/event_log.h); FACTS says in
JSON what new tags mean ({"7": ["salt", "adapter"]}) and FORGET which tags come no more.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from twinjet.engines.base import KvBlockFacts, KvCleared, KvEvent, KvRemoved, KvStored

ADDRESS_ENV = "TWINJET_KV_EVENTS"
"""Names the socket in the environment of an engine's process."""

EVENTS, FACTS, FORGET = range(3)
HEADER = struct.Struct("=BI")

_RECORD = struct.Struct("=BBHIII16s")
_STORED, _REMOVED, _CLEARED, _LOST = range(1, 5)
_HASH_BYTES = 16
_TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class Lost:
    """So many events were dropped before they could be sent."""

    num_events: int


def frame(kind: int, data: bytes) -> bytes:
    """Make a frame."""
    return HEADER.pack(kind, len(data)) + data


def facts_frame(tags: Mapping[int, tuple[str, str]]) -> bytes:
    """Make the frame that says what tags mean: salt and adapter."""
    return frame(FACTS, json.dumps(tags).encode())


def forget_frame(tags: Iterable[int]) -> bytes:
    """Make the frame that takes tags back."""
    return frame(FORGET, json.dumps(list(tags)).encode())


class Decoder:
    """Turns frames into events, in order."""

    def __init__(self) -> None:
        self._facts: dict[int, KvBlockFacts] = {0: KvBlockFacts(medium="device")}

    def decode(self, kind: int, data: bytes) -> list[KvEvent | Lost]:
        """Give the events of a frame; none of one that tells of tags."""
        if kind == FACTS:
            for tag, (salt, adapter) in json.loads(data).items():
                self._facts[int(tag)] = KvBlockFacts(salt, adapter, "device")
            return []
        if kind == FORGET:
            for tag in json.loads(data):
                self._facts.pop(tag, None)
            return []
        return list(self._events(data))

    def _events(self, data: bytes) -> Iterator[KvEvent | Lost]:
        at = 0
        while at < len(data):
            kind, has_parent, _, tag, num_blocks, num_tokens, parent = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            if kind == _LOST:
                yield Lost(num_blocks)
                continue
            if kind == _CLEARED:
                yield KvCleared()
                continue
            end = at + num_blocks * _HASH_BYTES
            hashes = [data[i : i + _HASH_BYTES] for i in range(at, end, _HASH_BYTES)]
            at = end
            if kind == _REMOVED:
                yield KvRemoved(hashes)
                continue
            end = at + num_blocks * num_tokens * _TOKEN_BYTES
            tokens = memoryview(data)[at:end].cast("i").tolist()
            at = end
            facts = self._facts[tag]
            yield KvStored(hashes, parent if has_parent else b"", tokens, num_tokens, facts)
