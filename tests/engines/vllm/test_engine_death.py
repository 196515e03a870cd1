"""The engine's processes die, and so do we: streams end at once, a restart is quick, nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.support import is_alive
from twinjet.engines.vllm.front import prestart
from twinjet.private_folder import remove_left

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def _run(model: Path, ending: str, temporary: Path) -> tuple["subprocess.Popen[str]", dict[str, Any]]:
    victim = Path(__file__).with_name("victim.py")
    process = subprocess.Popen(
        [sys.executable, str(victim), str(model), ending],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("REPORT "):
            report: dict[str, Any] = json.loads(line.removeprefix("REPORT "))
            return process, report
    raise AssertionError("".join(seen[-40:]))


def _all_gone(pids: list[int], within_s: float = 15) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(is_alive(pid) for pid in pids):
            return True
        os.sched_yield()
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("ending", ["stop", "kill"])
def test_a_killed_engine_ends_its_streams_and_leaves_nothing(
    demo_model_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    temporary = tmp_path_factory.mktemp("t")
    process, report = _run(demo_model_path, ending, temporary)

    def folders() -> set[str]:
        return {path.name.rpartition("-")[0] for path in temporary.glob("*-*") if path.is_dir()}

    own = {"twinjet-core", "twinjet-mp", "twinjet-token-texts"}
    try:
        assert report["slowest_end_s"] < 1
        # Whichever notices first: the watch on the process, or vLLM's own output loop.
        assert "by signal 9" in report["reason"] or "EngineDeadError" in report["reason"]
        assert report["refused"]
        assert report["tokens"] == 8
        # The forkserver, multiprocessing's resource tracker and the second engine.
        assert len(report["descendants"]) == 3
        assert own <= folders()
        if ending == "kill":
            process.send_signal(signal.SIGKILL)
        assert process.wait(60) == (0 if ending == "stop" else -signal.SIGKILL)
        assert _all_gone(report["descendants"])
        if ending == "kill":
            monkeypatch.setattr(tempfile, "tempdir", str(temporary))
            assert len(remove_left()) == len(own)
        assert not folders() & {*own, "pymp"}
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_forking_is_sound() -> None:
    """The forkserver has one thread and no CUDA context once it has imported vLLM."""
    try:
        assert prestart.wait_ready() == ""
    finally:
        prestart.stop()
    prestart.stop()
