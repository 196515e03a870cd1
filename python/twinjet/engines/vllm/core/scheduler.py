"""vLLM's scheduler on the native block manager, with decodes scheduled in one native call a step.

Given to vLLM as `scheduler_cls="twinjet.engines.vllm.core.scheduler.make_scheduler"`. It is vLLM's own
Scheduler or AsyncScheduler (whichever the engine's configuration asks for) with up to three layers
replaced: the KV-cache manager, the batched decode path (decode_path.py) and the prompt hasher. A layer that
may not be replaced here stays vLLM's, with one log line and the reason in the status.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCore
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from twinjet._core import BlockManager
from twinjet.engines.vllm import compat
from twinjet.engines.vllm.status import STATUS_METHOD, LayerStatus, Reason, SchedulerStatus

from . import conditions, grammars, kv_events, prefix_hash
from .decode_path import DecodePath
from .kv_cache_manager import NativeKVCacheManager

logger = init_logger(__name__)


# For the type checker a mixin has the methods of what it will be mixed with.
if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object


class _NativeLayers(_Base):  # type: ignore[misc, valid-type]
    """Mixed in before vLLM's scheduler class."""

    # Where native decodes are in flight, their requests' Python objects lag behind, so every entry
    # that reads one first calls for it to be written back (see DecodePath).
    kv_cache_manager: Any
    decode_path: DecodePath | None = None
    native_status: SchedulerStatus

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        grammars.install(self.structured_output_manager)
        self.native_status = SchedulerStatus(compat.vllm_version())
        self.native_status.block_manager = conditions.judge_manager(self)
        if self.native_status.block_manager.is_native:
            self._install_manager()
        else:
            blocked = LayerStatus(False, self.native_status.block_manager.reason, "no native block manager")
            self.native_status.decode_path = self.native_status.prefix_hash = blocked
        _log(self.native_status)

    def _install_manager(self) -> None:
        stock: Any = self.kv_cache_manager
        group = stock.coordinator.single_type_managers[0]
        blocks = BlockManager(
            self.kv_cache_config.num_blocks,
            group.block_size,
            prefix_cache=stock.enable_caching,
            null_block=True,
            max_events=kv_events.MAX_EVENTS if kv_events.are_wanted() else 0,
        )
        events = kv_events.KvEventSender.from_environment(blocks) if stock.enable_caching else None
        self.kv_cache_manager = NativeKVCacheManager(stock, blocks, events)
        status = self.native_status
        status.prefix_hash = conditions.judge_prefix_hash(self)
        hasher = None
        if status.prefix_hash.is_native:
            hasher = prefix_hash.RequestHasher(blocks.hasher)
            prefix_hash.install(hasher)
        self.native_hasher = hasher
        status.decode_path = conditions.judge_decode_path(self)
        if status.decode_path.is_native:
            self.decode_path = DecodePath(self, hasher)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        path = self.decode_path
        if path is None:
            output: SchedulerOutput = super().schedule(throttle_prefills)
            return output
        return path.schedule(super().schedule, throttle_prefills)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        path = self.decode_path
        if path is None:
            outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
                scheduler_output, model_runner_output
            )
            return outputs
        return path.update(super().update_from_output, scheduler_output, model_runner_output)

    def get_request_counts(self) -> tuple[int, int]:
        num_running, num_waiting = super().get_request_counts()
        path = self.decode_path
        return (num_running + path.num_hidden if path is not None else num_running), num_waiting

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        if self.decode_path is not None:
            if request_ids is not None:
                request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            self.decode_path.evict(request_ids)
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        return finished

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if self.decode_path is not None:
            self.decode_path.evict(None)
        return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        if self.decode_path is not None:
            self.decode_path.free_put_off()
        return super().make_stats(*args, **kwargs)

    def scheduler_status(self) -> SchedulerStatus:
        """The layers in use and the counters up to now."""
        if self.decode_path is not None:
            self.native_status.counters = self.decode_path.counters()
        return self.native_status


class NativeScheduler(_NativeLayers, Scheduler):  # type: ignore[misc]
    """For synchronous scheduling."""


class NativeAsyncScheduler(_NativeLayers, AsyncScheduler):  # type: ignore[misc]
    """For asynchronous scheduling."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> NativeScheduler | NativeAsyncScheduler:
    """Make the scheduler that this engine's configuration asks for."""
    publish_status()
    kind = NativeAsyncScheduler if vllm_config.scheduler_config.async_scheduling else NativeScheduler
    return kind(vllm_config=vllm_config, **kwargs)


def publish_status() -> None:
    """Let the front end ask this process's engine core for the status by a utility call.

    A utility call is looked up by name on the engine core, which vLLM gives no other way to extend.
    """
    setattr(EngineCore, STATUS_METHOD, _engine_core_status)


def _engine_core_status(engine_core: Any) -> dict[str, Any]:
    status: SchedulerStatus = engine_core.scheduler.scheduler_status()
    return status.to_dict()


def _log(status: SchedulerStatus) -> None:
    layers = {
        "block manager": status.block_manager,
        "decode path": status.decode_path,
        "prompt hashing": status.prefix_hash,
    }
    native = [name for name, layer in layers.items() if layer.is_native]
    own = [
        f"{name} ({layer.reason}: {layer.detail})" for name, layer in layers.items() if not layer.is_native
    ]
    unexpected = any(layer.reason == Reason.UNTESTED_VLLM for layer in layers.values())
    log = logger.warning if unexpected else logger.info
    log("native: %s; vllm's own: %s", ", ".join(native) or "nothing", ", ".join(own) or "nothing")
