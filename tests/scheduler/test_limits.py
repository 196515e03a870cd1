"""Refusals: predicted deadlines, retry delays, quotas, and the meters behind them; load reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduler.helpers import make_info, make_request
from twinjet.errors import DeadlinePassed, DeadlineUnreachable, InvalidRequest, Overloaded, QuotaExcess
from twinjet.scheduler import SchedulerSettings
from twinjet.scheduler.core import Scheduler
from twinjet.scheduler.meters import BackloggedRate, ForgetfulMean, WindowRate
from twinjet.scheduler.quota import RetryPacer, TokenBucket


def start(slots: int = 1, **values: object) -> Scheduler:
    core = Scheduler(SchedulerSettings.model_validate(values))
    core.attach(make_info(max_num_seqs=slots))
    return core


def serve(core: Scheduler, seconds: int, *, per_request_s: float = 1.0, tokens: int = 10) -> float:
    """Keep a queue and one running request that takes per_request_s; returns the time after."""
    now = 0.0
    for i in range(int(seconds / per_request_s)):
        core.offer(make_request(f"s{i}a", max_tokens=tokens, ignore_eos=True), now)
        if i == 0:
            core.offer(make_request("s-first", max_tokens=tokens, ignore_eos=True), now)
        entry = core.take(now)
        assert entry is not None
        for _ in range(tokens):
            now += per_request_s / tokens
            core.add_tokens(entry, 0, (1,), now)
        core.release(entry, now, finished=True)
    return now


def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once() -> None:
    core = start()
    now = serve(core, 20)
    for i in range(9):
        core.offer(make_request(f"q{i}", max_tokens=10, ignore_eos=True), now)
    assert core.take(now) is not None
    wait = core.load(now).expected_wait_s
    assert wait == pytest.approx(10, rel=0.2)
    with pytest.raises(DeadlineUnreachable, match="predicted"):
        core.offer(make_request("soon", deadline=now + 5, max_tokens=10, ignore_eos=True), now)
    assert core.load(now).waiting == 9
    core.offer(make_request("later", deadline=now + 30, max_tokens=10, ignore_eos=True), now)
    assert core.load(now).waiting == 10
    assert core.load(now).refused == 1


def test_without_measurements_nothing_is_refused_by_prediction() -> None:
    core = start()
    for i in range(50):
        core.offer(make_request(f"q{i}", deadline=0.5), 0.0)
    assert core.load(0.0).waiting == 50


def test_stale_speeds_do_not_refuse_for_ever() -> None:
    core = start()
    now = serve(core, 20, per_request_s=5.0)
    entry = core.take(now)
    assert entry is not None
    core.release(entry, now)
    with pytest.raises(DeadlinePassed):
        core.offer(make_request("soon", deadline=now + 2, max_tokens=10, ignore_eos=True), now)
    now += 60
    core.offer(make_request("again", deadline=now + 2, max_tokens=10, ignore_eos=True), now)


def test_a_deadline_in_the_past_is_refused() -> None:
    with pytest.raises(DeadlinePassed):
        start().offer(make_request("late", deadline=1.0), 2.0)


def test_refusals_are_counted_by_reason() -> None:
    core = start(max_waiting=2, tenants={"small": {"max_streams": 1}})
    core.attach(make_info(max_num_seqs=1, num_blocks=64))
    core.offer(make_request("a", tenant="small"), 0.0)
    core.offer(make_request("b"), 0.0)
    refused = [
        (make_request("late", deadline=-1.0), DeadlinePassed),
        (make_request("large", prompt=2000), InvalidRequest),
        (make_request("second", tenant="small"), Overloaded),
        (make_request("third"), Overloaded),
        (make_request("fourth"), Overloaded),
    ]
    for request, error in refused:
        with pytest.raises(error):
            core.offer(request, 0.0)
    load = core.totals(0.0)
    assert load.refused_by_reason == {"deadline": 1, "quota": 1, "queue_full": 2, "too_large": 1}
    assert load.refused == 5


def test_expired_gives_each_request_once_and_next_deadline_the_first() -> None:
    core = start()
    early = core.offer(make_request("early", deadline=1.0), 0.0)
    core.offer(make_request("late", deadline=3.0), 0.0)
    core.offer(make_request("never"), 0.0)
    assert core.next_deadline() == 1.0
    assert core.expired(0.5) == []
    assert core.expired(1.0) == [early]
    assert core.expired(1.0) == []
    assert core.next_deadline() == 3.0


def test_retry_delays_follow_the_drain_rate() -> None:
    core = start(max_waiting=2)
    now = serve(core, 20, per_request_s=2.0)
    core.offer(make_request("fills", max_tokens=10, ignore_eos=True), now)
    delays = []
    for i in range(3):
        with pytest.raises(Overloaded) as refused:
            core.offer(make_request(f"q{i}", max_tokens=10, ignore_eos=True), now)
        delays.append(refused.value.retry_after_s)
    assert delays[0] == pytest.approx(2.0, rel=0.2)
    assert delays[1] - delays[0] == pytest.approx(delays[0], rel=0.01)
    assert delays[2] - delays[1] == pytest.approx(delays[0], rel=0.01)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_waiting": 18},
        {"max_waiting_tokens": 180},
        {"max_waiting_bytes": 18 * 2408},
        {"default_tenant": {"max_waiting": 18}},
        {"default_tenant": {"max_waiting_tokens": 180}},
        {"default_tenant": {"max_waiting_bytes": 18 * 2408}},
    ],
)
def test_one_address_without_a_tenant_leaves_a_ninth_of_the_queue_to_others(
    limits: dict[str, object],
) -> None:
    core = start(**limits)
    for i in range(16):
        core.offer(make_request(f"flood{i}", prompt=10, client="flooder"), 0.0)
    with pytest.raises(Overloaded, match="from this address") as refused:
        core.offer(make_request("more", prompt=10, client="flooder"), 0.0)
    assert refused.value.retry_after_s is not None
    if "max_waiting" in limits:
        with pytest.raises(Overloaded, match="from this address"):
            core.check_before("more", "", "flooder", 0.0)
        core.check_before("neighbour", "", "neighbour", 0.0)
        core.check_before("named", "acme", "flooder", 0.0)
    core.offer(make_request("neighbour", prompt=10, client="neighbour"), 0.0)
    core.offer(make_request("last", prompt=10, client="third"), 0.0)
    with pytest.raises(Overloaded, match="are allowed"):
        core.offer(make_request("one too many", prompt=10, client="fourth"), 0.0)
    core.release(core.find("flood0"), 0.0)
    core.offer(make_request("named", prompt=10, tenant="acme", client="flooder"), 0.0)
    for entry in core.entries():
        core.release(entry, 0.0)
    for i in range(16):
        core.offer(make_request(f"again{i}", prompt=10, client="flooder"), 0.0)


def test_a_named_tenant_may_fill_the_queue_and_one_large_request_all_of_it() -> None:
    core = start(max_waiting=18, max_waiting_tokens=180)
    for i in range(18):
        core.offer(make_request(f"r{i}", prompt=10, tenant="acme"), 0.0)
    core = start(max_waiting_tokens=180)
    core.offer(make_request("large", prompt=180), 0.0)


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ({"max_waiting": 3}, 3),
        ({"max_waiting_tokens": 25}, 2),
        ({"max_waiting_bytes": 5500}, 2),
        ({"default_tenant": {"max_waiting": 2}}, 2),
        ({"default_tenant": {"max_waiting_tokens": 30}}, 3),
        ({"default_tenant": {"max_waiting_bytes": 2500}}, 1),
    ],
)
def test_every_queue_limit_holds_and_is_freed_again(limits: dict[str, object], fits: int) -> None:
    core = start(**limits)
    entries = [core.offer(make_request(f"r{i}", prompt=10), 0.0) for i in range(fits)]
    with pytest.raises(Overloaded) as refused:
        core.offer(make_request("more", prompt=10), 0.0)
    assert refused.value.retry_after_s > 0
    core.release(entries[0], 0.0)
    core.offer(make_request("more", prompt=10), 0.0)


def test_a_tenants_limit_leaves_others_alone() -> None:
    core = start(default_tenant={"max_waiting": 1})
    core.offer(make_request("a1", tenant="a"), 0.0)
    with pytest.raises(Overloaded):
        core.offer(make_request("a2", tenant="a"), 0.0)
    core.offer(make_request("b1", tenant="b"), 0.0)


def test_a_token_quota_counts_prompt_and_output() -> None:
    core = start(tenants={"t": {"tokens_per_minute": 60}})
    entry = core.offer(make_request("a", tenant="t", prompt=20, max_tokens=40), 0.0)
    assert core.take(0.0) is entry
    core.add_tokens(entry, 0, tuple(range(40)), 0.0)
    core.release(entry, 0.0, finished=True)
    with pytest.raises(Overloaded) as refused:
        core.offer(make_request("b", tenant="t", prompt=10), 0.0)
    assert refused.value.quotas[0].description == "60 tokens a minute"
    assert refused.value.retry_after_s == pytest.approx(10.0)
    core.offer(make_request("c", tenant="t", prompt=10), 10.0)


@pytest.mark.parametrize("is_running", [False, True])
def test_one_address_leaves_a_ninth_of_the_anonymous_tenants_streams_to_others(is_running: bool) -> None:
    core = start(slots=18 if is_running else 1, tenants={"": {"max_streams": 18}})
    for i in range(16):
        core.offer(make_request(f"flood{i}", client="flooder"), 0.0)
        if is_running:
            assert core.take(0.0) is not None
    for check in (
        lambda: core.offer(make_request("too many", client="flooder"), 0.0),
        lambda: core.check_before("too many", "", "flooder", 0.0),
    ):
        with pytest.raises(Overloaded, match="16 of 18 concurrent streams") as refused:
            check()
        assert refused.value.quotas == (QuotaExcess("address:flooder", "18 concurrent streams"),)
        assert refused.value.retry_after_s > 0
    core.check_before("neighbour", "", "neighbour", 0.0)
    core.offer(make_request("neighbour", client="neighbour"), 0.0)
    core.offer(make_request("last", client="third"), 0.0)
    with pytest.raises(Overloaded) as full:
        core.offer(make_request("one too many", client="fourth"), 0.0)
    assert full.value.quotas == (QuotaExcess("tenant:", "18 concurrent streams"),)
    core.offer(make_request("named", tenant="acme", client="flooder"), 0.0)
    assert core.totals(0.0).refused_by_reason["quota"] == 3


def test_each_address_without_a_tenant_can_have_a_token_quota_of_its_own() -> None:
    core = start(address_tokens_per_minute=60, tenants={"": {"tokens_per_minute": 100}})
    entry = core.offer(make_request("a", prompt=20, max_tokens=40, client="eager"), 0.0)
    assert core.take(0.0) is entry
    core.add_step(40, [(entry.account.index, 40)], 0.0)
    core.release(entry, 0.0, finished=True)
    with pytest.raises(Overloaded) as refused:
        core.offer(make_request("b", prompt=10, client="eager"), 0.0)
    assert refused.value.quotas == (QuotaExcess("address:eager", "60 tokens a minute"),)
    assert refused.value.retry_after_s == pytest.approx(10.0)
    core.offer(make_request("c", prompt=30, client="other"), 0.0)
    core.offer(make_request("d", prompt=1000, tenant="acme", client="eager"), 0.0)
    with pytest.raises(Overloaded) as together:
        core.offer(make_request("e", prompt=30, client="third"), 0.0)
    assert together.value.quotas == (QuotaExcess("tenant:", "100 tokens a minute"),)


@given(
    takes=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=40),
    rate=st.integers(1, 600),
)
def test_a_bucket_lets_no_more_through_than_its_rate(takes: list[tuple[float, int]], rate: int) -> None:
    bucket = TokenBucket(rate, 0.0)
    now, taken = 0.0, 0
    for pause, tokens in takes:
        now += pause
        tokens = min(tokens, rate)
        if bucket.wait_s(now, tokens) == 0.0:
            bucket.take(tokens)
            taken += tokens
    assert taken <= rate + now * rate / 60 + 1e-6


@given(times=st.lists(st.floats(0, 2), min_size=1, max_size=50), interval=st.floats(0.01, 5))
def test_paced_retries_are_an_interval_apart_and_bounded(times: list[float], interval: float) -> None:
    pacer = RetryPacer(0.1, 20.0)
    now, last = 0.0, None
    for pause in times:
        now += pause
        delay = pacer.delay_s(now, interval)
        assert 0.1 <= delay <= 20.0
        if last is not None and delay < 20.0 and delay > 0.1:
            assert now + delay >= last + min(interval, 20.0) - 1e-9 or now + delay >= last - 1e-9
        last = now + delay


def test_meters() -> None:
    window = WindowRate(10)
    assert window.rate(0.0) == 0.0
    for i in range(200):
        window.add(100 + i / 10, 5)
    assert window.rate(120.0) == pytest.approx(50, rel=0.1)
    assert window.rate(140.0) == 0.0
    mean = ForgetfulMean(share=0.5, max_age_s=10)
    assert mean.value(0.0) is None
    mean.add(0.0, 1.0)
    mean.add(1.0, 3.0)
    assert mean.value(2.0) == 2.0
    assert mean.value(12.0) is None
    rate = BackloggedRate()
    total = 0.0
    for i in range(1, 1001):  # 10 s with a queue at 100 a second, the same time again without work
        total += 1
        rate.observe(i / 100, total, backlogged=True)
    rate.observe(20.0, total, backlogged=False)
    assert rate.rate(20.0) == pytest.approx(100, rel=0.02)


def test_a_quiet_time_does_not_make_the_queue_look_slow() -> None:
    core = start()
    now, number = 0.0, 0

    def serve(count: int, now: float) -> float:
        nonlocal number
        for _ in range(count):
            number += 1
            core.offer(make_request(f"r{number}", prompt=10, max_tokens=10, ignore_eos=True), now)
        while (entry := core.take(now)) is not None:
            for _ in range(10):
                now += 0.01
                core.add_tokens(entry, 0, (1,), now)
            core.release(entry, now, finished=True)
        return now

    now = serve(50, now)
    for _ in range(20):
        now = serve(1, now + 20)
    for i in range(11):
        core.offer(make_request(f"burst{i}", prompt=10, max_tokens=10, ignore_eos=True), now)
    assert core.take(now) is not None
    assert core.load(now).expected_wait_s == pytest.approx(1.1, rel=0.05)
