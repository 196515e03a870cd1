"""The table of LoRA adapters: names for requests, numbers for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinjet.errors import AlreadyExists, InvalidRequest, NotFound


@dataclass(frozen=True, slots=True)
class _Adapter:
    number: int
    path: str


class AdapterTable:
    """Names and paths of loaded adapters. Numbers are never used twice: the engine caches weights by them."""

    def __init__(self) -> None:
        self._adapters: dict[str, _Adapter] = {}
        self._num_loaded = 0

    def load(self, name: str, path: str) -> bool:
        """See AdapterEngine.load_adapter."""
        known = self._adapters.get(name)
        if known is not None:
            if known.path != path:
                raise AlreadyExists("adapter", name)
            return True
        if not (Path(path) / "adapter_config.json").is_file():
            raise InvalidRequest.of("path", f"{path!r} is no folder with an adapter_config.json")
        self._num_loaded += 1
        self._adapters[name] = _Adapter(self._num_loaded, path)
        return False

    def unload(self, name: str) -> None:
        """See AdapterEngine.unload_adapter."""
        self.check(name)
        del self._adapters[name]

    def check(self, name: str) -> None:
        """Raise NotFound if there is no such adapter."""
        if name not in self._adapters:
            raise NotFound("adapter", name)

    def request(self, name: str, request_type: Any) -> Any:
        """Make the engine's LoRARequest. Raises NotFound."""
        self.check(name)
        adapter = self._adapters[name]
        return request_type(lora_name=name, lora_int_id=adapter.number, lora_path=adapter.path)

    def paths(self) -> Mapping[str, str]:
        return {name: adapter.path for name, adapter in self._adapters.items()}
