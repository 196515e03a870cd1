"""Routes: what is refused, who is chosen, and what moves when something changes."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from twinjet.errors import InvalidRequest
from twinjet.routing import RevisionChanged, Route, RoutingTable
from twinjet.routing.table import check_route, choose

KNOWN = ("a", "b", "c")


def _all_ready(name: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("route", "field", "what"),
    [
        (Route({"a": -1.0}), "weights[a]", "-1 is out of range"),
        (Route({"a": float("nan")}), "weights[a]", "out of range"),
        (Route({"a": float("inf")}), "weights[a]", "out of range"),
        (Route({"a": 0.0, "b": 0.0}), "weights", "at least one"),
        (Route({}), "weights", "at least one"),
        (Route({"a": 1.7e308, "b": 1.7e308}), "weights", "together are above"),
        (Route({"d": 1.0}), "weights", "'d', which does not exist; known: a, b, c"),
        (Route({"a": 1.0}, ("d",)), "fallback", "'d', which does not exist"),
        (Route({"a": 1.0}, ("b", "b")), "fallback", "must not lead back"),
        (Route({"a": 1.0}, mirror="d", mirror_share=0.1), "mirror.deployment", "'d', which does not exist"),
        (Route({"a": 1.0}, mirror="a", mirror_share=0.1), "mirror.deployment", "answers this route itself"),
        (Route({"a": 1.0}, mirror="b", mirror_share=1.5), "mirror.share", "allowed: 0 to 1"),
        (Route({"a": 1.0}, mirror_share=0.5), "mirror.deployment", "is empty"),
    ],
)
def test_a_route_that_cannot_be_is_refused_by_field(route: Route, field: str, what: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_route(route, KNOWN)
    assert any(v.field == f"route.{field}" and what in v.message for v in refused.value.violations)


def test_a_fallback_of_very_many_names_is_refused_by_the_name() -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_route(Route({"a": 1.0}, ("b",) * 200_000), KNOWN)
    (violation,) = refused.value.violations
    assert violation.field == "route.fallback" and "'b' twice" in violation.message


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_route(Route({"a": -1.0, "d": 1.0}, ("b", "b"), mirror="e", mirror_share=2), KNOWN)
    assert len(refused.value.violations) == 5


def test_weights_are_kept_within_three_standard_errors() -> None:
    route, rng = Route({"a": 7.0, "b": 3.0, "c": 0.0}), random.Random(1)
    counts = Counter(choose(route, _all_ready, rng) for _ in range(10_000))
    assert counts["c"] == 0
    assert abs(counts["a"] - 7000) <= 3 * (10_000 * 0.7 * 0.3) ** 0.5


def test_one_that_is_not_ready_gets_nothing() -> None:
    route, rng = Route({"a": 9.0, "b": 1.0}, ("c",)), random.Random(1)
    assert {choose(route, lambda name: name != "a", rng) for _ in range(50)} == {"b"}
    assert choose(route, lambda name: name == "c", rng) == "c"
    assert choose(route, lambda name: False, rng) == "a"


def test_a_weight_of_zero_serves_only_when_no_other_can() -> None:
    route = Route({"a": 1.0, "b": 0.0}, ("c",))
    assert choose(route, lambda name: name != "a", random.Random(1)) == "b"


def test_a_sticky_key_stays_and_shares_follow_the_weights() -> None:
    route, rng = Route({"a": 7.0, "b": 3.0}, sticky="tenant"), random.Random(1)
    keys = [f"tenant-{i}" for i in range(10_000)]
    first = {key: choose(route, _all_ready, rng, key) for key in keys}
    assert first == {key: choose(route, _all_ready, rng, key) for key in keys}
    shares = Counter(first.values())
    assert abs(shares["a"] - 7000) <= 3 * (10_000 * 0.7 * 0.3) ** 0.5


def test_only_what_must_move_moves() -> None:
    rng = random.Random(1)
    keys = [f"session-{i}" for i in range(3_000)]
    even = Route({"a": 1.0, "b": 1.0, "c": 1.0}, sticky="session")
    before = {key: choose(even, _all_ready, rng, key) for key in keys}
    without_c = {key: choose(even, lambda name: name != "c", rng, key) for key in keys}
    assert all(without_c[key] == before[key] for key in keys if before[key] != "c")
    more_a = Route({"a": 2.0, "b": 1.0, "c": 1.0}, sticky="session")
    after = {key: choose(more_a, _all_ready, rng, key) for key in keys}
    assert all(after[key] == "a" for key in keys if after[key] != before[key])


def test_without_a_key_a_sticky_route_goes_by_weight() -> None:
    route, rng = Route({"a": 1.0, "b": 1.0}, sticky="tenant"), random.Random(1)
    assert len({choose(route, _all_ready, rng, "") for _ in range(50)}) == 2


def test_two_who_read_the_same_revision_cannot_both_write() -> None:
    table = RoutingTable({"m": Route({"a": 1.0})})
    read = table.revision
    table.expect(read)
    table.replace({"m": Route({"b": 1.0})})
    with pytest.raises(RevisionChanged, match=f"revision {read + 1}, not {read}"):
        table.expect(read)
    table.expect(None)


def test_a_deployments_routes_are_found_mirrors_too() -> None:
    table = RoutingTable(
        {"m": Route({"a": 1.0}, ("b",)), "n": Route({"b": 1.0}, mirror="c", mirror_share=0.1)}
    )
    assert (table.using("a"), table.using("b"), table.using("c")) == (["m"], ["m", "n"], ["n"])
