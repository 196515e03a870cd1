"""Starting AsyncLLM: phases, the engine's process, and what is running afterwards."""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from twinjet.engines.base import LoadProgress, Tokenizer
from twinjet.engines.vllm.front import parts, prestart
from twinjet.engines.vllm.front.adapters import Adapters
from twinjet.engines.vllm.front.load import LoadReader
from twinjet.engines.vllm.front.parts import Components
from twinjet.engines.vllm.front.process import EngineContext
from twinjet.errors import ConfigError, EngineDied
from twinjet.models.demo import DEMO_MODEL, demo_model

logger = logging.getLogger(__name__)

# Starting an engine sets names and variables of the whole process for a while, so one starts at a time.
_LAUNCHING = threading.Lock()

# The demo model answers worse, and otherwise on each kind of CPU, with bfloat16 arithmetic.
_DEMO_OPTIONS = {"dtype": "float32"}

# Phase, for people, and the share of a warm start on two cores that lies before it.
_PHASES = {
    "import": ("importing vLLM", 0.02),
    "configure": ("reading the model's configuration", 0.55),
    "process": ("starting the engine process", 0.65),
    "weights": ("loading weights", 0.7),
    "memory": ("measuring memory", 0.8),
    "kv_cache": ("preparing the KV cache", 0.85),
    "ready": ("the engine is ready", 1.0),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start; see VllmEngine."""

    name: str
    model: str
    options: dict[str, Any]
    native_sampler: bool
    native_block_manager: bool


@dataclass(slots=True)
class Running:
    """A started engine."""

    llm: Any
    context: EngineContext
    tokenizer: Tokenizer
    components: Components
    adapters: Adapters
    stats: LoadReader
    config: Any
    _death_fds: list[int] = field(default_factory=list)
    _loop: asyncio.AbstractEventLoop | None = None
    _ending: asyncio.Task[None] | None = None

    def watch(self, loop: asyncio.AbstractEventLoop, on_death: Callable[[str], None]) -> None:
        """Call back once one of the engine's processes has ended."""
        self._loop = loop
        for process in self.context.processes:
            assert process.pid is not None
            fd = os.pidfd_open(process.pid)
            self._death_fds.append(fd)
            loop.add_reader(fd, self._ended, fd, process, on_death)

    def _ended(self, fd: int, process: Any, on_death: Callable[[str], None]) -> None:
        assert self._loop is not None
        self._loop.remove_reader(fd)
        self._ending = self._loop.create_task(_tell_death(process, on_death))

    def shutdown(self) -> None:
        """End the engine's processes; blocks until none is left."""
        if self._loop is not None:
            for fd in self._death_fds:
                self._loop.call_soon_threadsafe(self._loop.remove_reader, fd)
                self._loop.call_soon_threadsafe(os.close, fd)
            self._death_fds.clear()
            # While it reads, vLLM takes the end of its engine for a failure and logs it.
            if self.llm.output_handler is not None:
                self._loop.call_soon_threadsafe(self.llm.output_handler.cancel)
        self.llm.shutdown(timeout=5.0)
        end_processes(self.context)


async def _tell_death(process: Any, on_death: Callable[[str], None]) -> None:
    # The forkserver, whose child it is, reports the exit code some milliseconds after the end.
    await asyncio.to_thread(connection.wait, [process.sentinel], 1.0)
    code = process.exitcode
    how = "" if code is None else f" with code {code}" if code >= 0 else f" by signal {-code}"
    on_death(f"the process {process.name} ({process.pid}) ended{how}")


def end_processes(context: EngineContext) -> None:
    for process in context.processes:
        if process.pid is None:
            continue
        if process.is_alive():
            process.kill()
        process.join()


async def launch(plan: Plan, report: Callable[[LoadProgress], None]) -> Running:
    """Start an engine. Raises ConfigError, EngineDied."""
    loop = asyncio.get_running_loop()
    reporter = _Reporter(report)
    # Any plugin that happens to be installed would load in every process of the engine.
    os.environ.setdefault("VLLM_PLUGINS", "")
    prestart.prestart()
    reporter.enter("import")
    model, _ = await asyncio.gather(
        asyncio.to_thread(_find_model, plan.model, reporter.from_thread(loop)),
        asyncio.to_thread(_import_vllm),
    )
    reporter.enter("configure")
    options = _DEMO_OPTIONS | plan.options if plan.model == DEMO_MODEL else plan.options
    launcher = await asyncio.to_thread(_Launcher, replace(plan, model=model, options=options))
    problem = await asyncio.to_thread(prestart.wait_ready)
    reporter.enter("process")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    loop.add_reader(receiver.fileno(), reporter.receive, loop, receiver)
    context = EngineContext(forked=not problem, phases=sender)
    try:
        running = await asyncio.to_thread(launcher.launch, context)
    except BaseException:
        # Also when we are cancelled: the thread goes on, and ends when its process does.
        await asyncio.shield(asyncio.to_thread(end_processes, context))
        raise
    finally:
        loop.remove_reader(receiver.fileno())
        receiver.close()
    reporter.enter("ready")
    return running


class _Reporter:
    def __init__(self, report: Callable[[LoadProgress], None]) -> None:
        self._report = report
        self._done = 0.0

    def enter(self, phase: str) -> None:
        text, done = _PHASES[phase]
        self._done = max(self._done, done)
        self._report(LoadProgress(text, self._done))

    def from_thread(self, loop: asyncio.AbstractEventLoop) -> Callable[[str, float], None]:
        """Make a function that a thread can report a phase of preparing the model with."""

        def say(phase: str, _: float) -> None:
            loop.call_soon_threadsafe(self._report, LoadProgress(phase, self._done))

        return say

    def receive(self, loop: asyncio.AbstractEventLoop, phases: Connection) -> None:
        try:
            self.enter(phases.recv())
        except EOFError:
            loop.remove_reader(phases.fileno())


def _find_model(model: str, report: Callable[[str, float], None]) -> str:
    """Give the folder or name for vLLM; the demo model is made first if need be."""
    return str(demo_model(report)) if model == DEMO_MODEL else model


def _import_vllm() -> None:
    # The collector would walk everything imported so far again and again: a fifth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import vllm.v1.engine.async_llm
        import vllm.v1.structured_output.backend_xgrammar  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported: {error}; install twinjet[vllm]") from error
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class _Launcher:
    """The blocking part, for a thread."""

    def __init__(self, plan: Plan) -> None:
        from twinjet.engines.vllm.front import config
        from twinjet.models.tokenizer import HfTokenizer

        self._plan = plan
        self._parts = parts.choose(plan.native_sampler, plan.native_block_manager)
        with _LAUNCHING:
            self._config = config.engine_config(
                plan.model,
                plan.options,
                scheduler_cls=self._parts.scheduler_cls,
                worker_cls=self._parts.worker_cls,
            )
        self._tokenizer: Tokenizer = HfTokenizer(self._config.model_config.tokenizer)

    def launch(self, context: EngineContext) -> Running:
        import vllm.v1.engine.utils as vllm_utils
        from vllm.v1.engine.async_llm import AsyncLLM

        from twinjet.engines.vllm.front import describe

        # vLLM's own choice is fork or spawn (on CPU always spawn); this is where it makes it.
        with _LAUNCHING:
            original = vllm_utils.get_mp_context
            vllm_utils.get_mp_context = lambda: context
            try:
                llm = AsyncLLM.from_vllm_config(self._config)
            except Exception as error:
                raise EngineDied(f"the engine did not start: {error}") from error
            finally:
                vllm_utils.get_mp_context = original
        info = describe.engine_info(self._config, llm, self._tokenizer, self._parts)
        stats = LoadReader(None if info.kv_cache is None else info.kv_cache.num_blocks)
        llm.logger_manager = stats
        return Running(
            llm,
            context,
            self._tokenizer,
            Components(llm, info, self._parts),
            Adapters(llm),
            stats,
            self._config,
        )
