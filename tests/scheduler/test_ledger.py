"""The KV ledger and the output-length estimate behind it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.length_model import Floats, horizon
from tests.scheduler.helpers import make_info, make_request
from twinjet._core import LengthEstimator
from twinjet.errors import InvalidRequest
from twinjet.request import EngineRequest
from twinjet.scheduler import SchedulerSettings
from twinjet.scheduler.core import Scheduler
from twinjet.scheduler.entry import Entry
from twinjet.scheduler.ledger import KvLedger


def make_ledger(num_blocks: int = 64, *, sigmas: float | None = None, shares: bool = True) -> KvLedger:
    return KvLedger(
        num_blocks,
        16,
        prefix_cache=shares,
        headroom=0.0,
        lookahead_tokens=0,
        sigmas=sigmas,
        longest=4096,
    )


LENGTHS = LengthEstimator(64)


def admit(ledger: KvLedger, request: EngineRequest, hashes: bytes, lengths: LengthEstimator) -> int | None:
    sampling = request.sampling
    return ledger.hold(
        hashes, len(request.prompt_token_ids), sampling.n, sampling.max_tokens, sampling.ignore_eos, lengths
    )


def survival_at(lengths: LengthEstimator, start: float, times: Floats) -> Floats:
    return np.array([lengths.survival(start, ahead) for ahead in times])


def test_a_prefix_that_runs_counts_once_as_soon_as_it_is_computed() -> None:
    ledger = make_ledger()
    shared = tuple(range(160))
    requests = [make_request(f"r{i}", prompt=(*shared, 1000 + i), max_tokens=8) for i in range(3)]
    hashes = [ledger.hash(r) for r in requests]
    first = admit(ledger, requests[0], hashes[0], LENGTHS)
    assert first is not None
    assert ledger.num_used_blocks == 11
    early = admit(ledger, requests[1], hashes[1], LENGTHS)
    assert early is not None
    assert ledger.num_used_blocks == 22  # not computed yet, so the engine may not share it
    ledger.publish(first)
    late = admit(ledger, requests[2], hashes[2], LENGTHS)
    assert late is not None
    assert ledger.num_cached_tokens(late) == 160
    assert ledger.num_used_blocks == 23
    for holding in (first, early, late):
        ledger.release(holding)
    assert ledger.num_used_blocks == 0
    assert ledger.find_cached(hashes[0], 161) == 160
    ledger.check()


def test_salts_and_adapters_keep_prefixes_apart() -> None:
    ledger = make_ledger()
    prompt = tuple(range(64))
    plain = make_request("a", prompt=prompt)
    salted = make_request("b", prompt=prompt, cache_salt="s")
    holding = admit(ledger, plain, ledger.hash(plain), LENGTHS)
    assert holding is not None
    ledger.publish(holding)
    assert ledger.find_cached(ledger.hash(plain), 64) == 48
    assert ledger.find_cached(ledger.hash(salted), 64) == 0


def test_outputs_of_one_request_share_its_prompt() -> None:
    ledger = make_ledger()
    request = make_request("a", prompt=40, max_tokens=8, n=4)
    holding = admit(ledger, request, ledger.hash(request), LENGTHS)
    assert holding is not None
    assert ledger.num_used_blocks == 2 + 4
    for index in range(4):
        ledger.append(holding, index, 8)
    assert ledger.num_used_blocks == 2 + 4
    for index in range(4):
        ledger.append(holding, index, 1)
    assert ledger.num_used_blocks == 2 + 8
    ledger.release(holding)
    assert ledger.num_used_blocks == 0
    ledger.check()


def test_tokens_without_room_are_counted_and_stop_admission() -> None:
    ledger = make_ledger(8, sigmas=0.0)
    request = make_request("a", prompt=16 * 8, max_tokens=64)
    holding = admit(ledger, request, ledger.hash(request), LENGTHS)
    assert holding is not None
    ledger.append(holding, 0, 20)
    assert ledger.num_overflows == 20
    assert ledger.num_used_blocks == 10
    other = make_request("b", prompt=1)
    assert admit(ledger, other, ledger.hash(other), LENGTHS) is None
    ledger.release(holding)
    assert ledger.num_used_blocks == 0
    assert admit(ledger, other, ledger.hash(other), LENGTHS) is not None


def test_a_prompt_larger_than_the_cache_is_the_clients_mistake() -> None:
    core = Scheduler(SchedulerSettings())
    core.attach(make_info(num_blocks=4))
    with pytest.raises(InvalidRequest):
        core.offer(make_request("a", prompt=65), 0.0)
    core.offer(make_request("b", prompt=63), 0.0)
    assert core.take(0.0) is not None


def run_load(seed: int, *, sharing: bool, **values: object) -> tuple[int, int, int]:
    """Serve 150 random requests one token a step; overflows, greatest use, and steps with a free ride."""
    rng = random.Random(seed)
    core = Scheduler(SchedulerSettings.model_validate(values))
    core.attach(make_info(max_num_seqs=32, num_blocks=200, prefix_cache=sharing))
    running: list[tuple[Entry, int]] = []
    prefixes = [tuple(range(1000 * i, 1000 * i + rng.randint(16, 200))) for i in range(3)]
    number, now, most, idle = 0, 0.0, 0, 0
    while number < 150 or not core.is_idle:
        assert now < 2000, "requests wait for ever"
        if number < 150 and rng.random() < 0.5:
            own = tuple(rng.randrange(10**6) for _ in range(rng.randint(1, 80)))
            request = make_request(
                f"r{number}", prompt=rng.choice(prefixes) + own, max_tokens=rng.randint(1, 200),
                n=rng.choice((1, 1, 1, 3)), tenant=rng.choice("ab"),
            )  # fmt: skip
            number += 1
            core.offer(request, now)
        while (entry := core.take(now)) is not None:
            length = min(1 + int(rng.expovariate(1 / 60)), entry.request.sampling.max_tokens)
            running.append((entry, length))
        load = core.load(now)
        idle += not running and load.waiting > 0
        most = max(most, load.kv_blocks_used or 0)
        for entry, length in list(running):
            if rng.random() < 0.9:
                if not entry.num_output_tokens:
                    core.prompt_done(entry)
                for index in range(entry.num_sequences):
                    core.add_tokens(entry, index, (rng.randrange(1000),), now)
            if entry.num_output_tokens >= length * entry.num_sequences or rng.random() < 0.002:
                running.remove((entry, length))
                core.release(entry, now, finished=entry.num_output_tokens >= length)
        now += 0.02
    load = core.load(now)
    assert load.kv_blocks_used == 0
    assert load.waiting == 0
    assert core._ledger is not None
    core._ledger.check()
    return load.kv_overflows, most, idle


@given(seed=st.integers(0, 2**32), sharing=st.booleans())
@settings(max_examples=8)
def test_the_greatest_reserve_never_overflows_and_never_idles(seed: int, sharing: bool) -> None:
    overflows, most, idle = run_load(seed, sharing=sharing, output_reserve="max")
    assert overflows == 0
    assert most <= 200
    assert idle == 0


def test_the_estimated_reserve_runs_fuller_and_rarely_overflows() -> None:
    tight = [run_load(seed, sharing=True, output_reserve="max") for seed in range(2)]
    learnt = [run_load(seed, sharing=True) for seed in range(2)]
    assert sum(most for _, most, _ in learnt) >= sum(most for _, most, _ in tight)
    assert sum(overflows for overflows, _, _ in learnt) <= 40  # of some 15,000 tokens
    assert all(idle == 0 for _, _, idle in learnt)


def test_lengths_are_learnt_from_whole_and_from_cut_outputs() -> None:
    rng = random.Random(3)
    estimator = LengthEstimator(1000.0)
    for _ in range(4000):
        length, limit = int(rng.expovariate(1 / 200)), rng.randint(20, 2000)
        estimator.observe(min(length, limit), length < limit)
    assert estimator.mean(100_000) == pytest.approx(200, rel=0.15)
    assert estimator.mean(100) == pytest.approx(200 * (1 - np.exp(-0.5)), rel=0.1)
    times = np.array([0.0, 100.0, 200.0, 400.0])
    for start in (0, 150):  # an exponential does not age
        assert survival_at(estimator, start, times) == pytest.approx(np.exp(-times / 200), abs=0.06)


def test_the_estimate_follows_a_change_of_load() -> None:
    estimator = LengthEstimator(256.0)
    for _ in range(2000):
        estimator.observe(500, True)
    assert estimator.mean(10_000) == pytest.approx(500, rel=0.15)
    for _ in range(6000):
        estimator.observe(50, True)
    assert estimator.mean(10_000) < 75


@given(lengths=st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=200))
@settings(max_examples=50)
def test_survival_is_a_survival_function(lengths: list[tuple[int, bool]]) -> None:
    estimator = LengthEstimator(256.0)
    for length, complete in lengths:
        estimator.observe(length, complete)
    for start in (0, 7, 900, 100_000):
        survival = survival_at(estimator, start, horizon(131072))
        assert survival[0] == 1.0
        assert np.all(np.diff(survival) <= 1e-12)
        assert np.all(survival >= 0.0)
    means = [estimator.mean(limit) for limit in (1, 10, 100, 1000, 10_000)]
    assert means == sorted(means)
    assert all(mean <= limit for mean, limit in zip(means, (1, 10, 100, 1000, 10_000), strict=True))


def test_predictions_stop_once_there_has_long_been_room_for_the_worst_case() -> None:
    ledger = make_ledger(64, sigmas=1.0)
    lengths = LengthEstimator(4)
    first = admit(ledger, make_request("a", prompt=16, max_tokens=900), b"\0" * 16, lengths)
    second = admit(ledger, make_request("b", prompt=16, max_tokens=900), b"\1" * 16, lengths)
    assert first is not None
    assert second is not None
    assert ledger.is_predicting
    ledger.release(second)
    for i in range(1000):
        assert ledger.is_predicting
        other = admit(ledger, make_request(f"r{i}", prompt=16, max_tokens=16), b"\2" * 16, lengths)
        assert other is not None
        ledger.release(other)
    assert not ledger.is_predicting
    ledger.check()
