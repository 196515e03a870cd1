"""Imports vLLM once before the tests do: its imports warn, and warnings are errors here."""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if find_spec("vllm") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scheduler_harness  # noqa: F401
        import vllm.lora.request
        import vllm.v1.engine.core  # noqa: F401
