"""The core's order against the slow model, and the bounds that docs/scheduler.md states."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.models.scheduler_model import ModelRequest, QueueModel
from tests.scheduler.helpers import make_info, make_request
from twinjet.engines.base import KvCache
from twinjet.scheduler import SchedulerSettings
from twinjet.scheduler.core import Scheduler
from twinjet.scheduler.entry import Entry, State

TENANTS = ("a", "b", "")
WEIGHTS = {"a": 1.0, "b": 2.0, "": 0.5}
CLIENTS = ("x", "y", "z")


class OrderMachine(RuleBasedStateMachine):
    """Offers, cancellations, tokens and finishes in any order; each dispatch is the one the model names."""

    shortest = False

    def __init__(self) -> None:
        super().__init__()
        order = "shortest" if self.shortest else "fifo"
        self.settings = SchedulerSettings.model_validate(
            {
                "tenant_order": order,
                "max_overtakes": 2,
                "priority_patience": 3,
                "prefix_window": 1,
                "early_tokens": 0,
                "tenants": {name: {"weight": weight} for name, weight in WEIGHTS.items()},
            }
        )
        self.core = Scheduler(self.settings)
        self.core.attach(make_info(max_num_seqs=3))
        self.model = QueueModel(self.shortest, 2, 3)
        self.waiting: dict[str, tuple[Entry, ModelRequest]] = {}
        self.running: list[tuple[Entry, ModelRequest]] = []
        self.now = 0.0
        self.count = 0

    @rule(
        tenant=st.sampled_from(TENANTS),
        client=st.sampled_from(CLIENTS),
        priority=st.sampled_from((-1, 0, 5)),
        length=st.integers(1, 40),
    )
    def offer(self, tenant: str, client: str, priority: int, length: int) -> None:
        self.count += 1
        key = f"r{self.count}"
        request = make_request(key, tenant=tenant, client=client, priority=priority, prompt=length)
        entry = self.core.offer(request, self.now)
        model = ModelRequest(key, tenant, client, priority, length, self.count)
        self.model.push(model)
        self.waiting[key] = (entry, model)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.waiting)))
        entry, model = self.waiting.pop(key)
        self.core.release(entry, self.now)
        self.model.remove(model)

    @rule()
    def dispatch(self) -> None:
        while (entry := self.core.take(self.now)) is not None:
            expected = self.model.take()
            assert entry.request.request_id == expected.request_id
            self.charge(expected, entry.num_prompt_tokens * self.settings.input_token_weight)
            del self.waiting[entry.request.request_id]
            self.running.append((entry, expected))
        # Work conservation: slots stand empty only if nobody waits.
        assert len(self.running) == 3 or not self.waiting

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 4))
    def stream(self, data: st.DataObject, count: int) -> None:
        entry, model = data.draw(st.sampled_from(self.running))
        self.core.add_tokens(entry, 0, tuple(range(count)), self.now)
        self.charge(model, count * self.settings.output_token_weight)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), finished=st.booleans())
    def end(self, data: st.DataObject, finished: bool) -> None:
        place = data.draw(st.integers(0, len(self.running) - 1))
        entry, _ = self.running.pop(place)
        self.core.release(entry, self.now, finished=finished)

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def charge(self, request: ModelRequest, work: float) -> None:
        for account in request.accounts:
            self.model.counters[account] += work / WEIGHTS.get(account, 1.0)

    @invariant()
    def counts_agree(self) -> None:
        load = self.core.load(self.now)
        assert load.waiting == len(self.waiting)
        assert load.running == len(self.running)
        assert load.waiting_tokens == sum(m.num_prompt_tokens for _, m in self.waiting.values())
        assert {name: (t.waiting, t.running) for name, t in load.tenants.items()} == {
            tenant: (sum(m.tenant == tenant for _, m in self.waiting.values()), num_running)
            for tenant in TENANTS
            if (num_running := sum(m.tenant == tenant for _, m in self.running))
            or any(m.tenant == tenant for _, m in self.waiting.values())
        }
        assert self.core.totals(self.now) == replace(load, tenants={}, request_ids=())
        assert set(load.request_ids) == {*self.waiting, *(e.request.request_id for e, _ in self.running)}

    @invariant()
    def positions_are_places(self) -> None:
        for entry, _ in self.waiting.values():
            assert 0 <= self.core.position(entry) < len(self.waiting)

    def teardown(self) -> None:
        for entry, _ in [*self.running, *self.waiting.values()]:
            self.core.release(entry, self.now)
        load = self.core.load(self.now)
        assert (load.waiting, load.running, load.waiting_tokens) == (0, 0, 0)
        assert not load.tenants
        assert self.core.is_idle


class ShortestOrderMachine(OrderMachine):
    shortest = True


TestFifoOrder = OrderMachine.TestCase
TestFifoOrder.settings = settings(max_examples=40, stateful_step_count=60)
TestShortestOrder = ShortestOrderMachine.TestCase
TestShortestOrder.settings = settings(max_examples=40, stateful_step_count=60)


def start(info: object = None, **values: object) -> Scheduler:
    core = Scheduler(SchedulerSettings.model_validate(values))
    core.attach(info or make_info())  # type: ignore[arg-type]
    return core


@given(seed=st.integers(0, 2**32), slots=st.integers(1, 8), weight=st.sampled_from((1.0, 2.0, 3.5)))
@settings(max_examples=25)
def test_two_backlogged_tenants_stay_within_the_fairness_bound(seed: int, slots: int, weight: float) -> None:
    rng = random.Random(seed)
    max_prompt, max_output = 60, 30
    core = start(
        make_info(max_num_seqs=slots),
        tenants={"a": {"weight": 1.0}, "b": {"weight": weight}},
        prefix_window=4,
    )
    running: list[Entry] = []
    waiting = {"a": 0, "b": 0}
    number = 0
    # Service over weight: twice the larger of one prompt and of what all slots can emit, in weighted tokens.
    bound = 2 * max(1.0 * max_prompt, 2.0 * slots * max_output)
    for _ in range(400):
        for tenant in waiting:
            while waiting[tenant] < 3:
                number += 1
                request = make_request(
                    f"r{number}", tenant=tenant, prompt=rng.randint(1, max_prompt),
                    max_tokens=rng.randint(1, max_output),
                )  # fmt: skip
                core.offer(request, 0.0)
                waiting[tenant] += 1
        while (entry := core.take(0.0)) is not None:
            waiting[entry.tenant.name] -= 1
            running.append(entry)
        for entry in list(running):
            core.add_tokens(entry, 0, (1,), 0.0)
            if entry.num_output_tokens == entry.request.sampling.max_tokens:
                running.remove(entry)
                core.release(entry, 0.0, finished=True)
        tenants = core.load(0.0).tenants
        assert abs(tenants["a"].served_tokens - tenants["b"].served_tokens / weight) <= bound


def test_clients_without_a_tenant_share_one_tenants_part_evenly() -> None:
    core = start(make_info(max_num_seqs=2))
    sources = [("a", ""), ("", "x"), ("", "y"), ("", "z")]
    waiting = dict.fromkeys(sources, 0)
    served = dict.fromkeys(sources, 0.0)
    running: list[Entry] = []
    number = 0
    max_prompt, max_output = 30, 10
    rng = random.Random(1)
    for _ in range(600):
        for source in sources:
            while waiting[source] < (50 if source == ("", "x") else 4):
                number += 1
                tenant, client = source
                request = make_request(
                    f"r{number}", tenant=tenant, client=client, prompt=rng.randint(1, max_prompt),
                    max_tokens=rng.randint(1, max_output),
                )  # fmt: skip
                core.offer(request, 0.0)
                waiting[source] += 1
        while (entry := core.take(0.0)) is not None:
            source = entry.request.tenant, entry.request.client_address
            waiting[source] -= 1
            served[source] += entry.num_prompt_tokens
            running.append(entry)
        for entry in list(running):
            core.add_tokens(entry, 0, (1,), 0.0)
            served[entry.request.tenant, entry.request.client_address] += 2.0
            if entry.num_output_tokens == entry.request.sampling.max_tokens:
                running.remove(entry)
                core.release(entry, 0.0, finished=True)
        bound = 2 * max(max_prompt, 2.0 * 2 * max_output)
        of_clients = [served["", client] for client in ("x", "y", "z")]
        assert abs(served["a", ""] - sum(of_clients)) <= bound
        assert max(of_clients) - min(of_clients) <= bound
    assert min(of_clients) > 10 * bound


def test_who_names_no_tenant_does_not_wait_behind_all_that_another_sent() -> None:
    core = start(make_info(max_num_seqs=1))
    for i in range(100):
        core.offer(make_request(f"flood{i}", client="flooder"), 0.0)
    assert core.take(0.0) is not None
    neighbour = core.offer(make_request("neighbour", client="neighbour"), 0.0)
    assert core.position(neighbour) == 0
    assert core.position(core.find("flood50")) == 50
    second = core.offer(make_request("second", client="neighbour"), 0.0)
    assert core.position(second) == 2
    for i in range(40, 50):
        core.release(core.find(f"flood{i}"), 0.0)
    assert core.position(core.find("flood50")) == 39 + 2
    third = core.offer(make_request("third", client="third"), 0.0)
    assert core.position(third) == 0
    core.release(third, 0.0)
    assert core.position(core.find("flood3")) == 2 + 2
    core.release(core.find("flood0"), 0.0, finished=True)
    # They are on a par when the neighbour comes, and the older goes first.
    flood = core.take(0.0)
    assert flood is core.find("flood1")
    core.release(flood, 0.0, finished=True)
    assert core.take(0.0) is neighbour


@given(seed=st.integers(0, 2**32), overtakes=st.integers(0, 5), rank=st.integers(0, 4))
@settings(max_examples=60)
def test_no_request_is_overtaken_more_often_than_stated(seed: int, overtakes: int, rank: int) -> None:
    rng = random.Random(seed)
    core = start(make_info(max_num_seqs=1), tenant_order="shortest", max_overtakes=overtakes, prefix_window=1)
    for i in range(rank):
        core.offer(make_request(f"before{i}", prompt=500), 0.0)
    core.offer(make_request("long", prompt=1000), 0.0)
    for i in range((rank + 1) * (overtakes + 1)):
        core.offer(make_request(f"short{i}", prompt=rng.randint(1, 9)), 0.0)
        entry = core.take(0.0)
        assert entry is not None
        core.release(entry, 0.0)
        if entry.request.request_id == "long":
            return
    pytest.fail("the long request was passed over more often than (rank + 1) * (max_overtakes + 1) times")


def test_a_cached_prefix_goes_first_but_only_so_often() -> None:
    core = start(make_info(max_num_seqs=1, num_blocks=256), prefix_window=4, max_overtakes=3)
    shared = tuple(range(64))
    first = core.offer(make_request("warm", prompt=(*shared, 1)), 0.0)
    assert core.take(0.0) is first
    core.prompt_done(first)
    core.release(first, 0.0, finished=True)
    core.offer(make_request("cold", prompt=65), 0.0)
    went = []
    for i in range(8):
        core.offer(make_request(f"hit{i}", prompt=(*shared, 100 + i)), 0.0)
        entry = core.take(0.0)
        assert entry is not None
        core.prompt_done(entry)
        went.append(entry.request.request_id)
        core.release(entry, 0.0, finished=True)
    assert went[:4] == ["hit0", "hit1", "hit2", "cold"]


@pytest.mark.parametrize("kind", ["tenant", "client"])
@pytest.mark.parametrize("bypass", [0, 1, 5])
def test_a_request_too_large_for_now_is_bypassed_only_so_often(bypass: int, kind: str) -> None:
    core = start(
        make_info(max_num_seqs=64, num_blocks=100), max_bypass=bypass, output_reserve="max", kv_headroom=0.0
    )
    core.offer(make_request("runs", prompt=16 * 50, max_tokens=16, **{kind: "x"}), 0.0)
    running = core.take(0.0)
    assert running is not None
    core.offer(make_request("large", prompt=16 * 90, max_tokens=16, **{kind: "large"}), 0.0)
    went = []
    for i in range(10):
        core.offer(make_request(f"small{i}", prompt=8, max_tokens=4, **{kind: f"t{i}"}), 0.0)
        while (entry := core.take(0.0)) is not None:
            went.append(entry)
    assert len(went) == bypass
    for entry in [running, *went]:
        core.release(entry, 0.0)
    entry = core.take(0.0)
    assert entry is not None
    assert entry.request.request_id == "large"


@pytest.mark.parametrize(("reserves", "admitted"), [(True, 4), (False, 8)])
def test_an_engine_that_reserves_whole_outputs_is_given_no_more_than_fit(
    reserves: bool, admitted: int
) -> None:
    info = make_info(max_num_seqs=64, num_blocks=100)
    info = replace(info, kv_cache=KvCache(100, 16, reserves_output=reserves))
    core = start(info, kv_headroom=0.0, default_output_tokens=1, reserve_sigmas=0.0, lookahead_tokens=0)
    for i in range(8):
        core.offer(make_request(f"r{i}", prompt=16, max_tokens=16 * 24), 0.0)
    went = []
    while (entry := core.take(0.0)) is not None:
        went.append(entry)
    assert len(went) == admitted


@pytest.mark.parametrize("patience", [1, 4])
def test_a_low_class_goes_after_its_patience(patience: int) -> None:
    core = start(make_info(max_num_seqs=1), priority_patience=patience)
    core.offer(make_request("low", priority=-10), 0.0)
    for i in range(patience + 1):
        core.offer(make_request(f"high{i}", priority=10), 0.0)
    went = []
    for _ in range(patience + 1):
        entry = core.take(0.0)
        assert entry is not None
        went.append(entry.request.request_id)
        core.release(entry, 0.0)
    assert went[-1] == "low"
    assert "low" not in went[:-1]


@pytest.mark.parametrize("kind", ["tenant", "client"])
def test_who_was_idle_has_saved_up_no_credit(kind: str) -> None:
    core = start(make_info(max_num_seqs=1))
    for i in range(20):
        core.offer(make_request(f"busy{i}", prompt=10, **{kind: "busy"}), 0.0)
    for _ in range(10):
        entry = core.take(0.0)
        assert entry is not None
        core.release(entry, 0.0)
    for i in range(4):
        core.offer(make_request(f"back{i}", prompt=10, **{kind: "back"}), 0.0)
    went = []
    for _ in range(8):
        entry = core.take(0.0)
        assert entry is not None
        went.append(entry.account.name)
        core.release(entry, 0.0)
    assert went.count("back") == 4
    assert went.count("busy") == 4


@pytest.mark.parametrize("kind", ["tenant", "client"])
@pytest.mark.parametrize("at_once", [1, 2])
def test_who_is_new_begins_where_those_are_who_were_last(at_once: int, kind: str) -> None:
    core = start(make_info(max_num_seqs=1))
    waiting: list[Entry] = []
    for i in range(2):
        waiting.append(core.offer(make_request(f"old{i}", prompt=100, **{kind: "old"}), 0.0))
        if len(waiting) < at_once:
            continue
        for last in waiting:
            assert core.take(0.0) is last
            if last.request_id != "old1":
                core.release(last, 0.0)
        waiting.clear()
    for i in range(50):
        core.offer(make_request(f"new{i}", prompt=10, **{kind: "new"}), 0.0)
    core.offer(make_request("again", prompt=100, **{kind: "old"}), 0.0)
    core.release(last, 0.0)
    went = 0
    while (entry := core.take(0.0)) is not None and entry.account.name == "new":
        went += 1
        core.release(entry, 0.0)
    # What the last one of the old took when nobody else waited, and one more at par.
    assert went == 11


@pytest.mark.parametrize("kind", ["tenant", "client"])
def test_who_leaves_and_comes_back_has_gained_nothing(kind: str) -> None:
    core = start(make_info(max_num_seqs=1))
    blocker = core.offer(make_request("blocker", **{kind: "blocker"}), 0.0)
    assert core.take(0.0) is blocker
    for i in range(2):
        core.offer(make_request(f"other{i}", prompt=10, **{kind: "other"}), 0.0)
    greedy = core.offer(make_request("greedy", prompt=10, **{kind: "greedy"}), 0.0)
    core.release(blocker, 0.0)
    first = core.take(0.0)
    assert first is not None and first.account.name == "other"
    core.release(first, 0.0)
    assert core.take(0.0) is greedy
    core.add_tokens(greedy, 0, tuple(range(1000)), 0.0)
    core.release(greedy, 0.0, finished=True)
    core.offer(make_request("greedy again", prompt=10, **{kind: "greedy"}), 0.0)
    second = core.take(0.0)
    assert second is not None and second.account.name == "other"


@pytest.mark.parametrize("kind", ["tenant", "client"])
def test_accounts_of_the_idle_are_bounded(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("twinjet.scheduler.core.MAX_ACCOUNTS", 10)
    core = start(make_info(max_num_seqs=1))
    busy = core.offer(make_request("busy", **{kind: "busy"}), 0.0)
    for i in range(50):
        entry = core.offer(make_request(f"r{i}", **{kind: f"t{i}"}), 0.0)
        core.release(entry, 0.0)
        assert entry.state is State.ENDED
    assert core.offer(make_request("more", **{kind: "busy"}), 0.0).account is busy.account
    kept = core._tenants if kind == "tenant" else core._clients
    assert len(kept) == 10
    assert len(core._account_at) == 2


def test_requests_that_come_and_go_leave_the_structures_small() -> None:
    core = start(make_info(max_num_seqs=1, num_blocks=64))
    blocker = core.offer(make_request("blocker"), 0.0)
    assert core.take(0.0) is blocker
    waiting = core.offer(make_request("waiting"), 0.0)  # what waits alone has no lane
    for i in range(3000):
        client = {"tenant" if i % 2 else "client": f"t{i % 97}"}
        request = make_request(f"r{i}", priority=i % 7, deadline=1e6 + i, **client)
        core.release(core.offer(request, 0.0), 0.0)
    core.release(waiting, 0.0)
    queue = core._queue
    assert (len(queue), len(queue._classes), len(queue._by_priority)) == (0, 0, 0)
    assert len(core._deadlines) <= 100
    assert core.load(0.0).request_ids == ("blocker",)


def test_a_queue_that_waits_for_blocks_predicts_a_wait_though_slots_are_free() -> None:
    core = start(make_info(max_num_seqs=8, num_blocks=10), output_reserve="max", kv_headroom=0.0)
    now = 0.0
    for i in range(20):
        core.offer(make_request(f"r{i}", prompt=100, max_tokens=10, ignore_eos=True), now)
    while core.load(now).waiting > 5:
        entry = core.take(now)
        assert entry is not None
        assert core.take(now) is None
        for _ in range(10):
            now += 0.1
            core.add_tokens(entry, 0, (1,), now)
        core.release(entry, now, finished=True)
    assert core.take(now) is not None
    assert core.take(now) is None
    assert core.load(now).expected_wait_s == pytest.approx(5, rel=0.3)
