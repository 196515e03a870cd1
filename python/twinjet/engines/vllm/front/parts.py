"""Our components inside the engine: which are asked for, which are really in use, and their counters."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from twinjet.engines.base import Capability, Component, EngineInfo
from twinjet.engines.vllm.fields import COUNTERS_METHOD
from twinjet.engines.vllm.front.link import Link
from twinjet.engines.vllm.status import STATUS_METHOD, SchedulerStatus

SCHEDULER = "twinjet.engines.vllm.core.scheduler.make_scheduler"
PLAIN_SCHEDULER = "twinjet.engines.vllm.core.grammars.make_scheduler"
WORKER = "twinjet.engines.vllm.core.worker.Worker"

_REFRESH_S = 1.0

_GENERATION: frozenset[Capability] = frozenset(
    {
        "generate", "logprobs", "prompt_logprobs", "json_schema", "regex", "ebnf", "choice", "penalties",
        "logit_bias", "bad_words", "allowed_token_ids", "min_p", "min_tokens", "seed", "multiple_outputs",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """Names under which vLLM loads our classes in its process; None leaves its own, and reason says why.

    scheduler_cls: PLAIN_SCHEDULER is vLLM's own, which takes our compiled grammars.
    """

    scheduler_cls: str
    worker_cls: str | None
    reason: str = ""


def has_extension() -> bool:
    """Tell whether twinjet._core is installed."""
    return importlib.util.find_spec("twinjet._core") is not None


def choose(native_sampler: bool, native_block_manager: bool) -> Parts:
    """Choose our components as far as they were asked for and the extension is there."""
    if not has_extension():
        return Parts(PLAIN_SCHEDULER, None, "the extension twinjet._core is not installed")
    return Parts(
        SCHEDULER if native_block_manager else PLAIN_SCHEDULER,
        WORKER if native_sampler else None,
        "switched off",
    )


class Components:
    """The engine's description; asks the running engine what is in use."""

    def __init__(self, link: Link, info: EngineInfo, parts: Parts) -> None:
        self._link = link
        self._parts = parts
        self._info = info
        self._read_at = 0.0

    @property
    def has_native_sampler(self) -> bool:
        return self._parts.worker_cls is not None

    def info(self) -> EngineInfo:
        return self._info

    async def complete(self) -> None:
        """Ask once what the loaded model can do."""
        tasks = set(await self._link.call("get_supported_tasks"))
        capabilities = set(self._info.capabilities)
        if "generate" in tasks:
            capabilities |= _GENERATION
            if self._parts.worker_cls is None:
                # vLLM's own sampler bans token sequences, which are some of the ways to make a string.
                capabilities -= {"bad_words"}
        else:
            capabilities -= {"chat", "priority"}
        if "embed" in tasks:
            capabilities.add("embed")
        self._info = replace(self._info, capabilities=frozenset(capabilities))
        self._read_at = time.monotonic()
        await self.refresh()

    def claim(self) -> bool:
        """Tell whether refresh() is due, as often as once a second; whoever hears so must call it."""
        now = time.monotonic()
        if now - self._read_at < _REFRESH_S:
            return False
        self._read_at = now
        return True

    async def refresh(self) -> None:
        """Read the components' state from the engine's processes."""
        sampler, manager = self._info.sampler, self._info.block_manager
        if self._parts.worker_cls is not None:
            # Every worker draws the same tokens; the first one speaks for all.
            workers = await self._link.call("collective_rpc", COUNTERS_METHOD, None, (), None)
            sampler = _sampler(workers[0], self._info.version)
            if sampler.implementation != "twinjet":
                kept = self._info.capabilities - {"bad_words"}
                self._info = replace(self._info, capabilities=kept)
        if self._parts.scheduler_cls == SCHEDULER:
            raw = await self._link.call(STATUS_METHOD)
            manager = _block_manager(SchedulerStatus.from_dict(raw), self._info.version)
        self._info = replace(self._info, sampler=sampler, block_manager=manager)


def _sampler(raw: dict[str, Any], version: str) -> Component:
    counters = MappingProxyType(dict(raw["counters"]))
    if not raw["spec_version"]:
        return Component("engine", version, reason=raw["reason"], counters=counters)
    used = sorted(name for name in counters if name.startswith("stock_steps."))
    reason = ""
    if used:
        reasons = ", ".join(name.removeprefix("stock_steps.") for name in used)
        reason = f"some batches went to vLLM's sampler: {reasons}"
    return Component("twinjet", str(raw["spec_version"]), raw["target"], reason, counters)


def _block_manager(status: SchedulerStatus, version: str) -> Component:
    from twinjet import _core

    counters = MappingProxyType(dict(status.counters))
    part = status.block_manager
    if not part.is_native:
        return Component("engine", version, reason=f"{part.reason}: {part.detail}", counters=counters)
    decode = status.decode_path
    reason = "" if decode.is_native else f"decode path by vLLM: {decode.reason}"
    return Component("twinjet", _core.__version__, "cpp", reason, counters)
