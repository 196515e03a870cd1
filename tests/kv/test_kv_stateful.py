"""Random sequences of calls: the native block manager must answer as the model does, and stay sound."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from models.block_hash import hash_blocks, root
from models.block_manager import ModelBlockManager
from twinjet._core import BlockManager

KEY = bytes(range(32))
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14) | st.just([])
INDEX = st.integers(0, 60)
RESERVED = st.sampled_from([0, 0, 0, 0, 1, 2, -1])
has_live = precondition(lambda self: bool(self.live))
SALTS = st.sampled_from([b"", b"tenant"])


class BlockManagers(RuleBasedStateMachine):
    """Each rule calls both managers; `live` pairs their ids of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[tuple[int, int]] = []
        self.external_tokens: dict[int, list[int]] = {}
        self.detached: list[int] = []
        self.dead: list[int] = []

    @initialize(
        num_blocks=st.integers(2, 16),
        block_size=st.sampled_from([1, 2, 4]),
        prefix_cache=st.sampled_from([True, True, True, False]),
        null_block=st.booleans(),
        watermark=st.sampled_from([0.0, 0.3]),
        algorithm=st.sampled_from(["sha256", "siphash"]),
        max_events=st.sampled_from([0, 3, 1000]),
    )
    def make(self, num_blocks: int, block_size: int, **options: Any) -> None:
        self.native = BlockManager(num_blocks, block_size, hash_key=KEY, **options)
        self.model = ModelBlockManager(num_blocks, block_size, hash_key=KEY, **options)

    def pick(self, index: int) -> tuple[int, int]:
        """A live pair; now and then one that never was."""
        if not self.live or index == 60:
            return (self.dead[0] if self.dead else 12345, -1)
        return self.live[index % len(self.live)]

    def both(
        self, name: str, native_args: tuple[Any, ...], model_args: tuple[Any, ...], **options: Any
    ) -> Any:
        """Call both; the answers, or the kinds of exception, must agree. Returns both answers."""
        answers = []
        for manager, args in ((self.native, native_args), (self.model, model_args)):
            try:
                answers.append(getattr(manager, name)(*args, **options))
            except (KeyError, ValueError) as error:
                answers.append(type(error))
        return answers

    def agree(self, name: str, pair: tuple[int, int], *args: Any) -> Any:
        native, model = self.both(name, (pair[0], *args), (pair[1], *args))
        assert native == model
        return native

    def adopt(self, native: Any, model: Any) -> tuple[int, int] | None:
        if not isinstance(native, int) or not isinstance(model, int):
            assert native == model
            return None
        self.live.append((native, model))
        return self.live[-1]

    @rule(
        tokens=TOKENS,
        salt=SALTS,
        num_lookahead_tokens=st.integers(-1, 3),
        reserved_blocks=RESERVED,
        use_watermark=st.booleans(),
        publish=st.booleans(),
    )
    def allocate(self, tokens: list[int], **options: Any) -> None:
        self.adopt(*self.both("allocate", (tokens,), (tokens,), **options))

    @rule(tokens=TOKENS, salt=SALTS)
    def allocate_from_match(self, tokens: list[int], salt: bytes) -> None:
        match = self.native.match(tokens, salt=salt)
        before = self.native.free_order()
        hashes = match.hashes if self.native.prefix_cache else None
        try:
            native: Any = self.native.allocate(tokens, salt=salt, hashes=hashes)
        except ValueError as error:
            native = type(error)
        try:
            model: Any = self.model.allocate(tokens, salt=salt)
        except ValueError as error:
            model = type(error)
        pair = self.adopt(native, model)
        if pair:
            assert self.native.num_cached_tokens(pair[0]) == match.num_tokens
            assert self.native.block_ids(pair[0])[: len(match.block_ids)] == match.block_ids
        else:
            assert self.native.free_order() == before

    @has_live
    @rule(index=INDEX, tokens=TOKENS)
    def append(self, index: int, tokens: list[int]) -> None:
        self.agree("append", self.pick(index), tokens)

    @has_live
    @rule(index=INDEX, token=st.integers(0, 1))
    def append_one(self, index: int, token: int) -> None:
        self.agree("append_one", self.pick(index), token)

    @has_live
    @rule(index=INDEX, count=st.integers(-1, 6))
    def append_count(self, index: int, count: int) -> None:
        self.agree("append_count", self.pick(index), count)

    @rule(picks=st.lists(INDEX, max_size=6), token=st.sampled_from([0, 1, None]), all_live=st.booleans())
    def append_batch(self, picks: list[int], token: int | None, all_live: bool) -> None:
        pairs = list(self.live) if all_live else [self.pick(i) for i in picks]
        tokens = None if token is None else [token] * len(pairs)
        native, model = self.both(
            "append_batch", ([p[0] for p in pairs], tokens), ([p[1] for p in pairs], tokens)
        )
        assert (native.tolist() if hasattr(native, "tolist") else native) == model

    @has_live
    @rule(index=INDEX, num_tokens=st.integers(-1, 16))
    def publish(self, index: int, num_tokens: int) -> None:
        self.agree("publish", self.pick(index), num_tokens)

    @has_live
    @rule(index=INDEX)
    def fork(self, index: int) -> None:
        pair = self.pick(index)
        native, model = self.both("fork", (pair[0],), (pair[1],))
        if isinstance(native, tuple) and isinstance(model, tuple):
            assert native[1] == model[1]
            child = self.adopt(native[0], model[0])
            if pair[1] in self.external_tokens:
                self.external_tokens[child[1]] = list(self.external_tokens[pair[1]])
        else:
            assert native == model

    @rule(
        tokens=TOKENS,
        computed=st.integers(0, 14),
        reserved_blocks=RESERVED,
        use_watermark=st.booleans(),
        stale=st.booleans(),
    )
    def open_and_reserve(
        self, tokens: list[int], computed: int, reserved_blocks: int, use_watermark: bool, stale: bool
    ) -> None:
        """The way of an engine that keeps tokens and hashes: match, adopt, publish what it computes."""
        pair = self.adopt(self.native.open(), self.model.open())
        hashes = hash_blocks(KEY, self.native.block_size, tokens, parent=root(KEY))
        limit = max(len(tokens) - 1, 0) // self.native.block_size
        matched = self.native.match_hashes(hashes, limit)
        assert matched == self.model.match_hashes(hashes, limit)
        if stale and matched:
            self.both("evict", ([matched[0]],), ([matched[0]],))
        self.external_tokens[pair[1]] = tokens
        num_publish = min(computed, len(tokens))
        self.agree("reserve", pair, len(tokens), num_publish, hashes, matched, reserved_blocks, use_watermark)

    @has_live
    @rule(index=INDEX, more=TOKENS, publish=st.integers(-1, 30), bytes_form=st.booleans())
    def reserve_more(self, index: int, more: list[int], publish: int, bytes_form: bool) -> None:
        pair = self.pick(index)
        tokens = self.external_tokens.get(pair[1], []) + more
        hashes = hash_blocks(KEY, self.native.block_size, tokens, parent=root(KEY))
        native, model = self.both(
            "reserve",
            (pair[0], len(tokens), min(publish, len(tokens)), b"".join(hashes) if bytes_form else hashes),
            (pair[1], len(tokens), min(publish, len(tokens)), hashes),
        )
        assert native == model
        if isinstance(native, tuple) and pair[1] in self.external_tokens:
            self.external_tokens[pair[1]] = tokens

    @has_live
    @rule(index=INDEX, num_tokens=st.integers(-1, 16))
    def publish_hashes(self, index: int, num_tokens: int) -> None:
        pair = self.pick(index)
        tokens = self.external_tokens.get(pair[1], [])
        hashes = hash_blocks(KEY, self.native.block_size, tokens, parent=root(KEY))
        # As vLLM's own hashes are: longer than the 16 bytes that count.
        self.agree("publish_hashes", pair, num_tokens, [h + h for h in hashes])

    @has_live
    @rule(index=INDEX, detach=st.sampled_from([False, False, True]))
    def drop(self, index: int, detach: bool) -> None:
        pair = self.pick(index)
        answer = self.agree("detach" if detach else "free", pair)
        if detach and isinstance(answer, list):
            self.detached += reversed(answer)
        if pair in self.live:
            self.live.remove(pair)
            self.dead.append(pair[0])

    @rule(count=st.integers(0, 6), extra=st.lists(st.integers(-1, 17), max_size=1))
    def free_blocks(self, count: int, extra: list[int]) -> None:
        blocks = self.detached[:count] + extra
        native, model = self.both("free_blocks", (blocks,), (blocks,))
        assert native == model
        if native is None:
            rest = Counter(self.detached) - Counter(blocks)
            self.detached = list(rest.elements())

    @rule(blocks=st.lists(st.integers(0, 15), max_size=3) | st.just([-1]))
    def evict(self, blocks: list[int]) -> None:
        native, model = self.both("evict", (blocks,), (blocks,))
        assert native == model

    @rule()
    def reset(self) -> None:
        assert self.native.reset() == self.model.reset()

    @rule()
    def take_events(self) -> None:
        native = [
            (e.sequence_number, e.kind, e.block_hash, e.parent_hash, e.block_id, e.tokens)
            for e in self.native.take_events()
        ]
        assert native == self.model.take_events()

    @invariant()
    def same_state(self) -> None:
        if not hasattr(self, "native"):
            return
        native, model = self.native, self.model
        native.check()
        assert native.free_order() == model.free_list
        assert native.num_free_blocks == len(model.free_list)
        assert native.num_used_blocks == model.circulating - len(model.free_list)
        assert native.num_cached_blocks == len(model.cached)
        assert native.num_sequences == len(model.sequences)
        for block in range(model.first_block, native.num_blocks):
            assert native.reference_count(block) == model.references(block)
            assert native.block_hash(block) == model.hash_of(block)
        for native_id, model_id in self.live:
            s = model.sequences[model_id]
            assert native.block_ids(native_id) == s.table
            assert native.block_table(native_id).numpy().tolist() == s.table
            assert native.num_tokens(native_id) == s.num_tokens
            assert native.num_published_blocks(native_id) == s.num_published
            assert native.num_cached_tokens(native_id) == s.num_cached_tokens
        stats = native.stats()
        for name in ("num_queries", "num_queried_tokens", "num_hit_tokens", "num_hits", "num_failed"):
            assert getattr(stats, name) == model.counters[name], name
        assert stats.num_allocated_blocks == model.counters["num_allocated_blocks"]
        assert stats.num_evicted_blocks == model.counters["num_evicted_blocks"]

    @invariant()
    def every_block_is_free_or_referenced_and_none_is_lost(self) -> None:
        """The model's own soundness: an error shared by both would show here."""
        if not hasattr(self, "native"):
            return
        free = self.model.free_list
        assert len(set(free)) == len(free)
        for block in range(self.model.first_block, self.model.num_blocks):
            assert (block in free) == (self.model.references(block) == 0)
        cached = [b for _, b in self.model.cached]
        assert len(set(cached)) == len(cached)
        for block_hash, block in self.model.cached:
            assert (block_hash, block) in self.model.cached
            assert self.native.match_hashes([block_hash]) == [self.model.find(block_hash)]


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_native_manager_follows_the_model() -> None:
    run_state_machine_as_test(
        BlockManagers, settings=settings(max_examples=150, stateful_step_count=50, **COMMON)
    )


@pytest.mark.slow
def test_native_manager_follows_the_model_for_long() -> None:
    run_state_machine_as_test(
        BlockManagers, settings=settings(max_examples=400, stateful_step_count=120, **COMMON)
    )
