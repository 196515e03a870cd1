"""LoRA adapters by name, on vLLM."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinjet.errors import AlreadyExists, InvalidRequest, NotFound


class Adapters:
    """Names to vLLM's LoRARequests. Ids are never used twice: vLLM caches weights by id."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._requests: dict[str, Any] = {}
        self._ids = itertools.count(1)

    def request_for(self, name: str) -> Any:
        """Give the LoRARequest of an adapter, None for "". Raises NotFound."""
        if not name:
            return None
        if name not in self._requests:
            raise NotFound("adapter", name)
        return self._requests[name]

    async def load(self, name: str, path: str) -> bool:
        """Load an adapter; True if it was loaded before. Raises AlreadyExists, InvalidRequest."""
        from vllm.lora.request import LoRARequest

        known = self._requests.get(name)
        if known is not None:
            if known.lora_path == path:
                return True
            raise AlreadyExists("adapter", name)
        if not await asyncio.to_thread(Path(path).is_dir):
            raise InvalidRequest.of("path", f"{path!r} is not a folder on the server")
        request = LoRARequest(name, next(self._ids), path)
        try:
            await self._llm.add_lora(request)
        except Exception as error:
            # vLLM passes on what its worker raised as a plain Exception.
            raise InvalidRequest.of("path", f"{path!r} cannot be loaded: {error}") from error
        self._requests[name] = request
        return False

    async def unload(self, name: str) -> None:
        """Remove an adapter. Raises NotFound."""
        request = self.request_for(name)
        if request is None:
            raise NotFound("adapter", name)
        del self._requests[name]
        await self._llm.remove_lora(request.lora_int_id)

    def paths(self) -> Mapping[str, str]:
        return {name: request.lora_path for name, request in self._requests.items()}
