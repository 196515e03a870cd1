"""The fake engine with all that the contract knows: adapters and KV events too."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence

from twinjet.engines.base import EngineInfo, KvCleared, KvEvent, KvRemoved, KvStored
from twinjet.engines.fake import FakeEngine
from twinjet.errors import AlreadyExists, NotFound

KV_EVENTS: list[list[KvEvent]] = [
    [KvStored((b"\x01", b"\x02"), b"\x00", (5, 6, 7, 8), 2)],
    [KvRemoved((b"\x01",)), KvCleared()],
]


class FullFakeEngine(FakeEngine):
    """Takes adapters without loading anything, and publishes KV_EVENTS to each watcher, then nothing."""

    _paths: dict[str, str]

    def describe(self) -> EngineInfo:
        info = super().describe()
        return dataclasses.replace(info, capabilities=info.capabilities | {"adapters", "kv_events"})

    async def load_adapter(self, name: str, path: str) -> bool:
        paths = self._all()
        if paths.setdefault(name, path) != path:
            raise AlreadyExists("adapter", name)
        return False

    async def unload_adapter(self, name: str) -> None:
        if self._all().pop(name, None) is None:
            raise NotFound("adapter", name)

    def adapters(self) -> Mapping[str, str]:
        return self._all()

    async def kv_events(self) -> AsyncIterator[Sequence[KvEvent]]:
        for batch in KV_EVENTS:
            yield batch
        await asyncio.Event().wait()

    def _all(self) -> dict[str, str]:
        self.__dict__.setdefault("_paths", {})
        return self._paths
