"""BlockManager by example, its block tables, and what it refuses."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from twinjet._core import BlockManager


def make(num_blocks: int = 16, block_size: int = 4, **options: Any) -> BlockManager:
    return BlockManager(num_blocks, block_size, **options)


def state_of(m: BlockManager) -> object:
    counters = m.stats()
    hashes = [m.block_hash(b) for b in range(m.num_blocks)]
    references = [m.reference_count(b) for b in range(m.num_blocks)]
    return (
        m.free_order(),
        hashes,
        references,
        m.num_sequences,
        counters.num_queries,
        counters.num_allocated_blocks,
    )


# --- Sharing and the cache -----------------------------------------------------------------------


def test_second_prompt_shares_the_first_ones_blocks_until_they_differ() -> None:
    m = make()
    a = m.allocate([1, 2, 3, 4, 5, 6, 7, 8, 9])
    b = m.allocate([1, 2, 3, 4, 5, 6, 0, 0, 0])
    assert m.block_ids(a) == [0, 1, 2]
    assert m.block_ids(b) == [0, 3, 4]
    assert m.num_cached_tokens(b) == 4
    assert m.stats().num_hit_tokens == 4


def test_match_holds_no_reference_and_leaves_the_last_token_to_compute() -> None:
    m = make()
    m.free(m.allocate(list(range(8))))
    assert m.match(list(range(8))).block_ids == [0]
    assert m.match(list(range(9))).block_ids == [0, 1]
    assert m.match(list(range(8)), max_tokens=8).num_tokens == 8
    assert m.num_used_blocks == 0


def test_salts_keep_tenants_apart() -> None:
    m = make()
    m.allocate(list(range(9)), salt=b"tenant a")
    assert m.match(list(range(9)), salt=b"tenant b").num_tokens == 0
    assert m.match(list(range(9)), salt=b"tenant a").num_tokens == 8


def test_decoded_blocks_are_found_too() -> None:
    m = make()
    a = m.allocate([1, 2])
    assert m.append(a, [3, 4, 5]) == (1,)
    assert [m.append_one(a, t) for t in (6, 7, 8, 9)] == [-1, -1, -1, 2]
    assert m.match([1, 2, 3, 4, 5, 6, 7, 8, 9]).block_ids == [0, 1]


def test_publish_waits_until_told() -> None:
    m = make()
    a = m.allocate(list(range(12)), publish=False)
    assert m.match(list(range(12))).num_tokens == 0
    assert m.publish(a, 7) == 1
    assert m.publish(a, 7) == 0
    assert m.match(list(range(12))).num_tokens == 4


def test_heads_outlive_tails_under_pressure() -> None:
    m = make(num_blocks=4)
    m.free(m.allocate(list(range(12))))
    m.free(m.allocate([99] * 4))  # takes the never-used block, then publishes it
    m.free(m.allocate([98] * 4))  # the tail of the first prompt goes
    assert m.match(list(range(13))).num_tokens == 8


def test_hits_are_exact_whether_or_not_hashes_are_passed_on() -> None:
    m = make()
    m.free(m.allocate(list(range(9))))
    match = m.match(list(range(9)))
    a = m.allocate(list(range(9)), hashes=match.hashes)
    assert m.num_cached_tokens(a) == match.num_tokens == 8


def test_engine_that_keeps_its_own_hashes() -> None:
    m = make(null_block=True)
    hashes = [bytes([i]) * 32 for i in range(3)]
    a = m.open()
    assert m.reserve(a, 10, 10, hashes) == (1, 2, 3)
    assert m.num_published_blocks(a) == 2
    assert m.block_hash(1) == hashes[0][:16]
    m.free(a)
    matched = m.match_hashes(hashes, 2)
    assert matched == [1, 2]
    assert m.count_free(matched) == 2
    b = m.open()
    assert m.reserve(b, 9, 9, hashes, matched) == (3,)
    assert m.reserve(b, 12) == ()
    assert m.match_hashes(b"".join(h[:16] for h in hashes)) == [1, 2]


def test_event_log_tells_routers_what_the_cache_holds() -> None:
    m = make(num_blocks=2, max_events=8)
    a = m.allocate(list(range(8)))
    stored = m.take_events()
    assert [(e.kind, e.block_id, e.tokens) for e in stored] == [
        ("stored", 0, [0, 1, 2, 3]),
        ("stored", 1, [4, 5, 6, 7]),
    ]
    assert stored[0].parent_hash == b""
    assert stored[1].parent_hash == stored[0].block_hash == m.block_hash(0)
    m.free(a)
    m.free(m.allocate([5]))
    assert m.reset()
    removed, cleared = m.take_events()
    assert (removed.kind, removed.block_hash) == ("removed", stored[1].block_hash)
    assert (cleared.kind, cleared.block_id, cleared.block_hash) == ("cleared", -1, b"")
    assert [e.sequence_number for e in (*stored, removed, cleared)] == [0, 1, 2, 3]


def test_event_log_is_bounded() -> None:
    m = make(num_blocks=64, max_events=3)
    m.allocate(list(range(40)))
    assert [e.sequence_number for e in m.take_events()] == [7, 8, 9]
    assert m.stats().num_dropped_events == 7


def test_cache_switched_off_finds_nothing() -> None:
    m = make(prefix_cache=False)
    a = m.allocate(list(range(8)))
    m.append(a, [1] * 8)
    assert m.match(list(range(8))).num_tokens == 0
    assert m.publish(a, 8) == 0
    assert m.num_cached_blocks == 0


# --- Forks, batches, headroom --------------------------------------------------------------------


def test_fork_returns_the_copies_to_make() -> None:
    m = make()
    a = m.allocate([1, 2, 3, 4, 5])
    b, copies = m.fork(a)
    assert copies == [(1, 2)]
    c, copies = m.fork(m.allocate([7] * 4))
    assert copies == []
    for sequence in (a, b, c):
        m.free(sequence)
    assert m.append_batch([]).tolist() == []


def test_fork_without_room_changes_nothing() -> None:
    m = make(num_blocks=2)
    a = m.allocate([1] * 5)
    before = m.free_order()
    assert m.fork(a) is None
    assert (m.free_order(), m.num_sequences) == (before, 1)


def test_batch_appends_to_all_or_none() -> None:
    m = make(num_blocks=4)
    rows = [m.allocate([i] * 4) for i in range(3)]
    assert m.append_batch(np.array(rows), np.array([1, 2, 3], dtype=np.int32)) is None
    assert [m.num_tokens(r) for r in rows] == [4, 4, 4]
    assert m.append_batch(rows[:1], [1]).tolist() == [3]
    assert m.append_batch(rows[:1], [1]).tolist() == [-1]


def test_unknown_tokens_end_publishing() -> None:
    m = make()
    a = m.allocate([1, 2, 3])
    assert m.append_count(a, 6) == (1, 2)
    assert m.append(a, [4] * 8) == (3, 4)
    assert m.num_cached_blocks == 0
    assert m.append_batch([a]).dtype == np.int32
    assert m.num_tokens(a) == 18


def test_watermark_and_reserved_blocks_stay_free() -> None:
    m = make(num_blocks=10, watermark=0.25)
    assert m.watermark_blocks == 2
    assert m.allocate([1] * 36, use_watermark=True) is None
    assert m.allocate([1] * 32, use_watermark=True, reserved_blocks=1) is None
    assert m.allocate([1] * 32, use_watermark=True) is not None
    assert m.stats().num_failed == 2


def test_lookahead_slots_are_used_first() -> None:
    m = make()
    a = m.allocate([1, 2, 3, 4], num_lookahead_tokens=2)
    assert m.block_ids(a) == [0, 1]
    assert m.append(a, [5, 6]) == ()


def test_usage_leaves_out_the_null_block() -> None:
    m = make(num_blocks=5, null_block=True)
    assert m.null_block_id == 0
    assert m.usage == 0.0
    m.allocate([1] * 16)
    assert m.usage == 1.0
    assert m.num_free_blocks == 0


# --- Block tables --------------------------------------------------------------------------------


def test_table_is_read_without_a_copy() -> None:
    m = make()
    a = m.allocate([1] * 9)
    table = m.block_table(a)
    view = table.numpy()
    assert view.dtype == np.int32
    assert np.shares_memory(view, np.asarray(table))
    assert np.shares_memory(view, np.frombuffer(memoryview(table), dtype=np.int32))
    assert list(table) == view.tolist() == memoryview(table).tolist() == [0, 1, 2]
    assert (len(table), table[-1], table.sequence) == (3, 2, a)
    with pytest.raises(IndexError):
        table[3]


def test_views_are_read_only() -> None:
    m = make()
    table = m.block_table(m.allocate([1]))
    with pytest.raises(ValueError, match="read-only"):
        table.numpy()[0] = 5
    assert memoryview(table).readonly
    assert not np.asarray(table).flags.writeable


def test_table_used_after_free_raises() -> None:
    m = make()
    a = m.allocate([1])
    table = m.block_table(a)
    m.free(a)
    m.allocate([2])  # takes the slot of a
    uses: list[Callable[[], object]] = [
        lambda: len(table),
        lambda: table[0],
        lambda: list(table),
        table.numpy,
        lambda: memoryview(table),
        lambda: np.asarray(table),
        lambda: m.block_table(a),
    ]
    for use in uses:
        with pytest.raises(KeyError):
            use()


def test_view_taken_before_free_stays_as_it_was() -> None:
    m = make(num_blocks=64)
    a = m.allocate([1] * 16)
    view, raw = m.block_table(a).numpy(), memoryview(m.block_table(a))
    before = view.tolist()
    m.free(a)
    others = [m.allocate([i] * 20) for i in range(2, 8)]
    assert view.tolist() == raw.tolist() == before
    del m, others
    gc.collect()
    assert view.tolist() == raw.tolist() == before


def test_view_taken_before_growth_stays_as_it_was() -> None:
    m = make(num_blocks=512)
    a = m.allocate([1])
    view = m.block_table(a).numpy()
    m.append(a, [1] * 1999)
    assert view.tolist() == [0]
    assert len(m.block_table(a)) == 500


def test_table_keeps_its_manager_alive() -> None:
    m = make()
    table = m.block_table(m.allocate([1]))
    del m
    gc.collect()
    assert list(table) == [0]


def test_empty_table() -> None:
    m = make()
    table = m.block_table(m.open())
    assert table.numpy().shape == (0,)
    assert memoryview(table).tolist() == []


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 0},
        {"num_blocks": -1},
        {"num_blocks": 2**31},
        {"num_blocks": 1, "null_block": True},
        {"block_size": 0},
        {"block_size": 12},
        {"block_size": -16},
        {"watermark": -0.1},
        {"watermark": 1.0},
        {"watermark": float("nan")},
        {"hash_key": b"1"},
        {"algorithm": "xxh3"},
        {"max_events": -1},
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        make(**options)


BAD_CALLS: list[tuple[str, type[Exception], Callable[[BlockManager, int], object]]] = [
    ("unknown sequence", KeyError, lambda m, s: m.free(s + 1)),
    ("negative sequence", KeyError, lambda m, s: m.append_one(-1, 1)),
    ("huge sequence", KeyError, lambda m, s: m.num_tokens(2**80)),
    ("sequence of a wrong type", TypeError, lambda m, s: m.free("1")),
    ("float sequence", TypeError, lambda m, s: m.append_one(1.0, 1)),
    ("no tokens", ValueError, lambda m, s: m.allocate([])),
    ("append of nothing", ValueError, lambda m, s: m.append(s, [])),
    ("zero count", ValueError, lambda m, s: m.append_count(s, 0)),
    ("negative count", ValueError, lambda m, s: m.append_count(s, -3)),
    ("count beyond 64 bits", ValueError, lambda m, s: m.append_count(s, 2**70)),
    ("count that overflows a sum", ValueError, lambda m, s: m.append_count(s, 2**63 - 1)),
    ("more blocks than exist", ValueError, lambda m, s: m.allocate([1] * 65)),
    ("look-ahead past the pool", ValueError, lambda m, s: m.allocate([1], num_lookahead_tokens=2**62)),
    ("append past the pool", ValueError, lambda m, s: m.append(s, [1] * 64)),
    ("negative look-ahead", ValueError, lambda m, s: m.allocate([1], num_lookahead_tokens=-1)),
    ("negative reservation", ValueError, lambda m, s: m.allocate([1], reserved_blocks=-1)),
    ("token below range", ValueError, lambda m, s: m.append_one(s, -1)),
    ("token above range", ValueError, lambda m, s: m.append(s, [2**31])),
    ("token of a wrong type", TypeError, lambda m, s: m.append_one(s, "x")),
    ("hashes of other tokens", ValueError, lambda m, s: m.allocate([1] * 9, hashes=b"\0" * 16)),
    ("ragged hashes", ValueError, lambda m, s: m.match_hashes(b"123")),
    ("short hash", ValueError, lambda m, s: m.match_hashes([b"123"])),
    ("hash of a wrong type", TypeError, lambda m, s: m.match_hashes([7])),
    ("hashes of a wrong type", TypeError, lambda m, s: m.match_hashes(7)),
    ("negative limit", ValueError, lambda m, s: m.match_hashes([], -2)),
    ("sequence twice in a batch", ValueError, lambda m, s: m.append_batch([s, s], [1, 1])),
    ("unknown in a batch", KeyError, lambda m, s: m.append_batch([s, 77], [1, 1])),
    ("batch of two lengths", ValueError, lambda m, s: m.append_batch([s], [1, 1])),
    ("batch of a wrong type", TypeError, lambda m, s: m.append_batch("ab")),
    ("publish past the end", ValueError, lambda m, s: m.publish(s, 99)),
    ("negative publish", ValueError, lambda m, s: m.publish(s, -1)),
    ("own hashes for hashed tokens", ValueError, lambda m, s: m.publish_hashes(s, 4, [b"0" * 16])),
    ("negative reserve", ValueError, lambda m, s: m.reserve(s, -1)),
    ("matched blocks for a sequence with blocks", ValueError, lambda m, s: m.reserve(s, 8, 0, None, [0])),
    ("fork of nothing", KeyError, lambda m, s: m.fork(99)),
    ("detach of nothing", KeyError, lambda m, s: m.detach(99)),
    ("block not detached", ValueError, lambda m, s: m.free_blocks([0])),
    ("block out of range", ValueError, lambda m, s: m.free_blocks([16])),
    ("evict out of range", ValueError, lambda m, s: m.evict([2**40])),
    ("evict below range", ValueError, lambda m, s: m.evict([-1])),
    ("reference count out of range", ValueError, lambda m, s: m.reference_count(16)),
    ("table of nothing", KeyError, lambda m, s: m.block_table(99)),
    ("too few arguments", TypeError, lambda m, s: m.append_one(s)),
    ("too many arguments", TypeError, lambda m, s: m.free(s, s)),
    ("keyword to a positional call", TypeError, lambda m, s: m.free(sequence=s)),
]


@pytest.mark.parametrize(("error", "call"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_bad_calls_raise_and_change_nothing(
    error: type[Exception], call: Callable[[BlockManager, int], object]
) -> None:
    m = make()
    s = m.allocate([1, 2, 3, 4, 5])
    before = state_of(m)
    with pytest.raises(error):
        call(m, s)
    assert state_of(m) == before
    m.check()
    assert m.append_one(s, 6) == -1


def test_double_free_raises_even_when_the_slot_is_taken_again() -> None:
    m = make()
    a = m.allocate([1])
    m.free(a)
    b = m.allocate([2])
    with pytest.raises(KeyError, match="unknown or freed sequence"):
        m.free(a)
    assert m.block_ids(b) == [0]


def test_stale_match_is_refused() -> None:
    m = make()
    hashes = [b"h" * 16]
    a = m.open()
    m.reserve(a, 4, 4, hashes)
    matched = m.match_hashes(hashes)
    m.evict(matched)
    b = m.open()
    with pytest.raises(ValueError, match="no longer cached"):
        m.reserve(b, 8, 0, None, matched)
    with pytest.raises(ValueError, match="fewer hashes"):
        m.reserve(b, 8, 8, hashes)
    assert m.block_ids(b) == []


def test_reserve_that_could_never_fit_is_none_not_an_error() -> None:
    m = make(num_blocks=2)
    assert m.reserve(m.open(), 100) is None


def test_reset_refuses_while_blocks_are_in_use() -> None:
    m = make()
    a = m.allocate([1] * 4)
    assert not m.reset()
    assert m.num_cached_blocks == 1
    m.free(a)
    assert m.reset()
    assert m.num_cached_blocks == 0


def test_subclass_without_init_raises() -> None:
    class Broken(BlockManager):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError):
        Broken().open()


def test_methods_refuse_other_objects() -> None:
    with pytest.raises(TypeError):
        BlockManager.free(object(), 1)


def test_steady_state_does_not_grow() -> None:
    m = make(num_blocks=256, max_events=64)

    def churn() -> int:
        for i in range(200):
            rows = [m.allocate([i, j] * 8) for j in range(8)]
            for t in range(16):
                m.append_batch(rows, [t] * 8)
            for row in rows:
                m.free(row)
        return m.memory_bytes

    assert churn() == churn()
