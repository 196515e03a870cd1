"""Raw speed of the block manager from Python: operations a second, cost of a call, bytes a block.

Rounds alternate between the cases; medians. "empty call" is what Python charges for any call of a C
function with one argument, for comparison.

    .venv/bin/python bench/kv_ops.py [--json FILE] [--rounds 9]
"""

import argparse
import json
import platform
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twinjet._core import BlockManager


class Case(NamedTuple):
    statement: Callable[[], object] | str
    number: int  # runs a round
    operations: int  # in one run
    names: dict[str, object] | None = None


def append_batch(tokens_known: bool) -> Case:
    manager = BlockManager(200_000, 16, null_block=True)
    start = list(range(100))
    rows = np.array([manager.allocate([i, *start]) for i in range(1024)], dtype=np.int64)
    tokens = np.arange(1024, dtype=np.int32) if tokens_known else None
    fresh = [0]

    def run() -> None:
        # Frees all rows now and then, so that the pool never runs dry.
        if manager.append_batch(rows, tokens) is None or fresh[0] == 2000:
            for i, row in enumerate(rows.tolist()):
                manager.free(row)
                rows[i] = manager.allocate([i, *start])
            fresh[0] = 0
        fresh[0] += 1

    return Case(run, 400, 1024)


def allocate_free(cached: bool) -> Case:
    manager = BlockManager(1024, 16)
    prompts = [np.arange(2048, dtype=np.int32) + (0 if cached else 5000 * i) for i in range(64)]
    state = {"i": 0}

    def run() -> None:
        state["i"] = (state["i"] + 1) % len(prompts)
        manager.free(manager.allocate(prompts[state["i"]]))

    return Case(run, 200, 1)


def reserve_free() -> Case:
    manager = BlockManager(1024, 16)

    def run() -> None:
        sequence = manager.open()
        manager.reserve(sequence, 2048)
        manager.free(sequence)

    return Case(run, 2000, 1)


def match_8192() -> Case:
    manager = BlockManager(8200, 16)
    tokens = np.arange(8192 * 16 + 1, dtype=np.int32)
    manager.free(manager.allocate(tokens))
    hashes = manager.match(tokens).hashes
    if len(manager.match_hashes(hashes)) != 8192:
        raise SystemExit("the match is not of 8,192 blocks")
    return Case(lambda: manager.match_hashes(hashes), 10, 1)


def call(statement: str, **names: object) -> Case:
    return Case(statement, 200_000, 1, names)


def cases() -> dict[str, Case]:
    manager = BlockManager(100_000, 16, null_block=True)
    sequence = manager.open()
    hashes = [bytes([i]) * 32 for i in range(32)]
    manager.reserve(sequence, 512, 512, hashes)
    own = manager.allocate([1, 2, 3])
    return {
        "append batch of 1,024, token ids known": append_batch(True),
        "append batch of 1,024, ids unknown": append_batch(False),
        "allocate + free, 128 blocks, int32, miss": allocate_free(False),
        "allocate + free, 128 blocks, int32, hit": allocate_free(True),
        "reserve + free, 128 blocks, no hashing": reserve_free(),
        "match of 8,192 blocks by hash": match_8192(),
        "call: reserve, no new block": call("m.reserve(s, 512, 512, h)", m=manager, s=sequence, h=hashes),
        "call: reserve, positional minimum": call("m.reserve(s, 512)", m=manager, s=sequence),
        "call: append_one": Case("m.append_one(s, 7)", 50_000, 1, {"m": manager, "s": own}),
        "call: num_tokens": call("m.num_tokens(s)", m=manager, s=sequence),
        "call: empty call (hash of an int)": call("f(1)", f=hash),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    timers = {name: (c, timeit.Timer(c.statement, globals=c.names or {})) for name, c in cases().items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(options.rounds):
        for name, (case, timer) in timers.items():
            samples[name].append(timer.timeit(case.number) / case.number / case.operations)
    ns = {name: statistics.median(values) * 1e9 for name, values in samples.items()}
    print(f"{'':44s}{'ns each':>12s}{'million/s':>12s}")
    for name, value in ns.items():
        print(f"{name:44s}{value:12.1f}{1e3 / value:12.3f}")
    memory = {n: BlockManager(n, 16).memory_bytes / n for n in (1_000, 32_768, 100_000, 1_000_000)}
    print("bytes a block: " + ", ".join(f"{b:.1f} at {n:,}" for n, b in memory.items()))
    print("seconds to make a pool of a million blocks:", end=" ")
    make = min(timeit.repeat(lambda: BlockManager(1_000_000, 16), number=1, repeat=3))
    print(f"{make:.4f}")
    if options.json:
        facts = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        report = {**facts, "ns": ns, "bytes_per_block": memory, "make_million_s": make}
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
