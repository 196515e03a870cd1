"""Starting an engine: phases, the engine's process, and what is running afterwards."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from twinjet.engines.base import LoadProgress, Tokenizer
from twinjet.engines.vllm import kv_wire
from twinjet.engines.vllm.core import host
from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front import describe, parts, prestart
from twinjet.engines.vllm.front.adapters import Adapters
from twinjet.engines.vllm.front.core_link import CoreLink, Endpoints
from twinjet.engines.vllm.front.link import Link
from twinjet.engines.vllm.front.load import LoadReader
from twinjet.engines.vllm.front.parts import Components
from twinjet.engines.vllm.front.process import EngineContext, end_processes
from twinjet.errors import ConfigError, EngineDied
from twinjet.models.demo import DEMO_MODEL, demo_model
from twinjet.models.token_texts import TokenTextsFile
from twinjet.models.tokenizer import HfTokenizer

logger = logging.getLogger(__name__)

CORE: Callable[..., None] | None = None
"""Runs in the engine's process in the place of vLLM's engine core; for measurements of the front end."""

_SHUTDOWN_S = 5.0

# The demo model answers worse, and otherwise on each kind of CPU, with bfloat16 arithmetic.
_DEMO_OPTIONS = {"dtype": "float32"}

# Phase, for people, and the share of a warm start on two cores that lies before it.
_PHASES = {
    "import": ("importing vLLM", 0.02),
    "configure": ("reading the model's configuration", 0.75),
    "weights": ("loading weights", 0.8),
    "memory": ("profiling the model and measuring memory", 0.9),
    "kv_cache": ("preparing the KV cache", 0.92),
    "warm_up": ("compiling, capturing graphs and warming up", 0.95),
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
    kv_events: str = ""
    """Where the engine is to tell its KV events, "" is nowhere; see KvEventReceiver."""


@dataclass(slots=True)
class Running:
    """A started engine."""

    link: Link
    context: EngineContext
    tokenizer: Tokenizer
    components: Components
    adapters: Adapters
    stats: LoadReader
    token_texts: TokenTextsFile
    tokenizer_name: str
    _death_fds: list[int] = field(default_factory=list)
    _loop: asyncio.AbstractEventLoop | None = None
    _ending: asyncio.Task[None] | None = None

    def watch(self, loop: asyncio.AbstractEventLoop, on_death: Callable[[str], None]) -> None:
        """Begin to take outputs, and call back once one of the engine's processes has ended."""
        self._loop = loop
        self.link.watch(loop, on_death)
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
        self.link.shutdown()
        end_processes(self.context, grace_s=_SHUTDOWN_S)
        self.token_texts.remove()


async def _tell_death(process: Any, on_death: Callable[[str], None]) -> None:
    # The forkserver, whose child it is, reports the exit code some milliseconds after the end.
    await asyncio.to_thread(connection.wait, [process.sentinel], 1.0)
    code = process.exitcode
    how = "" if code is None else f" with code {code}" if code >= 0 else f" by signal {-code}"
    on_death(f"the process {process.name} ({process.pid}) ended{how}")


async def launch(plan: Plan, report: Callable[[LoadProgress], None]) -> Running:
    """Start an engine. Raises ConfigError, EngineDied."""
    loop = asyncio.get_running_loop()
    reporter = _Reporter(report)
    # Any plugin that happens to be installed would load in every process of the engine.
    os.environ.setdefault("VLLM_PLUGINS", "")
    prestart.prestart()
    reporter.enter("import")
    importing = asyncio.ensure_future(asyncio.to_thread(prestart.wait_ready))
    model = await asyncio.to_thread(_find_model, plan.model, reporter.from_thread(loop))
    if not importing.done():
        # What was last said is of the model, and that is done.
        reporter.enter("import")
    problem = await importing
    options = _DEMO_OPTIONS | plan.options if plan.model == DEMO_MODEL else plan.options
    launcher = _Launcher(replace(plan, model=model, options=options), forked=not problem)
    reporter.enter("configure")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    loop.add_reader(receiver.fileno(), reporter.receive, loop, receiver)
    environment = {kv_wire.ADDRESS_ENV: plan.kv_events} if plan.kv_events else {}
    context = EngineContext(forked=not problem, phases=sender, environment=environment)
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


class _Launcher:
    """The blocking part, for a thread."""

    def __init__(self, plan: Plan, *, forked: bool) -> None:
        self._plan = plan
        self._forked = forked
        self._parts = parts.choose(plan.native_sampler, plan.native_block_manager)

    def launch(self, context: EngineContext) -> Running:
        """Start the engine, by our own client of its core if that was tested with it."""
        if parts.has_extension():
            endpoints = Endpoints()
            try:
                running = self._by_core_link(endpoints, context)
            except BaseException:
                endpoints.close()
                raise
            if running is not None:
                return running
            endpoints.close()
        return self._by_async_llm(context)

    def _by_core_link(self, endpoints: Endpoints, context: EngineContext) -> Running | None:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = context.Process(
            target=host.run,
            name="EngineCore",
            kwargs={
                "model": self._plan.model, "options": self._plan.options, "answer": theirs,
                "scheduler_cls": self._parts.scheduler_cls, "worker_cls": self._parts.worker_cls,
                "handshake_address": endpoints.address("handshake"), "report": None, "core": CORE,
            },
        )  # fmt: skip
        process.start()
        theirs.close()
        try:
            kind, answer = ours.recv()
        except EOFError:
            process.join()
            raise EngineDied(
                f"the engine did not start: its process ended with code {process.exitcode}"
            ) from None
        finally:
            ours.close()
        if kind == host.CONFIG_ERROR:
            raise ConfigError(answer)
        if kind == host.STOCK:
            logger.info("%s is spoken to through AsyncLLM: %s", self._plan.name, answer)
            process.join()
            context.processes.remove(process)
            return None
        tokenizer = HfTokenizer(answer.tokenizer)
        ready = endpoints.shake_hands(process)
        blocks = ready["num_gpu_blocks"]
        facts = replace(
            answer,
            max_model_len=min(answer.max_model_len, ready["max_model_len"]),
            # Block 0 is vLLM's null block and never handed out.
            num_blocks=blocks - 1 if blocks else None,
            block_size=ready["block_size"],
        )
        stats = LoadReader(facts.num_blocks)
        link = CoreLink(endpoints, facts, tokenizer, stats)
        return self._running(link, context, facts, tokenizer, stats)

    def _by_async_llm(self, context: EngineContext) -> Running:
        from twinjet.engines.vllm.front import stock

        stats = LoadReader(None)
        link, facts, tokenizer = stock.launch(
            self._plan.model, self._plan.options, self._parts.scheduler_cls, self._parts.worker_cls, context,
            stats,
        )  # fmt: skip
        stats.num_blocks = facts.num_blocks
        return self._running(link, context, facts, tokenizer, stats)

    def _running(
        self, link: Link, context: EngineContext, facts: Facts, tokenizer: Tokenizer, stats: LoadReader
    ) -> Running:
        info = describe.engine_info(facts, tokenizer, self._parts)
        components = Components(link, info, self._parts)
        texts = TokenTextsFile(tokenizer.vocabulary)
        return Running(link, context, tokenizer, components, Adapters(link), stats, texts, facts.tokenizer)
