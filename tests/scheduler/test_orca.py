"""Load reports: their wire form, and that the weights which balancers make of them are what a server deserves."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.orca import OrcaLoadReport, weight
from twinjet.scheduler import DeploymentLoad, OrcaReport, SchedulerLoad, ServedLoad
from twinjet.scheduler.orca import MIN_UTILIZATION

numbers = st.floats(0, 1e9, allow_subnormal=False)


def load(running: int = 0, waiting: int = 0, kv: float | None = None) -> SchedulerLoad:
    return SchedulerLoad(
        waiting=waiting, running=running, waiting_tokens=10 * waiting, prompt_tokens_per_s=0.0,
        output_tokens_per_s=3.0, kv_blocks_total=None if kv is None else 100,
        kv_blocks_used=None if kv is None else int(100 * kv), kv_overflows=0, refused=0, refused_by_reason={},
        expired=0, expected_wait_s=None,
    )  # fmt: skip


def one(running: int = 0, waiting: int = 0, slots: int = 4, kv: float | None = None) -> list[DeploymentLoad]:
    return [DeploymentLoad("m", load(running, waiting, kv), slots)]


def read(served: ServedLoad, readings: list[DeploymentLoad], *, details: bool = False) -> Any:
    return OrcaLoadReport.FromString(served.report(readings, details=details).encode())


@given(numbers, numbers, numbers, st.dictionaries(st.text(max_size=200), numbers, max_size=5))
def test_a_report_is_read_as_it_was_written(
    utilization: float, rps: float, eps: float, named: dict[str, float]
) -> None:
    report = OrcaReport(utilization, rps, eps, {"kv_cache": 0.5}, named)
    message = OrcaLoadReport.FromString(report.encode())
    assert message.application_utilization == utilization
    assert (message.rps_fractional, message.eps) == (rps, eps)
    assert dict(message.utilization) == {"kv_cache": 0.5}
    assert dict(message.named_metrics) == named


def run(
    rates: float,
    running: int,
    seconds: float,
    *,
    fail: float = 0.0,
    waiting: int = 0,
    served: ServedLoad | None = None,
    start: float = 0.0,
) -> ServedLoad:
    """Serve so many requests a second, refuse so many, with so many running all the time."""
    served = served or ServedLoad()
    rng = random.Random(1)
    steps = int(seconds * 10)
    for step in range(steps):
        for rate, failed in ((rates, False), (fail, True)):
            for _ in range(int(rate / 10) + (rng.random() < rate / 10 % 1)):
                served.count(failed=failed)
        served.sample(start + step / 10, one(running, waiting))
    return served


def test_a_server_that_never_worked_has_no_weight_of_its_own() -> None:
    report = read(ServedLoad(), one())
    assert report.application_utilization == MIN_UTILIZATION
    assert weight(report) == 0


def test_weights_follow_what_a_server_can_do() -> None:
    slow, fast = run(10, 3, 20), run(30, 3, 20)
    assert weight(read(fast, one(3))) / weight(read(slow, one(3))) == pytest.approx(3, rel=0.1)
    assert read(fast, one(3)).rps_fractional == pytest.approx(30, rel=0.1)
    assert read(fast, one(3)).application_utilization == pytest.approx(0.75, rel=0.01)


def test_an_idle_server_keeps_the_weight_that_it_has_earned() -> None:
    served = run(10, 3, 20)
    before = weight(read(served, one()))
    for second in range(600):
        served.sample(20.0 + second, one())
    assert weight(read(served, one())) == pytest.approx(before)


def test_refusing_quickly_does_not_make_a_server_look_fast() -> None:
    healthy = run(10, 3, 20)
    for refusing in (
        run(10, 4, 20, fail=500, waiting=8),
        run(0, 0, 20, fail=500),
        run(0, 0, 20, fail=500, served=run(10, 3, 20), start=20.0),
    ):
        assert weight(read(refusing, one(4, 8))) < weight(read(healthy, one(3))) / 20
        assert read(refusing, one(4, 8)).eps == pytest.approx(500, rel=0.1)


def test_a_server_recovers_once_it_serves_again() -> None:
    served = run(0, 0, 10, fail=500)
    run(10, 3, 30, served=served, start=10.0)
    assert weight(read(served, one(3))) == pytest.approx(weight(read(run(10, 3, 30), one(3))), rel=0.1)


def test_a_server_that_slows_down_loses_weight_within_two_seconds() -> None:
    served = run(40, 3, 20)
    before = weight(read(served, one(3)))
    run(10, 4, 2, served=served, start=20.0)
    assert weight(read(served, one(4))) < 0.6 * before


@pytest.mark.parametrize(("rate", "within_s"), [(200, 0.6), (80, 0.7), (40, 1.1)])
def test_the_more_a_server_does_the_sooner_it_is_found_out(rate: int, within_s: float) -> None:
    """Steps four times as long: a quarter of the requests end, and those that come meanwhile pile up."""
    served = run(rate, 16, 20)
    before = weight(read(served, one(16)))
    running = 16.0
    steps = 0
    while weight(read(served, one(int(running)))) > before / 2:
        served = run(rate / 4, int(running), 0.1, served=served, start=20 + steps / 10)
        running += 0.1 * rate * 3 / 4
        steps += 1
    assert steps / 10 <= within_s


@pytest.mark.parametrize("every_s", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("rate", [20, 100, 400])
def test_a_steady_rate_is_told_as_it_is_however_often_it_is_looked_at(rate: int, every_s: float) -> None:
    served = ServedLoad()
    for step in range(int(20 / every_s)):
        for _ in range(round(rate * every_s)):
            served.count(failed=False)
        served.sample(step * every_s, one(3))
    assert read(served, one(3)).rps_fractional == pytest.approx(rate, rel=0.01)


def test_the_fullest_deployment_counts_and_details_tell_them_apart() -> None:
    readings = [
        DeploymentLoad("a", load(1, 0, 0.25), 4),
        DeploymentLoad("b", load(2, 8, 0.75), 4),
        DeploymentLoad("down", load(), 0),
    ]
    served = ServedLoad()
    served.sample(0.0, readings)
    served.sample(100.0, readings)
    report = read(served, readings, details=True)
    assert report.application_utilization == pytest.approx(0.75 + 2)
    named = dict(report.named_metrics)
    assert (named["waiting"], named["running"], named["kv_cache_utilization"]) == (8, 3, 0.75)
    assert (named["a.kv_cache_utilization"], named["b.waiting"], named["down.serving"]) == (0.25, 8, 0)
    assert not any("." in name for name in read(served, readings).named_metrics)
    assert len(served.report(readings, details=False).encode()) < 400
