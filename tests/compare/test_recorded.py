"""One side against an arm of an earlier run, on a simulated clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.models.simulated_twins import EngineTarget, Machine, SimulatedEngine, compare_twins
from tests.models.virtual_time import run_virtual
from twinjet.compare import analysis, workload
from twinjet.compare.driver import Driver
from twinjet.compare.recorded import RecordedSide
from twinjet.compare.records import Arm, RunData
from twinjet.compare.statistics import Precision

QUICK = Precision(half_width=0.02, max_blocks=12)
SETTINGS = analysis.Settings(max_cpu=float("inf"))


@pytest.fixture(scope="module")
def past() -> RunData:
    return run_virtual(compare_twins(3, 0.0, precision=QUICK))


async def _against(past: RunData, arm: Arm, slower: float) -> RunData:
    """A new engine on a machine of its own, slower by so much, against an arm of the past."""
    engine = SimulatedEngine("a", Machine(3), slower)
    await engine.start(lambda _: None)
    target = EngineTarget("a", engine)
    running = Driver(
        target,
        target,
        workload.Workload(workload.synthetic(32, 16, 4096, vocab_size=256, seed=3)),
        workload.Load("closed", concurrency=4),
        16,
        QUICK,
        seed=3,
        recorded=RecordedSide.of(past, arm),
    )
    running.data.header = {"recorded": "past", "recorded_drift": analysis.phase_drift(past, SETTINGS)}
    await running.run()
    await engine.stop()
    return running.data


@pytest.mark.parametrize("arm", ["a", "b"])
def test_every_leg_of_b_is_the_records_and_holds_the_same_requests(past: RunData, arm: Arm) -> None:
    data = run_virtual(_against(past, arm, 0.0))
    blocks = data.complete_blocks("main")
    assert blocks == past.complete_blocks("main")[: len(blocks)] and len(blocks) >= QUICK.min_blocks
    for block in blocks:
        legs = [
            [r for r in data.records if r.phase == "main" and (r.block, r.leg) == (block, n)]
            for n in range(4)
        ]
        assert [[r.index for r in leg] for leg in legs[:2]] == [[r.index for r in legs[0]]] * 2
        assert [[r.index for r in leg] for leg in legs[2:]] == [[r.index for r in legs[3]]] * 2
    old = {(r.block, r.index): r.token_times for r in past.records if r.phase == "main" and r.arm == arm}
    mine = [r for r in data.records if r.phase == "main" and r.arm == "b"]
    assert mine and all(old[r.block, r.index] == r.token_times for r in mine)


def test_a_large_difference_from_the_record_is_found_and_none_is_not(past: RunData) -> None:
    assert analysis.judge(run_virtual(_against(past, "b", 1.0)), SETTINGS).outcome == "b_faster"
    assert analysis.judge(run_virtual(_against(past, "b", 0.0)), SETTINGS).outcome == "no_difference"


def test_no_more_is_claimed_than_the_record_drifted_by_itself(past: RunData) -> None:
    data = run_virtual(_against(past, "b", 0.5))
    assert analysis.judge(data, SETTINGS).outcome == "b_faster"
    data.header = {**data.header, "recorded_drift": 0.9}
    verdict = analysis.judge(data, SETTINGS)
    assert (
        verdict.outcome == "no_difference" and verdict.noise_floor is not None and verdict.noise_floor >= 0.9
    )


def test_blocks_that_the_record_lacks_are_not_run(past: RunData) -> None:
    short = RunData(
        past.header, past.records, [leg for leg in past.legs if leg.phase == "self" or leg.block < 7]
    )
    data = run_virtual(_against(short, "a", 0.0))
    assert data.complete_blocks("main") == list(range(7))


def test_a_gap_in_the_record_ends_what_can_be_used(past: RunData) -> None:
    legs = [leg for leg in past.legs if (leg.phase, leg.block, leg.leg) != ("main", 2, 1)]
    assert RecordedSide.of(replace(past, legs=legs), "b").num_blocks("main") == 2
