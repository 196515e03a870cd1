"""`twinjet serve` with the mock (mock_core.py) in place of vLLM's engine core; takes the arguments of serve."""

from __future__ import annotations

import sys
from typing import Any

import mock_core

from twinjet import cli
from twinjet.engines.vllm.front import process


def _stand_in() -> None:
    create = process.EngineContext.Process

    def create_mock(self: process.EngineContext, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("name", "").startswith("EngineCore"):
            kwargs["target"] = mock_core.run
        return create(self, *args, **kwargs)

    process.EngineContext.Process = create_mock  # type: ignore[method-assign]


if __name__ == "__main__":
    _stand_in()
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
