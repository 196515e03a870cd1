"""Naming the engine must not load it: the front end binds its port first."""

import subprocess
import sys


def test_the_engine_module_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, twinjet.engines.vllm.front.engine, twinjet.engines.vllm.front.prestart\n"
        "print(sorted({'vllm', 'torch', 'transformers', 'grpc'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
