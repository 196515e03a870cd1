"""Stand-in for tensorrt_llm.executor.request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorrt_llm import _contract


def _check(self: Any) -> None:
    if not Path(self.lora_path).exists():
        raise ValueError(f"lora_path {self.lora_path!r} does not exist")


LoRARequest = _contract.make_dataclass("LoRARequest", after_init=_check)
