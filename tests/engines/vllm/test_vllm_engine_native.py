"""Real vLLM on a CPU, native scheduling on and off: the same tokens, by the path that was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the vllm extra is not installed")

import twinjet
from twinjet.engines.vllm.front.prestart import openmp_environment

SCRIPT = Path(__file__).parent / "offline_engine.py"


def run_engine(model: Path, directory: Path, native: str, scheduling: str) -> dict[str, Any]:
    output = directory / f"{native}-{scheduling}.json"
    environment = os.environ | openmp_environment()
    environment.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_PLUGINS="",
        HF_HUB_OFFLINE="1",
    )
    package = str(Path(twinjet.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), str(model), str(output), native, scheduling],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    report: dict[str, Any] = json.loads(output.read_text())
    return report


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_native_scheduling_changes_no_token(demo_model_path: Path, tmp_path: Path) -> None:
    """Synchronous scheduling, which is all that vLLM does on a CPU; the lockstep tests cover both modes."""
    scheduling = "sync"
    native = run_engine(demo_model_path, tmp_path, "on", scheduling)
    stock = run_engine(demo_model_path, tmp_path, "off", scheduling)

    assert not native["async"]
    assert not stock["async"]
    assert native["preemptions"] > 0
    assert native["preemptions"] == stock["preemptions"]
    assert native["cached_tokens"] == stock["cached_tokens"]
    assert sum(native["cached_tokens"]) > 0
    assert native["tokens"] == stock["tokens"]
    assert native["reasons"] == stock["reasons"]

    status = native["status"]
    assert all(status[layer]["is_native"] for layer in ("block_manager", "decode_path", "prefix_hash"))
    counters = status["counters"]
    assert counters["rows_scheduled"] > 200
    assert counters["rows_updated"] > 200
    assert counters["native_steps"] > 0
    assert counters["native_updates"] > 0
    assert not stock["status"]["block_manager"]["is_native"]
    assert stock["status"]["block_manager"]["reason"] == "off"
