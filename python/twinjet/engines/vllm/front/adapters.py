"""LoRA adapters by name, on vLLM."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from pathlib import Path

from twinjet.engines.vllm.front.link import Adapter, Link
from twinjet.errors import AlreadyExists, EngineDied, InvalidRequest, NotFound


class Adapters:
    """Names to adapters. Ids are never used twice: vLLM caches weights by id."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._known: dict[str, Adapter] = {}
        self._ids = itertools.count(1)

    def find(self, name: str) -> Adapter | None:
        """Give the adapter of a name, None for "". Raises NotFound."""
        if not name:
            return None
        if name not in self._known:
            raise NotFound("adapter", name)
        return self._known[name]

    async def load(self, name: str, path: str) -> bool:
        """Load an adapter; True if it was loaded before. Raises AlreadyExists, InvalidRequest."""
        known = self._known.get(name)
        if known is not None:
            if known.path == path:
                return True
            raise AlreadyExists("adapter", name)
        if not await asyncio.to_thread(Path(path).is_dir):
            raise InvalidRequest.of("path", f"{path!r} is not a folder on the server")
        adapter = Adapter(name, next(self._ids), path)
        try:
            await self._link.add_adapter(adapter)
        except EngineDied:
            raise
        except Exception as error:
            # vLLM passes on what its worker raised as a plain Exception.
            raise InvalidRequest.of("path", f"{path!r} cannot be loaded: {error}") from error
        self._known[name] = adapter
        return False

    async def unload(self, name: str) -> None:
        """Remove an adapter. Raises NotFound."""
        adapter = self.find(name)
        if adapter is None:
            raise NotFound("adapter", name)
        del self._known[name]
        await self._link.call("remove_lora", adapter.number)

    def paths(self) -> Mapping[str, str]:
        return {name: adapter.path for name, adapter in self._known.items()}
