"""The fake engine with all that the contract knows: adapters and KV events too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from twinjet.engines.base import EngineInfo, KvBlockFacts, KvEvent, KvRemoved, KvStored
from twinjet.engines.fake import FakeEngine
from twinjet.engines.kv_journal import KvJournal
from twinjet.errors import AlreadyExists, NotFound

KV_EVENTS: list[list[KvEvent]] = [
    [KvStored((b"\x01", b"\x02"), b"\x00", (5, 6, 7, 8), 2, KvBlockFacts("salt", "lora", "device"))],
    [KvRemoved((b"\x01",))],
]


class FullFakeEngine(FakeEngine):
    """Takes adapters without loading anything, and has published KV_EVENTS."""

    _paths: dict[str, str]
    _journal: KvJournal

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

    @property
    def kv_journal(self) -> KvJournal:
        if "_journal" not in self.__dict__:
            self.__dict__["_journal"] = KvJournal()
            for batch in KV_EVENTS:
                self._journal.put(batch)
        return self._journal

    async def stop(self) -> None:
        self.kv_journal.close()
        await super().stop()

    def _all(self) -> dict[str, str]:
        self.__dict__.setdefault("_paths", {})
        return self._paths
