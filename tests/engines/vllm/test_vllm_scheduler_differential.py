"""Whole scheduler outputs, results and states, stock and native in lockstep (see differential.py)."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the vllm extra is not installed")

from differential import Workload, run
from scheduler_harness import Setup

# Small pools make requests wait, be preempted and lose cached blocks; the large one lets them run.
POOLS = (30, 64, 200)


def random_case(seed: int) -> tuple[Setup, Workload]:
    rng = random.Random(seed)
    setup = Setup(
        is_async=seed % 2 == 1,
        num_blocks=rng.choice(POOLS),
        block_size=rng.choice((8, 16, 16)),
        policy=rng.choice(("fcfs", "fcfs", "priority")),
        num_clients=rng.choice((1, 3)),
        watermark=rng.choice((0.0, 0.0, 0.1)),
        max_num_batched_tokens=rng.choice((32, 128, 400)),
        max_num_seqs=rng.choice((4, 16, 32)),
        prefix_caching=rng.random() < 0.85,
        max_model_len=rng.choice((112, 232)),
        long_prefill_token_threshold=rng.choice((0, 0, 20)),
        log_stats=rng.random() < 0.8,
        is_v2=seed % 4 >= 2,
    )
    workload = Workload(
        num_requests=40,
        plain_only=rng.random() < 0.3,
        prompt_lengths=rng.choice(((1, 90), (1, 30), (60, 100))),
        unusual_rate=rng.choice((0.05, 0.4)),
    )
    return setup, workload


@cache
def outcome(seed: int) -> dict[str, Any]:
    return run(*random_case(seed), seed)


@pytest.mark.parametrize("seed", range(12))
def test_native_decides_as_stock(seed: int) -> None:
    met = outcome(seed)

    assert met["native_steps"] + met["split_steps"] > 0
    assert met["rows_updated"] > 0


def test_the_cases_reach_what_they_are_for() -> None:
    """A fuzz that meets no preemption, hit, or eviction of the native path proves little."""
    total: Counter[str] = Counter()
    for seed in range(12):
        total.update(outcome(seed))

    reached = ("preemptions", "hits", "native_steps", "split_steps", "stock_steps", "native_updates")
    for what in (*reached, "requests_admitted"):
        assert total[what] > 20, what
    assert total["rows_adopted"] > 12 * 40 * 0.8


def test_block_ids_are_the_same_where_allocation_order_is() -> None:
    # No prompt is chunked here and nothing is unusual, so rows precede all stock work in the step.
    setup = Setup(num_blocks=120, max_num_batched_tokens=400, max_num_seqs=32)
    met = run(setup, Workload(num_requests=40, plain_only=True, prompt_lengths=(1, 30)), seed=5)

    assert met["equal_blocks"] == met["steps"]
    assert met["native_steps"] > 10


@pytest.mark.parametrize("seed", range(6))
def test_adapters_are_counted_as_stock_counts_them(seed: int) -> None:
    """Four adapters want the room of two: who waits for it depends on the adapters of resident rows."""
    setup = Setup(
        is_async=seed % 2 == 1, num_blocks=200, max_num_batched_tokens=400, max_num_seqs=32, max_loras=2
    )
    workload = Workload(num_requests=40, arrival_rate=2.0, prompt_lengths=(1, 30), max_tokens=(5, 60))
    met = run(setup, workload, seed)

    assert met["waits_for_adapter"] > 20
    assert met["rows_updated"] > 300
    assert met["native_steps"] + met["split_steps"] > met["stock_steps"]


@pytest.mark.parametrize(("is_async", "is_v2"), [(False, False), (True, False), (True, True)])
def test_streams_of_one_token_need_nothing_of_vllms_schedule(is_async: bool, is_v2: bool) -> None:
    """No row is due in their steps: what runs only waits for its token, and all work is what comes."""
    setup = Setup(is_async=is_async, is_v2=is_v2, num_blocks=200, max_num_batched_tokens=400, max_num_seqs=32)
    workload = Workload(
        num_requests=60, arrival_rate=6.0, plain_only=True, prompt_lengths=(1, 12), max_tokens=(1, 1),
        abort_rate=0.0, reset_rate=0.0, pause_rate=0.0,
    )  # fmt: skip
    met = run(setup, workload, seed=4)

    assert met["stock_steps"] + met["split_steps"] == 0
    assert met["requests_admitted"] == 60
    assert (met["native_updates"] > 0) == is_async


@pytest.mark.parametrize("is_async", [False, True])
def test_manager_alone_decides_as_stock(is_async: bool) -> None:
    setup = Setup(is_async=is_async, num_blocks=40, native="manager", policy="priority")
    met = run(setup, Workload(num_requests=40), seed=3)

    assert met["preemptions"] > 0
    assert met["equal_blocks"] == met["steps"]
    assert "native_steps" not in met


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1200, 20))
def test_native_decides_as_stock_at_length(first: int) -> None:
    for seed in range(first, first + 20):
        setup, workload = random_case(seed)
        workload.num_requests = 60
        met = run(setup, workload, seed)
        assert met["rows_updated"] > 0
