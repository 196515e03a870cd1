"""The table of LoRA adapters: names for requests, numbers for the engine."""

from __future__ import annotations

import json
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

    def load(self, name: str, path: str, *, max_rank: int | None = None) -> bool:
        """See AdapterEngine.load_adapter. max_rank: the engine's limit, None if not known."""
        known = self._adapters.get(name)
        if known is not None:
            if known.path != path:
                raise AlreadyExists("adapter", name)
            return True
        rank = _rank(path)
        if max_rank is not None and rank is not None and rank > max_rank:
            raise InvalidRequest.of("path", f"the adapter's rank is {rank}; allowed: at most {max_rank}")
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


def _rank(path: str) -> int | None:
    """Read the rank that an adapter says it has. Raises InvalidRequest if the folder is no adapter's."""
    config = Path(path) / "adapter_config.json"
    if not config.is_file():
        raise InvalidRequest.of("path", f"{path!r} is no folder with an adapter_config.json")
    try:
        tree = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest.of("path", f"adapter_config.json cannot be read: {error}") from error
    rank = tree.get("r") if isinstance(tree, dict) else None
    return rank if isinstance(rank, int) else None
