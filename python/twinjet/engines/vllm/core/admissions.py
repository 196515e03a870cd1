"""Plain requests that wait, taken up as stock schedule() would, without the rest of it.

Only for a step in which nothing but rows of the decode path runs. A request is plain if its whole prompt fits what is left
of the step's tokens and it has nothing of what stock looks at besides: no grammar, adapter, encoder, embeddings or
session, and no earlier run. At the first in line that is not, stock goes on from there.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import RequestStatus


class Admissions:
    """Belongs to one scheduler, whose attributes it works on as its base class does."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.manager = scheduler.kv_cache_manager
        config = scheduler.scheduler_config
        self._is_async = config.async_scheduling
        self.num_admitted = 0
        self._can_ever = (
            config.long_prefill_token_threshold == 0
            and scheduler.lora_config is None
            and not scheduler.prefix_replay_tokens
            and not scheduler.need_mamba_block_aligned_split
            and not scheduler.observability_config.enable_logging_iteration_details
        )

    def are_plain(self) -> bool:
        """Whether stock would look at nothing but the queue of those that wait."""
        scheduler = self.scheduler
        return (
            self._can_ever
            and scheduler._pause_state is PauseState.UNPAUSED
            and not scheduler.kv_holding_waiting
            and bool(scheduler.waiting)
            and scheduler._kv_fetch_stages is None
        )

    def admit(self, scheduled: dict[str, int]) -> tuple[list[NewRequestData], bool]:
        """Take up requests from the head of the queue, adding their tokens to those scheduled.

        Gives what the runner must know of them, and whether stock schedule() must go on.
        """
        scheduler, manager = self.scheduler, self.manager
        waiting, running = scheduler.waiting, scheduler.running
        limits = scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.max_num_batched_tokens
        budget = min(limits) - len(scheduled)
        room = scheduler.max_num_active_reqs - scheduler.num_waiting_for_streaming_input
        timestamp = time.monotonic()
        admitted: list[NewRequestData] = []
        prompt_too = scheduler.use_v2_model_runner
        is_stopped = False
        while waiting and budget > 0 and len(running) < room:
            request = waiting.peek_request()
            if not _is_plain(request):
                break
            num_hit, num_new, blocks = manager.admit(request, budget, bool(running))
            if num_new > budget:
                break
            request.shared_prefix_boundary = 0
            if request.prefill_stats is not None:
                request.prefill_stats.set(
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_local_cached_tokens=num_hit,
                    num_external_cached_tokens=0,
                )
            if blocks is None:
                is_stopped = True
                break
            manager.record_prefix_cache_stats(request, num_hit)
            waiting.pop_request()
            scheduler.deferred_waiting.discard(request)
            running.append(request)
            if scheduler.log_stats:
                request.record_event(EngineCoreEventType.SCHEDULED, timestamp)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = num_hit
            admitted.append(
                NewRequestData(
                    req_id=request.request_id,
                    prompt_token_ids=request.prompt_token_ids,
                    mm_features=request.mm_features,
                    sampling_params=request.sampling_params,
                    pooling_params=None,
                    block_ids=(blocks,),
                    num_computed_tokens=num_hit,
                    lora_request=None,
                    prefill_token_ids=request._all_token_ids if prompt_too else None,
                    replay_start=request.replay_start,
                )
            )
            scheduled[request.request_id] = num_new
            budget -= num_new
            self._after_schedule(request, num_new)
        self.num_admitted += len(admitted)
        must_go_on = bool(waiting) and budget > 0 and len(running) < room and not is_stopped
        return admitted, must_go_on

    def _after_schedule(self, request: Any, num_new: int) -> None:
        """What stock does to a scheduled request when the step is made up."""
        scheduler = self.scheduler
        request.num_computed_tokens += num_new
        request.num_in_flight_tokens += num_new
        request.is_prefill_chunk = False
        if self._is_async:
            request.num_output_placeholders += 1
            request.spec_token_ids = scheduler._spec_token_placeholders
            if scheduler.use_v2_model_runner:
                # The step's number is raised when its output is made.
                request.next_decode_eligible_step = scheduler.current_step + 1 + scheduler.decode_stagger


def _is_plain(request: Any) -> bool:
    return (
        request.status == RequestStatus.WAITING
        and request.structured_output_request is None
        and not request.num_stale_output_tokens
        and not request.num_computed_tokens
        and not request.num_preemptions
        and request.lora_request is None
        and not request.mm_features
        and request.pooling_params is None
        and request.prompt_embeds is None
        and request.prompt_is_token_ids is None
        and not request.resumable
        and len(request._all_token_ids) == request.num_prompt_tokens
    )
