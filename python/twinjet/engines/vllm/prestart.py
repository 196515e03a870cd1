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
from multiprocessing import forkserver
from pathlib import Path

from twinjet.engines.vllm.environment import environment
from twinjet.engines.vllm.process import EngineContext, probe

logger = logging.getLogger(__name__)

_SPIN_COUNT = "1000"
"""Rounds an OpenMP thread waits for the others before it sleeps, some microseconds.

The default waits for milliseconds, which the front end, our sampler's threads and other processes need: on
two busy cores a decode-like loop took 600 to 850 ms a round with it, 25 to 55 ms with this.
"""


def prestart() -> None:
    """Start the forkserver, once; returns at once. Call it before threads, gRPC or a device exist."""
    multiprocessing.set_forkserver_preload(["twinjet.engines.vllm.preloaded"])
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
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _loader_environment() -> dict[str, str]:
    """What only counts when a process starts: the import path, the OpenMP library and how its threads wait."""
    changes = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    library = _openmp_library()
    preloaded = os.environ.get("LD_PRELOAD", "")
    if library is not None and "libgomp" not in preloaded:
        changes["LD_PRELOAD"] = f"{preloaded}:{library}".lstrip(":")
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        changes["GOMP_SPINCOUNT"] = _SPIN_COUNT
    return changes


def _openmp_library() -> Path | None:
    """Find torch's own OpenMP: vLLM's CPU kernels would load a second one, and the two fight for cores."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or sys.platform != "linux":
        return None
    return next(iter(sorted((Path(spec.origin).parent / "lib").glob("libgomp*.so*"))), None)
