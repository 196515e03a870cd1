"""Imports vLLM once before the tests do: its imports warn, and warnings are errors here."""

import json
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.support import OPTIONS, QUESTIONS, chat_prompt

sys.path.insert(0, str(Path(__file__).parent))

if find_spec("vllm") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scheduler_harness  # noqa: F401
        import vllm.lora.request
        import vllm.v1.engine.core  # noqa: F401


@pytest.fixture(scope="session")
def offline(demo_model_path: Path) -> list[dict[str, Any]]:
    """What vLLM's own offline engine answers to QUESTIONS, one prompt after the other."""
    from twinjet.engines.vllm.front.prestart import openmp_environment
    from twinjet.models.tokenizer import HfTokenizer

    tokenizer = HfTokenizer(demo_model_path)
    prompts = [chat_prompt(tokenizer, question) for question in QUESTIONS]
    wanted = {"model": str(demo_model_path), "options": OPTIONS, "prompts": prompts, "max_tokens": 24}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline.py"))],
        input=json.dumps(wanted), capture_output=True, text=True, timeout=500,
        env=os.environ | openmp_environment(),
    )  # fmt: skip
    line = next((x for x in done.stdout.splitlines() if x.startswith("ANSWERS ")), None)
    assert line is not None, done.stderr[-4000:]
    answers: list[dict[str, Any]] = json.loads(line.removeprefix("ANSWERS "))
    return answers
