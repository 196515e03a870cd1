"""Runs one random workload on stock and native schedulers in lockstep and compares all they say."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from scheduler_harness import Engine, Prompt, Setup, make_engines
from vllm.v1.core.sched.interface import PauseState


@dataclasses.dataclass
class Workload:
    """How requests come and go."""

    num_requests: int = 60
    arrival_rate: float = 0.6
    prompt_lengths: tuple[int, int] = (1, 90)
    max_tokens: tuple[int, int] = (1, 60)
    num_prefixes: int = 4
    plain_only: bool = False
    # Share of requests that never become resident, when not plain_only.
    unusual_rate: float = 0.05
    abort_rate: float = 0.02
    reset_rate: float = 0.004
    pause_rate: float = 0.004
    max_steps: int = 3000


def random_prompt(rng: random.Random, index: int, workload: Workload, setup: Setup) -> Prompt:
    prefix = rng.randrange(workload.num_prefixes)
    length = rng.randint(*workload.prompt_lengths)
    shared = rng.randint(0, length)
    source = random.Random(prefix)
    tokens = [source.randrange(3, 999) for _ in range(shared)]
    tokens += [rng.randrange(3, 999) for _ in range(length - shared)]
    options: dict[str, Any] = {}
    if not workload.plain_only:
        if rng.random() < 0.2:
            options["stop_token_ids"] = tuple(rng.sample(range(40), 3))
        options["ignore_eos"] = rng.random() < 0.7
        if rng.random() < 0.15:
            options["logprobs"] = 1
        if rng.random() < workload.unusual_rate:
            options["repetition"] = True
        if rng.random() < 0.1:
            options["cache_salt"] = rng.choice(["a", "b"])
        if rng.random() < 0.05:
            options["skip_reading_prefix_cache"] = True
        if rng.random() < 0.1:
            options["trace"] = True
        if setup.max_loras and rng.random() < 0.7:
            options["adapter"] = rng.randint(1, setup.max_loras + 2)
        options["priority"] = rng.randrange(3) if setup.policy == "priority" else 0
    max_tokens = rng.randint(*workload.max_tokens)
    if "min_tokens" not in options and rng.random() < 0.1:
        options["min_tokens"] = rng.randint(0, max_tokens)
    # What stands before '#' chooses the tokens drawn: some requests go on alike.
    return Prompt(
        request_id=f"{rng.randrange(workload.num_prefixes * 4)}#{index}",
        tokens=tuple(tokens),
        max_tokens=max_tokens,
        client=rng.randrange(setup.num_clients),
        **options,
    )


def describe_output(output: Any) -> Any:
    """A SchedulerOutput without block ids, which are compared by how they are shared."""
    if output is None:
        return None
    cached = output.scheduled_cached_reqs
    fields = {
        field.name: getattr(output, field.name)
        for field in dataclasses.fields(output)
        if field.name not in ("scheduled_new_reqs", "scheduled_cached_reqs", "ec_manager_metadata")
    }
    fields["num_scheduled_tokens"] = list(output.num_scheduled_tokens.items())
    fields["new"] = [
        (
            new.req_id,
            new.prompt_token_ids,
            new.num_computed_tokens,
            len(new.block_ids[0]),
            new.prefill_token_ids,
            new.lora_request and new.lora_request.lora_int_id,
        )
        for new in output.scheduled_new_reqs
    ]
    fields["cached"] = [
        cached.req_ids,
        cached.resumed_req_ids,
        cached.new_token_ids,
        cached.all_token_ids,
        [None if blocks is None else len(blocks[0]) for blocks in cached.new_block_ids],
        cached.num_computed_tokens,
        cached.num_output_tokens,
    ]
    return fields


def block_ids(output: Any) -> list[Any]:
    if output is None:
        return []
    return [new.block_ids for new in output.scheduled_new_reqs] + output.scheduled_cached_reqs.new_block_ids


def describe_result(result: Any) -> Any:
    """EngineCoreOutputs by client, without times."""
    if result is None:
        return None
    described = {}
    for client, outputs in result.items():
        rows = []
        for row in outputs.outputs:
            fields = {name: getattr(row, name) for name in row.__struct_fields__}
            fields["events"] = row.events and [event.type for event in row.events]
            fields["prefill_stats"] = row.prefill_stats and vars(row.prefill_stats)
            fields["new_logprobs"] = row.new_logprobs and [part.tolist() for part in row.new_logprobs[:3]]
            rows.append(fields)
        stats = outputs.scheduler_stats
        described[client] = (
            rows,
            outputs.finished_requests,
            stats and dataclasses.asdict(stats),
        )
    return described


def describe_state(engine: Engine) -> Any:
    scheduler = engine.scheduler
    path = getattr(scheduler, "decode_path", None)
    if path is not None:
        path.batch.write_back()
    requests = {}
    for request_id, request in scheduler.requests.items():
        requests[request_id] = {
            name: value
            for name, value in vars(request).items()
            if name.startswith("num_")
            or name in ("status", "is_prefill_chunk", "spec_token_ids", "stop_reason")
        }
        requests[request_id]["tokens"] = list(request._all_token_ids)
        requests[request_id]["outputs"] = list(request._output_token_ids)
        requests[request_id]["num_hashes"] = len(request.block_hashes)
        requests[request_id]["num_blocks"] = len(scheduler.kv_cache_manager.get_block_ids(request_id)[0])
    return {
        "requests": requests,
        "running": [request.request_id for request in scheduler.running],
        "waiting": [request.request_id for request in scheduler.waiting],
        "free": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "finished": scheduler.finished_req_ids,
        "previous": scheduler.prev_step_scheduled_req_ids,
        "inflight": {request.request_id for request in scheduler._inflight_prefills},
        "bound": scheduler.prefill_capacity_bound,
        "step": scheduler.current_step,
    }


def free_hashes(engine: Engine) -> list[bytes | None]:
    """Hashes of the free blocks in the order of eviction; None for one that is not cached."""
    manager = engine.scheduler.kv_cache_manager
    if hasattr(manager, "manager"):
        native = manager.manager
        return [native.block_hash(block) for block in native.free_order()]
    return [block.block_hash for block in manager.block_pool.free_block_queue.get_all_free_blocks()]


class SameContents:
    """The two hashers differ, but a hash of one must always stand for the same hash of the other."""

    def __init__(self) -> None:
        self._forth: dict[bytes | None, bytes | None] = {None: None}
        self._back: dict[bytes | None, bytes | None] = {None: None}

    def check(self, stock: list[bytes | None], native: list[bytes | None], where: str) -> None:
        assert len(stock) == len(native), where
        for mine, yours in zip(stock, native, strict=True):
            assert self._forth.setdefault(mine, yours) == yours, f"{where}: order of eviction"
            assert self._back.setdefault(yours, mine) == mine, f"{where}: order of eviction"


def check_tables(stock: Engine, native: Engine) -> bool:
    """Blocks must be shared alike: one block of one side stands for one of the other. True if equal."""
    forth: dict[int, int] = {}
    back: dict[int, int] = {}
    same = True
    for request in stock.scheduler.running:
        # Of a preempted request the runner still has a table, but no blocks any more.
        table = stock.runner.tables[request.request_id]
        other = native.runner.tables[request.request_id]
        assert len(table) == len(other)
        same = same and table == other
        for mine, yours in zip(table, other, strict=True):
            assert forth.setdefault(mine, yours) == yours
            assert back.setdefault(yours, mine) == mine
    return same


def difference(one: Any, other: Any, path: str = "") -> str:
    """The first place where two descriptions differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = [(i, mine, yours) for i, (mine, yours) in enumerate(zip(one, other, strict=True))]
    else:
        return f"{path}: stock {one!r}, native {other!r}"
    return next(difference(mine, yours, f"{path}/{key}") for key, mine, yours in pairs if mine != yours)


def waits_for_adapter(engine: Engine) -> bool:
    """Whether a request waits whose adapter none of the running ones has."""
    scheduler = engine.scheduler
    running = {request.lora_request and request.lora_request.lora_int_id for request in scheduler.running}
    return any(
        request.lora_request and request.lora_request.lora_int_id not in running
        for request in scheduler.waiting
    )


def run(setup: Setup, workload: Workload, seed: int) -> dict[str, Any]:
    """Run to the end; returns what was met on the way. Raises AssertionError on the first difference."""
    rng = random.Random(seed)
    stock, native = make_engines(setup)
    met = {"steps": 0, "equal_blocks": 0, "preemptions": 0, "hits": 0, "stops": 0, "waits_for_adapter": 0}
    contents = SameContents()
    index = 0
    resume_at = -1
    # One clock for both, so that arrival order is the same.
    for step in range(workload.max_steps):
        while index < workload.num_requests and rng.random() < workload.arrival_rate:
            prompt = random_prompt(rng, index, workload, setup)
            index += 1
            for engine in (stock, native):
                engine.add(prompt, float(step))
        live = list(stock.scheduler.requests)
        if live and rng.random() < workload.abort_rate:
            chosen = rng.sample(live, min(len(live), rng.randint(1, 3)))
            for engine in (stock, native):
                engine.abort(chosen)
        if rng.random() < workload.reset_rate:
            preempt = rng.random() < 0.5
            results = [engine.scheduler.reset_prefix_cache(preempt) for engine in (stock, native)]
            assert results[0] == results[1]
        if resume_at < 0 and rng.random() < workload.pause_rate:
            state = rng.choice([PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
            resume_at = step + rng.randint(1, 5)
            for engine in (stock, native):
                engine.scheduler.set_pause_state(state)
        if resume_at == step:
            resume_at = -1
            for engine in (stock, native):
                engine.scheduler.set_pause_state(PauseState.UNPAUSED)

        results = [engine.step() for engine in (stock, native)]
        outputs, updates = zip(*results, strict=True)
        where = f"seed {seed}, step {step}"
        for what, one, other in (
            ("output", *map(describe_output, outputs)),
            ("result", *map(describe_result, updates)),
            ("state", describe_state(stock), describe_state(native)),
        ):
            assert one == other, f"{where}: {what}: {difference(one, other)}"
        contents.check(free_hashes(stock), free_hashes(native), where)
        met["equal_blocks"] += check_tables(stock, native)
        met["steps"] += 1
        met["waits_for_adapter"] += waits_for_adapter(stock)
        if outputs[0] is not None:
            met["preemptions"] += len(outputs[0].preempted_req_ids or ())
            met["hits"] += sum(new.num_computed_tokens > 0 for new in outputs[0].scheduled_new_reqs)
        native.scheduler.kv_cache_manager.manager.check()
        if index == workload.num_requests and not stock.scheduler.requests and not stock.queue:
            break
    else:
        raise AssertionError(f"seed {seed}: not done after {workload.max_steps} steps")
    assert native.scheduler.kv_cache_manager.manager.num_sequences == 0
    met.update(native.scheduler.scheduler_status().counters)
    return met
