"""The native ledger, length estimate and rank counts against their slow models, in any order of calls."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.models.ledger_model import Held, LedgerModel
from tests.models.length_model import LengthModel
from twinjet._core import KvLedger, LengthEstimator, RankCounts

SIZE = 4
LONGEST = 400


class LedgerMachine(RuleBasedStateMachine):
    """Every admission, count and cached prefix is the model's, whatever the blocks, reserve and outputs."""

    @initialize(
        num_blocks=st.integers(4, 60),
        shares=st.booleans(),
        headroom=st.sampled_from((0.0, 0.02, 0.3)),
        lookahead=st.integers(0, 5),
        sigmas=st.sampled_from((None, 0.0, 1.0, 3.0)),
    )
    def begin(
        self, num_blocks: int, shares: bool, headroom: float, lookahead: int, sigmas: float | None
    ) -> None:
        self.ledger = KvLedger(
            num_blocks, SIZE, prefix_cache=shares, headroom=headroom, lookahead_tokens=lookahead,
            sigmas=sigmas, longest=LONGEST,
        )  # fmt: skip
        self.model = LedgerModel(
            num_blocks, SIZE, shares=shares, headroom=headroom, lookahead=lookahead, sigmas=sigmas,
            longest=LONGEST,
        )  # fmt: skip
        self.lengths = LengthEstimator(20.0), LengthModel(20.0)
        self.running: list[tuple[int, Held]] = []
        self.released: list[int] = []

    @rule(
        family=st.integers(0, 2), prompt=st.integers(1, 60), n=st.sampled_from((1, 1, 1, 2, 3)),
        max_tokens=st.integers(0, 120), is_fixed=st.booleans(),
    )  # fmt: skip
    def hold(self, family: int, prompt: int, n: int, max_tokens: int, is_fixed: bool) -> None:
        tokens = tuple(range(1000 * family, 1000 * family + prompt))
        hashes = self.ledger.hash_tokens(tokens, b"")
        assert len(hashes) == (16 * (prompt // SIZE) if self.model.shares else 0)
        assert self.ledger.find_cached(hashes, prompt) == SIZE * len(self.model.match(hashes, prompt))
        prompts = [(hashes[: 16 * k], min(prompt, SIZE * k + 1)) for k in range(len(hashes) // 16 + 1)]
        found = [self.ledger.find_cached(*p) for p in prompts]
        for window in (1, 2, len(prompts) + 1):
            seen = found[:window]
            assert self.ledger.find_longest(prompts, window) == seen.index(max(seen))
        expected = self.model.hold(hashes, prompt, n, max_tokens, is_fixed, self.lengths[1])
        # Sums in another order may round to the other side of the bound.
        assume(abs(self.model.margin) > 1e-6)
        holding = self.ledger.hold(hashes, prompt, n, max_tokens, is_fixed, self.lengths[0])
        assert (holding is None) == (expected is None)
        if holding is not None and expected is not None:
            assert self.ledger.num_cached_tokens(holding) == expected.num_cached_tokens
            self.running.append((holding, expected))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(0, 40))
    def append(self, data: st.DataObject, count: int) -> None:
        holding, held = data.draw(st.sampled_from(self.running))
        index = data.draw(st.integers(0, len(held.outputs) - 1))
        self.ledger.append(holding, index, count)
        self.model.append(held, index, count)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        holding, held = data.draw(st.sampled_from(self.running))
        self.ledger.publish(holding)
        self.model.publish(held)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holding, held = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.ledger.release(holding)
        self.model.release(held)
        self.released.append(holding)

    @rule(length=st.integers(0, 150), complete=st.booleans())
    def learn(self, length: int, complete: bool) -> None:
        self.lengths[0].observe(length, complete)
        self.lengths[1].observe(length, complete=complete)

    @rule()
    def reset(self) -> None:
        assert self.ledger.reset() == self.model.manager.reset()

    @precondition(lambda self: self.released or self.running)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        for holding in (-1, 1 << 40, *self.released[-1:]):
            for call in (self.ledger.publish, self.ledger.release, self.ledger.num_cached_tokens):
                with pytest.raises(KeyError):
                    call(holding)
            with pytest.raises(KeyError):
                self.ledger.append(holding, 0, 1)
        for holding, held in self.running[:1]:
            for index in (-1, len(held.outputs)):
                with pytest.raises(KeyError):
                    self.ledger.append(holding, index, 1)
            with pytest.raises(ValueError, match="num_tokens"):
                self.ledger.append(holding, 0, -1)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.num_used_blocks == self.model.used
        assert self.ledger.num_overflows == self.model.num_overflows
        assert self.ledger.is_predicting == self.model.predicting
        self.ledger.check()
        self.model.manager.check()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=60)


@given(seed=st.integers(0, 2**32), count=st.integers(0, 400), prior=st.sampled_from((1.0, 20.0, 3000.0)))
@settings(max_examples=60)
def test_the_length_estimate_is_the_models(seed: int, count: int, prior: float) -> None:
    rng = random.Random(seed)
    native, model = LengthEstimator(prior, memory=50), LengthModel(prior, memory=50)
    for _ in range(count):
        length, complete = int(rng.expovariate(1 / 300)), rng.random() < 0.7
        native.observe(length, complete)
        model.observe(length, complete=complete)
        if rng.random() < 0.1:
            limit = rng.choice((0, 1, 3, 4, 100, 2**20 - 1, 2**20, 2**30))
            assert native.mean(limit) == pytest.approx(model.mean(limit), rel=1e-9)
    assert native.num_observed == model.num_observed
    for start in (0, 1, 2.5, 777, 2**20 - 1, 2**21):
        for ahead in (0, 1, 50, 4096, 2**22):
            expected = float(model.survival(start, np.array([0.0, ahead]))[1])
            assert native.survival(start, ahead) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_old_lengths_are_scaled_down_before_their_weights_overflow() -> None:
    native, model = LengthEstimator(10.0, memory=2), LengthModel(10.0, memory=2)
    for i in range(3000):
        native.observe(i % 50, True)
        model.observe(i % 50, complete=True)
    assert native.mean(1000) == pytest.approx(model.mean(1000), rel=1e-9)


@pytest.mark.parametrize("arguments", [(0.0,), (-1.0,), (float("nan"),), (float("inf"),)])
def test_a_mean_that_is_none_is_refused(arguments: tuple[float]) -> None:
    with pytest.raises(ValueError, match="prior_mean"):
        LengthEstimator(*arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_blocks", 0),
        ("num_blocks", 2**30 + 1),
        ("block_size", 3),
        ("headroom", 1.0),
        ("headroom", float("nan")),
        ("sigmas", -1.0),
        ("lookahead_tokens", -1),
        ("longest", -1),
    ],
)
def test_a_ledger_out_of_range_is_refused(name: str, value: float) -> None:
    given = {
        "num_blocks": 8, "block_size": 4, "prefix_cache": True, "headroom": 0.0, "lookahead_tokens": 0,
        "sigmas": 1.0, "longest": 64,
    }  # fmt: skip
    KvLedger(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):
        KvLedger(**{**given, name: value})  # type: ignore[arg-type]


def test_what_a_call_cannot_use_is_refused_and_changes_nothing() -> None:
    ledger = KvLedger(
        8, 4, prefix_cache=True, headroom=0.0, lookahead_tokens=0, sigmas=None, longest=64
    )  # fmt: skip
    lengths = LengthEstimator(8.0)
    hashes = ledger.hash_tokens((1, 2, 3, 4), b"")
    with pytest.raises(ValueError, match="hashes for 2 full blocks"):
        ledger.hold(hashes, 8, 1, 4, False, lengths)
    with pytest.raises(TypeError, match="LengthEstimator"):
        ledger.hold(hashes, 4, 1, 4, False, 8.0)  # type: ignore[arg-type]
    for prompt, n, most in ((-1, 1, 4), (4, 0, 4), (4, 1, -1), (2**41, 1, 4)):
        with pytest.raises(ValueError, match="must be in"):
            ledger.hold(hashes, prompt, n, most, False, lengths)
    with pytest.raises(TypeError, match="salt"):
        ledger.hash_tokens((1,), "s")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token id"):
        ledger.hash_tokens((-1,), b"")
    with pytest.raises(TypeError, match="prompt 1 is not a pair"):
        ledger.find_longest([(hashes, 4), hashes], 4)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="list"):
        ledger.find_longest(((hashes, 4),), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window"):
        ledger.find_longest([(hashes, 4)], 0)
    with pytest.raises(TypeError, match="arguments"):
        ledger.hold(hashes)  # type: ignore[call-arg]
    assert ledger.num_used_blocks == 0
    ledger.check()


@given(changes=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=300))
@settings(max_examples=60)
def test_rank_counts_are_sums_over_lists(changes: list[tuple[int, bool]]) -> None:
    counts, sizes = RankCounts(), [0] * 6
    for which, grows in changes:
        which = 0 if grows and which < 4 else which  # one list grows past the first table
        if grows:
            sizes[which] += 1
            counts.add(sizes[which], 1)
        elif sizes[which]:
            counts.add(sizes[which], -1)
            sizes[which] -= 1
    for x in (0, 1, 2, 31, 63, 64, 65, 127, 128, 1000):
        assert counts.at(x) == (sum(size >= x for size in sizes) if x else 0)
        assert counts.up_to(x) == sum(min(size, x) for size in sizes)
