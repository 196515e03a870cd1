"""What runs in the engine's workers must load nothing of the server there."""

import subprocess
import sys


def test_the_workers_half_imports_nothing_of_the_servers() -> None:
    code = (
        "import sys, twinjet.engines.tensorrt_llm.worker.logits\n"
        "print(sorted(name for name in sys.modules if name in ('asyncio', 'torch', 'grpc', 'pydantic', 'xgrammar')"
        " or name.startswith('twinjet.engines.tensorrt_llm.front')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
