"""vLLM's OpenAI server with the mock (mock_core.py) in place of its engine core; takes the server's arguments."""

from __future__ import annotations

import runpy

import mock_core


def _stand_in() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc.run_engine_core = staticmethod(mock_core.run)


if __name__ == "__main__":
    _stand_in()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
