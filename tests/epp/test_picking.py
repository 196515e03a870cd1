"""The rules of a decision: who can serve, who holds the beginning, who is refused."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

import pytest

from twinjet._core import EppPrompt
from twinjet.epp.orca import Reading
from twinjet.epp.picking import Ask, EndpointPicker, ModelFacts, Replica, prefix_root
from twinjet.epp.settings import IndexSettings, PickingSettings, SheddingSettings
from twinjet.errors import Overloaded, Unavailable
from twinjet.v1 import generation_pb2 as pb

IDLE = Reading(0, 0, 0, 0, None, {})


class Bench:
    """A picker with a clock that stands still unless told."""

    def __init__(self, count: int, index: dict[str, Any] | None = None, **shedding: float) -> None:
        self.now = 100.0
        bits = itertools.count(1)
        self.picker = EndpointPicker(
            PickingSettings(),
            IndexSettings.model_validate(index or {}),
            SheddingSettings.model_validate(shedding),
            clock=lambda: self.now,
            bits=lambda: next(bits) * 0x9E3779B97F4A7C15 % 2**64,
        )
        self.picker.set_replicas([f"10.0.0.{i}:50051" for i in range(count)])
        self.all_up()

    def all_up(self) -> None:
        for replica in self.all:
            self.facts(replica)
            self.report(replica)
            self.picker.set_up(replica, is_up=True)

    @property
    def all(self) -> list[Replica]:
        return list(self.picker.replicas.values())

    def facts(self, replica: Replica, **models: ModelFacts) -> None:
        self.picker.set_facts(replica, models or {"m": ModelFacts(True, "d", kv_tokens=100_000)})

    def report(self, replica: Replica, **values: Any) -> None:
        fields = {name: getattr(IDLE, name) for name in Reading.__slots__}
        self.picker.report(replica, Reading(**(fields | values)))

    def pick(self, request: pb.GenerateRequest | None = None, **ask: Any) -> str:
        """Pick, and let the request end at once; gives the best address."""
        prompt = None if request is None else EppPrompt(request.SerializeToString(), "Generate")
        pick = self.picker.pick(Ask(prompt, **ask))
        self.picker.finish(pick)
        return pick.destination.split(",")[0]


def ids(start: int, count: int = 1000, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=range(start, start + count), **fields)


def test_requests_with_one_beginning_stay_together_and_others_spread() -> None:
    bench = Bench(4)
    homes = {family: bench.pick(ids(10_000 * family)) for family in range(8)}
    assert len(set(homes.values())) > 1
    for family, home in homes.items():
        longer = pb.GenerateRequest(token_ids=[*range(10_000 * family, 10_000 * family + 1000), 7, 8, 9])
        assert bench.pick(longer) == home


@pytest.mark.parametrize(
    "changed",
    [{"model": "m"}, {"options": {"cache_salt": "s"}}, {"options": {"adapter": "a"}}],
    ids=["model", "salt", "adapter"],
)
def test_what_shares_no_cache_is_no_prefix(changed: dict[str, Any]) -> None:
    bench = Bench(2)
    first = bench.pick(ids(0))
    assert bench.pick(ids(0)) == first
    assert bench.pick(ids(0, **changed)) != first


def test_short_prompts_take_turns_on_idle_replicas() -> None:
    bench = Bench(4)
    taken = [bench.pick(ids(1000 * i, 100)) for i in range(8)]
    assert sorted(taken) == sorted([r.address for r in bench.all] * 2)


def test_pickers_that_know_nothing_of_each_other_agree_on_a_home() -> None:
    one, other = Bench(5), Bench(5)
    other.picker.set_replicas([])
    other.picker.set_replicas([r.address for r in reversed(one.all)])
    other.all_up()
    assert [r.number for r in other.all] != [other.picker.replicas[r.address].number for r in one.all]
    homes = [one.pick(ids(10_000 * family)) for family in range(6)]
    assert [other.pick(ids(10_000 * family)) for family in reversed(range(6))] == homes[::-1]
    assert len(set(homes)) > 1


def test_text_that_begins_alike_stays_together() -> None:
    bench = Bench(3)
    text = "once upon a time there was a server " * 40
    first = bench.pick(pb.GenerateRequest(text=text + "and it"))
    for tail in ("spoke", "é", "and it was so"):
        assert bench.pick(pb.GenerateRequest(text=text + tail)) == first


def test_a_chat_continues_where_it_was() -> None:
    bench = Bench(3)

    def pick(turns: list[str]) -> str:
        request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=turn) for turn in turns])
        made = bench.picker.pick(Ask(EppPrompt(request.SerializeToString(), "Chat")))
        bench.picker.finish(made)
        return made.destination.split(",")[0]

    first = pick(["a long question " * 50])
    assert {pick(["a long question " * 50, f"answer {i}"]) for i in range(3)} == {first}
    assert pick(["another question " * 50]) != first


def test_a_queue_outweighs_a_cached_prefix() -> None:
    bench = Bench(2)
    home = bench.pick(ids(0))
    busy = bench.picker.replicas[home]
    bench.report(busy, waiting=3, running=10, waiting_tokens=5000)
    assert bench.pick(ids(0)) != home
    bench.report(busy)
    bench.now += 10
    for replica in bench.all:
        bench.report(replica)
    assert bench.pick(ids(0)) in {r.address for r in bench.all}


def test_the_list_has_the_next_best_behind() -> None:
    bench = Bench(3)
    pick = bench.picker.pick(Ask(EppPrompt(ids(0).SerializeToString(), "Generate")))
    best, second = pick.destination.split(",")
    assert best == pick.replica.address and second != best


def test_only_those_that_serve_the_model_are_asked() -> None:
    bench = Bench(3)
    first, second, third = bench.all
    bench.facts(first, other=ModelFacts(True, "o"))
    bench.facts(second, m=ModelFacts(False, "d"))
    for start in range(5):
        assert bench.pick(ids(10_000 * start, model="m")) == third.address
    bench.report(third, serving={"d": False})
    # Draining, or loading: either says so itself, better than the picker could.
    assert bench.pick(ids(0, model="m")) in (second.address, third.address)
    assert bench.pick(ids(0, model="unknown")) in {r.address for r in bench.all}


def test_those_that_have_the_adapter_come_first() -> None:
    bench = Bench(3)
    bench.facts(bench.all[1], m=ModelFacts(True, "d", frozenset({"tuned"})))
    for start in range(4):
        assert bench.pick(ids(9_000 * start, model="m", options={"adapter": "tuned"})) == bench.all[1].address
    assert bench.pick(ids(0, model="m", options={"adapter": "missing"}))


def test_a_subset_is_kept_to() -> None:
    bench = Bench(4)
    allowed = [bench.all[2].address, "10.9.9.9:1"]
    assert {bench.pick(ids(5000 * i), allowed=allowed) for i in range(4)} == {bench.all[2].address}
    with pytest.raises(Unavailable):
        bench.pick(ids(0), allowed=["10.9.9.9:1"])


def test_without_a_prompt_the_load_alone_decides() -> None:
    bench = Bench(2)
    bench.report(bench.all[0], running=5)
    assert bench.pick() == bench.all[1].address


def test_a_replica_that_does_not_answer_gets_nothing_and_forgets() -> None:
    bench = Bench(2)
    home = bench.picker.replicas[bench.pick(ids(0))]
    bench.picker.set_up(home, is_up=False)
    other = bench.pick(ids(0))
    assert other != home.address
    bench.picker.set_up(home, is_up=True)
    assert bench.pick(ids(0)) == other
    for replica in bench.all:
        bench.picker.set_up(replica, is_up=False)
    with pytest.raises(Unavailable) as error:
        bench.pick(ids(0))
    assert error.value.reason == "NO_REPLICA"


def test_when_all_are_silent_at_once_they_are_asked_all_the_same() -> None:
    bench = Bench(2)
    home = bench.pick(ids(0))
    first, second = bench.all
    bench.picker.set_up(first, is_up=False, is_silent=True)
    assert bench.pick(ids(7000)) == second.address
    bench.picker.set_up(second, is_up=False, is_silent=True)
    assert bench.pick(ids(0)) == home
    bench.picker.set_up(first, is_up=False)
    assert bench.pick(ids(0)) == second.address


def test_a_replica_that_leaves_while_requests_run_is_forgotten_cleanly() -> None:
    bench = Bench(2)
    pick = bench.picker.pick(Ask(EppPrompt(ids(0).SerializeToString(), "Generate")))
    bench.picker.set_replicas(["10.0.1.1:1"])
    bench.picker.finish(pick)
    (new,) = bench.all
    assert bench.picker.num_in_flight(new) == 0
    bench.report(pick.replica)
    bench.picker.set_up(pick.replica, is_up=True)
    with pytest.raises(Unavailable):
        bench.pick(ids(0))


def fill(bench: Bench, waiting: float) -> None:
    bench.now += 1
    for replica in bench.all:
        bench.report(replica, waiting=waiting, running=8, expected_wait_s=4.5)


def test_when_all_are_full_those_above_their_share_are_refused() -> None:
    bench = Bench(2, max_waiting=10, hard_waiting=50)

    def ask(tenant: str, priority: int = 0) -> Ask:
        request = ids(0, options={"tenant": tenant, "priority": priority})
        return Ask(EppPrompt(request.SerializeToString(), "Generate"))

    running = [bench.picker.pick(ask("greedy")) for _ in range(9)] + [bench.picker.pick(ask("modest"))]
    fill(bench, 9)
    running.append(bench.picker.pick(ask("greedy")))
    fill(bench, 10)
    with pytest.raises(Overloaded) as error:
        bench.picker.pick(ask("greedy"))
    assert error.value.retry_after_s == 4.5
    running.append(bench.picker.pick(ask("modest")))
    running.append(bench.picker.pick(ask("new")))
    with pytest.raises(Overloaded):
        bench.picker.pick(ask("new", priority=-1))
    fill(bench, 50)
    with pytest.raises(Overloaded):
        bench.picker.pick(ask("new"))
    for pick in running:
        bench.picker.finish(pick)
    assert all(bench.picker.num_in_flight(r) == 0 for r in bench.all)


def test_when_all_are_full_addresses_without_a_tenant_share_its_share() -> None:
    bench = Bench(2, max_waiting=10, hard_waiting=50)

    def ask(client: str = "", tenant: str = "") -> Ask:
        request = ids(0, options={"tenant": tenant})
        return Ask(EppPrompt(request.SerializeToString(), "Generate"), client_address=client)

    running = [bench.picker.pick(ask("greedy")) for _ in range(9)] + [bench.picker.pick(ask("modest"))]
    fill(bench, 10)
    with pytest.raises(Overloaded):
        bench.picker.pick(ask("greedy"))
    running += [bench.picker.pick(ask(client)) for client in ("modest", "new")]
    # Twelve of them and one of a tenant: half of 13 is theirs, 2.2 for each address.
    running.append(bench.picker.pick(ask("greedy", "acme")))
    running.append(bench.picker.pick(ask("modest")))
    with pytest.raises(Overloaded):
        bench.picker.pick(ask("modest"))
    running.append(bench.picker.pick(ask("greedy", "acme")))
    for pick in running:
        bench.picker.finish(pick)
    assert not bench.picker._anonymous and not bench.picker._tenants


def test_one_tenant_alone_may_fill_all() -> None:
    bench = Bench(1, max_waiting=10, hard_waiting=50)
    fill(bench, 49)
    assert bench.pick(ids(0))


def test_a_replica_that_says_it_is_idle_is_not_believed_for_ever() -> None:
    bench = Bench(2)
    liar, honest = bench.all
    taken = {liar.address: 0, honest.address: 0}
    for i in range(40):
        pick = bench.picker.pick(Ask(EppPrompt(ids(3000 * i, 10).SerializeToString(), "Generate")))
        taken[pick.replica.address] += 1
        bench.now += 1
        bench.report(liar)
        bench.report(honest, running=taken[honest.address])
    assert abs(taken[liar.address] - taken[honest.address]) <= 2


def test_the_roots_of_python_and_native_code_agree() -> None:
    bench = Bench(1)
    request = ids(7, 256, model="m", options={"adapter": "a", "cache_salt": "é"})
    hasher = bench.picker.hasher(64)
    prompt = EppPrompt(request.SerializeToString(), "Generate")
    assert prompt.hash(hasher) == hasher.hash_bytes(
        array("i", request.token_ids), salt=prefix_root("m", "a", "é")
    )
    assert prompt.token_ids() == array("i", request.token_ids).tobytes()


def test_what_is_cut_short_gives_its_beginning() -> None:
    bench = Bench(1)
    hasher = bench.picker.hasher(64)
    whole = pb.GenerateRequest(model="m", text="some words " * 500).SerializeToString()
    full, cut = EppPrompt(whole, "Generate").hash(hasher), EppPrompt(whole[:3000], "Generate").hash(hasher)
    assert len(cut) > 100 and full.startswith(cut)
    with pytest.raises(ValueError, match="GenerateRequest"):
        EppPrompt(b"\xff" * 20, "Generate")


def test_an_index_that_is_off_remembers_nothing() -> None:
    bench = Bench(2, {"mode": "off"})
    assert {bench.pick(ids(0)) for _ in range(4)} == {r.address for r in bench.all}
    assert bench.picker.index_sizes()["sent"][0] == 0
