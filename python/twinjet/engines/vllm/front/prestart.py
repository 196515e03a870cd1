"""The forkserver that engine processes come from: started first thing, stopped last.

Importing vLLM takes many seconds. `prestart` lets a clean process do that while the front end does the
same in parallel; every engine process, also one that replaces a dead one, then starts from there by a fork.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import sys
from importlib import metadata
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from twinjet.engines.vllm.environment import environment
from twinjet.engines.vllm.front.process import EngineContext, probe
from twinjet.private_folder import PrivateFolder

logger = logging.getLogger(__name__)

_BLOCK_TIME_MS = "1"
"""How long Intel's OpenMP lets a thread wait for the others before it sleeps; it yields its core meanwhile.

A step has hundreds of parallel regions, and waking a sleeping thread for each costs a third of it.
"""

_SPIN_COUNT = "1000"
"""Rounds a thread of GNU's OpenMP waits before it sleeps, some microseconds.

It doesn't yield its core: with the default, milliseconds, two engines on two busy cores reach a seventh of
the tokens a second that they reach with this, and one engine alone a third more.
"""


_folder: PrivateFolder | None = None


def prestart() -> None:
    """Start the forkserver, once; returns at once. Call it before threads, gRPC or a device exist."""
    _choose_folder()
    multiprocessing.set_forkserver_preload(["twinjet.engines.vllm.core.preloaded"])
    with environment(_loader_environment()):
        forkserver.ensure_running()


def wait_ready() -> str:
    """Start the forkserver if need be and wait until it has imported vLLM.

    Returns why it cannot be forked from, "" if it can. Blocks for seconds the first time.
    """
    prestart()
    context = EngineContext(forked=True, phases=None)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=probe, args=(sender,), name="probe")
    try:
        child.start()
        sender.close()
        problem: str = receiver.recv()
    except (EOFError, OSError) as error:
        problem = f"it died: {error!r}"
    else:
        child.join()
    finally:
        receiver.close()
    if problem:
        logger.warning("the engine is spawned rather than forked from the forkserver: %s", problem)
    return problem


def stop() -> None:
    """Stop the forkserver, and with it every engine process that is left. Idempotent."""
    global _folder
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    if _folder is not None:
        del _multiprocessing_settings()["tempdir"]
        _folder.remove()
        _folder = None


def _choose_folder() -> None:
    """Have multiprocessing put its sockets, which a kill leaves behind, where a later process removes them."""
    global _folder
    settings = _multiprocessing_settings()
    if "tempdir" not in settings:
        _folder = PrivateFolder("mp")
        settings["tempdir"] = str(_folder.path)


def _multiprocessing_settings() -> dict[str, Any]:
    settings: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    return settings


def _loader_environment() -> dict[str, str]:
    """What only counts when a process starts: the import path, the OpenMP library and how its threads wait.

    Where there are GPUs, also what keeps importing torch and what it brings from starting threads: a process
    that has asked the CUDA driver for devices, rather than NVML, cannot be forked from.
    """
    changes = {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    return changes | openmp_environment()


def openmp_environment() -> dict[str, str]:
    """Choose the OpenMP that torch and vLLM's CPU kernels share: each would load its own, and the two fight.

    What the environment already says comes first.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    if any(name in preloaded for name in ("libgomp", "libiomp", "libomp")):
        return {}
    changes = {}
    library = _intel_openmp()
    if library is not None:
        if "KMP_BLOCKTIME" not in os.environ:
            changes["KMP_BLOCKTIME"] = _BLOCK_TIME_MS
    else:
        library = _torch_openmp()
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
            changes["GOMP_SPINCOUNT"] = _SPIN_COUNT
    if library is not None:
        changes["LD_PRELOAD"] = f"{preloaded}:{library}".lstrip(":")
    return changes


def _intel_openmp() -> Path | None:
    """Find the library of the package intel-openmp, which also serves code built for GNU's."""
    try:
        files = metadata.files("intel-openmp") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())).resolve() for f in files if f.name == "libiomp5.so"), None)


def _torch_openmp() -> Path | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or sys.platform != "linux":
        return None
    return next(iter(sorted((Path(spec.origin).parent / "lib").glob("libgomp*.so*"))), None)
