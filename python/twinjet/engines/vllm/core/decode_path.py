"""The batched decode path: plain decodes of a step are scheduled and updated in native calls.

A running request whose next step is one decode becomes resident in a DecodeBatch; from there on its
counters and new tokens live in native memory. Each step, the batch schedules its rows; stock
schedule() then sees only the rest (prefills, waiting and unusual requests), with budgets reduced by
what the rows took, and the two outputs are merged in running order. The same for the update.
Where nothing but rows runs, plain requests that wait are admitted before stock sees any (Admissions).
A request is evicted from the batch, its Python object written back, before stock code may touch it.

The split is made only where it cannot change a decision: enough free blocks for everything that
runs (so nothing is preempted), and no row behind a request that could use up the token budget.
Where that fails, the whole step is stock's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.utils import remove_all
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from twinjet._core import DecodeBatch

from .admissions import Admissions
from .prefix_hash import RequestHasher

Outputs = dict[int, EngineCoreOutputs]
# Request ids, new block ids, computed and output token counts, by row.
Rows = tuple[list[Any], list[Any], list[Any], list[Any]]


class DecodePath:
    """Belongs to one scheduler, whose attributes it works on as its base class does."""

    def __init__(self, scheduler: Any, hasher: RequestHasher | None) -> None:
        self.scheduler = scheduler
        self.manager = scheduler.kv_cache_manager
        self.resends_tokens = not scheduler.use_v2_model_runner
        self.batch = DecodeBatch(
            self.manager.manager,
            max_model_len=scheduler.max_model_len,
            is_async=scheduler.scheduler_config.async_scheduling,
            resends_tokens=self.resends_tokens,
            native_hasher=hasher,
            statuses=(RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED),
            output_type=EngineCoreOutput,
        )
        self.admissions = Admissions(scheduler)
        # Rows that stock schedule() is not to see just now.
        self.num_hidden = 0
        self.token_budget = min(
            scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.max_num_batched_tokens
        )
        # Stock reads one of its budgets from the configuration: it gets a copy while rows are hidden.
        self._reduced_config = copy.copy(scheduler.scheduler_config)
        self._has_put_off = False
        # Version of the batch's row set that prev_step_scheduled_req_ids holds; -1: another set.
        self._recorded_version = -1
        self._steps = {"native_steps": 0, "split_steps": 0, "stock_steps": 0}
        self._updates = {"native_updates": 0, "split_updates": 0, "stock_updates": 0}

    def counters(self) -> dict[str, int]:
        """Steps and updates by who made them, and rows served natively."""
        admitted = {"requests_admitted": self.admissions.num_admitted}
        return {**self._steps, **self._updates, **self.batch.counters(), **admitted}

    def evict(self, request_ids: Iterable[str] | None) -> None:
        """Bring these requests' Python objects up to date and stop serving them; None: all."""
        if request_ids is None:
            self.batch.evict_all()
            return
        requests = self.scheduler.requests
        for request_id in request_ids:
            request = requests.get(request_id)
            if request is not None:
                self.batch.evict(request)

    # Scheduling.

    def schedule(self, stock: Callable[[bool], SchedulerOutput], throttle_prefills: bool) -> SchedulerOutput:
        scheduler = self.scheduler
        plan = None
        may_admit = self._may_admit()
        if not throttle_prefills and scheduler._pause_state is not PauseState.PAUSED_ALL:
            plan = self.batch.schedule(
                scheduler.running,
                self.manager.sequences,
                scheduler.prev_step_scheduled_req_ids,
                self.token_budget,
                scheduler.current_step + 1,
                # vLLM admits a request only while its adapter is among those of the step or there is room for one.
                shows_adapters=may_admit and scheduler.lora_config is not None,
            )
        if plan is None:
            self.batch.evict_all()
            self._recorded_version = -1
            self._steps["stock_steps"] += 1
            return stock(throttle_prefills)
        remainder, scheduled, rows = plan
        new: list[NewRequestData] = []
        if not remainder and may_admit and self.admissions.are_plain():
            new, may_admit = self.admissions.admit(scheduled)
        if not remainder and not may_admit:
            self._steps["native_steps"] += 1
            return self._make_output(scheduled, rows, new)
        self._steps["split_steps"] += 1
        output = self._schedule_rest(stock, remainder or [], scheduled, rows)
        output.scheduled_new_reqs[:0] = new
        return output

    def _may_admit(self) -> bool:
        """Whether stock schedule() could do anything about requests that wait."""
        scheduler = self.scheduler
        if scheduler._pause_state is not PauseState.UNPAUSED or scheduler.kv_holding_waiting:
            return True
        num_held = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        return bool(scheduler.waiting) and num_held < scheduler.max_num_active_reqs

    def _make_output(
        self, scheduled: dict[str, int], rows: Rows, new: list[NewRequestData]
    ) -> SchedulerOutput:
        """The whole step, for one that schedules nothing but rows and what was admitted."""
        scheduler = self.scheduler
        scheduler.current_step += 1
        scheduler.prefill_capacity_bound = len(scheduler.waiting) > len(scheduler.deferred_waiting)
        request_ids, new_block_ids, num_computed_tokens, num_output_tokens = rows
        output = SchedulerOutput(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=CachedRequestData(
                req_ids=request_ids,
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=new_block_ids,
                num_computed_tokens=num_computed_tokens,
                num_output_tokens=num_output_tokens,
            ),
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()) if new else len(scheduled),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            finished_req_ids=scheduler.finished_req_ids,
            free_encoder_mm_hashes=scheduler.encoder_cache_manager.get_freed_mm_hashes(),
            preempted_req_ids=scheduler.reset_preempted_req_ids,
            ec_manager_metadata=scheduler.encoder_cache_manager.get_manager_metadata(),
        )
        scheduler.finished_req_ids = set()
        scheduler.reset_preempted_req_ids = set()
        if self.resends_tokens and (new or self._recorded_version != self.batch.template_version):
            scheduler.prev_step_scheduled_req_ids.clear()
            scheduler.prev_step_scheduled_req_ids.update(scheduled)
            self._recorded_version = -1 if new else self.batch.template_version
        return output

    def _schedule_rest(
        self,
        stock: Callable[[bool], SchedulerOutput],
        remainder: list[Any],
        scheduled: dict[str, int],
        rows: Rows,
    ) -> SchedulerOutput:
        """Let stock schedule what the rows leave over, and put both together."""
        scheduler = self.scheduler
        running = scheduler.running
        num_remaining = len(remainder)
        output = self._call_stock(stock, remainder, num_tokens=sum(scheduled.values()))
        if len(remainder) < num_remaining:
            raise RuntimeError("stock preempted a request although there was room for all")
        cached = output.scheduled_cached_reqs
        others: Rows = (
            cached.req_ids,
            cached.new_block_ids,
            cached.num_computed_tokens,
            cached.num_output_tokens,
        )
        if num_remaining == 0:
            scheduled.update(output.num_scheduled_tokens)
            for mine, more in zip(rows, others, strict=True):
                mine.extend(more)
        else:
            scheduled, rows = self.batch.merge(running, scheduled, rows, output.num_scheduled_tokens, others)
        running.extend(remainder[num_remaining:])
        output.num_scheduled_tokens = scheduled
        output.total_num_scheduled_tokens = sum(scheduled.values())
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, cached.num_output_tokens = rows
        if self.resends_tokens:
            scheduler.prev_step_scheduled_req_ids.update(scheduled)
            self._recorded_version = -1
        return output

    def _call_stock(
        self, stock: Callable[[bool], SchedulerOutput], remainder: list[Any], num_tokens: int
    ) -> SchedulerOutput:
        """stock schedule() as if all else that runs, and its tokens of this step, were not there."""
        scheduler = self.scheduler
        running, config = scheduler.running, scheduler.scheduler_config
        num_hidden = len(running) - len(remainder)
        self._reduced_config.__dict__["max_num_batched_tokens"] = config.max_num_batched_tokens - num_tokens
        scheduler.running = remainder
        scheduler.scheduler_config = self._reduced_config
        scheduler.max_num_scheduled_tokens -= num_tokens
        scheduler.max_num_running_reqs -= num_hidden
        scheduler.max_num_active_reqs -= num_hidden
        self.num_hidden = num_hidden
        self.manager.has_hidden_requests = num_hidden > 0
        try:
            return stock(False)
        finally:
            scheduler.running = running
            scheduler.scheduler_config = config
            scheduler.max_num_scheduled_tokens += num_tokens
            scheduler.max_num_running_reqs += num_hidden
            scheduler.max_num_active_reqs += num_hidden
            self.num_hidden = 0
            self.manager.has_hidden_requests = False

    # Updating.

    def update(
        self,
        stock: Callable[[SchedulerOutput, ModelRunnerOutput], Outputs],
        scheduler_output: SchedulerOutput,
        model_output: ModelRunnerOutput,
    ) -> Outputs:
        scheduler = self.scheduler
        if self.batch.num_rows == 0 or self._is_unusual(model_output):
            self.batch.evict_all()
            self._updates["stock_updates"] += 1
            return stock(scheduler_output, model_output)
        for scored in (model_output.prompt_logprobs_dict, model_output.prompt_token_id_logprobs_dict):
            if scored:
                self.evict(scored)
        scheduled = scheduler_output.num_scheduled_tokens
        outputs, firsts, stopped, rest, holes = self.batch.update(
            scheduled,
            model_output.req_id_to_index,
            model_output.sampled_token_ids,
            model_output.logprobs,
            scheduler.requests,
        )
        for request, output in firsts:
            stats = request.take_prefill_stats()
            if stats is not None:
                stats.finalize(self.manager.estimate_cached_tokens(request))
            output.prefill_stats = stats
            output.events = request.take_events()
        if not rest:
            if stopped:
                self._finish(stopped)
            self._updates["native_updates"] += 1
            return self._close_update(outputs, model_output)

        self._updates["split_updates"] += 1
        if stopped:
            # Blocks go back in row order, whoever's rows they are: it is their order of eviction.
            self.manager.put_off_frees()
            self._has_put_off = True
            self._put_off_order = scheduled
            self._finish(stopped)
        reduced = copy.copy(scheduler_output)
        reduced.num_scheduled_tokens = rest
        result = stock(reduced, model_output)
        self.free_put_off()
        return _merge_outputs(scheduled, outputs, holes, result)

    def _is_unusual(self, model_output: ModelRunnerOutput) -> bool:
        scheduler = self.scheduler
        return (
            model_output.pooler_output is not None
            # The V1 runner passes an empty dict where nothing was counted.
            or bool(model_output.num_nans_in_logits)
            or model_output.kv_connector_output is not None
            or model_output.ec_connector_output is not None
            or type(model_output.sampled_token_ids) is not list
            or bool(scheduler.grammar_compile_error_reqs)
            or bool(scheduler.encoder_cache_mismatch_reqs)
        )

    def _finish(self, stopped: list[tuple[int, Any, EngineCoreOutput]]) -> None:
        """What vLLM does for a request that stopped. Its row is gone, its object written back."""
        scheduler = self.scheduler
        finished = set()
        for _, request, output in stopped:
            output.finish_reason = request.get_finished_reason()
            output.stop_reason = request.stop_reason
            if request.resumable or request.mm_features:
                if scheduler._handle_stopped_request(request):
                    output.kv_transfer_params, output.ec_transfer_params = scheduler._free_request(request)
            else:
                self._free_plain(request)
            finished.add(request)
        scheduler.running = remove_all(scheduler.running, finished)

    def _free_plain(self, request: Any) -> None:
        """_free_request() without connectors and encoder, of which this path has none."""
        scheduler = self.scheduler
        request_id = request.request_id
        scheduler._inflight_prefills.discard(request)
        scheduler.finished_req_ids.add(request_id)
        if scheduler.finished_req_ids_dict is not None:
            scheduler.finished_req_ids_dict[request.client_index].add(request_id)
        self.manager.free(request)
        del scheduler.requests[request_id]

    def free_put_off(self) -> None:
        if self._has_put_off:
            self._has_put_off = False
            self.manager.free_put_off(self._put_off_order)

    def _close_update(self, outputs: dict[int, list[Any]], model_output: ModelRunnerOutput) -> Outputs:
        """The end of an update without stock: finished ids and statistics."""
        scheduler = self.scheduler
        result = {client: EngineCoreOutputs(outputs=made) for client, made in outputs.items()}
        finished_by_client = scheduler.finished_req_ids_dict
        if finished_by_client:
            for client, finished in finished_by_client.items():
                if client in result:
                    result[client].finished_requests = finished
                else:
                    result[client] = EngineCoreOutputs(finished_requests=finished)
            finished_by_client.clear()
        stats = scheduler.make_stats(cudagraph_stats=model_output.cudagraph_stats)
        if stats is not None:
            if not result:
                result[0] = EngineCoreOutputs()
            next(iter(result.values())).scheduler_stats = stats
        return result


def _merge_outputs(
    scheduled: Iterable[str],
    native: dict[int, list[Any]],
    holes: list[tuple[int, int, str]],
    stock: Outputs,
) -> Outputs:
    """Put stock's outputs at the places that `native` keeps for them, by client."""
    stats = None
    made: dict[str, EngineCoreOutput] = {}
    for outputs in stock.values():
        stats = outputs.scheduler_stats or stats
        outputs.scheduler_stats = None
        made.update((output.request_id, output) for output in outputs.outputs)
    result: Outputs = {}
    for client, index, request_id in reversed(holes):
        output = made.pop(request_id, None)
        if output is None:
            del native[client][index]
        else:
            native[client][index] = output
    for client, rows in native.items():
        if rows:
            result[client] = EngineCoreOutputs(outputs=rows)
    first = _first_client(scheduled, result)
    for client, outputs in stock.items():
        # Requests that had no row in this step, such as those that an error ended.
        extra = [output for output in outputs.outputs if output.request_id in made]
        if not extra and outputs.finished_requests is None:
            continue
        target = result.setdefault(client, EngineCoreOutputs())
        target.outputs.extend(extra)
        target.finished_requests = outputs.finished_requests
    if stats is not None:
        if not result:
            result[0] = EngineCoreOutputs()
        target = result[first] if first is not None else next(iter(result.values()))
        target.scheduler_stats = stats
    return result


def _first_client(scheduled: Iterable[str], result: Outputs) -> int | None:
    """The client whose output comes first in the step: vLLM sends the statistics there."""
    if len(result) < 2:
        return next(iter(result), None)
    firsts = {outputs.outputs[0].request_id: client for client, outputs in result.items()}
    return next(firsts[row] for row in scheduled if row in firsts)
