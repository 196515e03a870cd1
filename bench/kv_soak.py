"""Soak: 100 million token appends and the frees that go with them; memory must stay flat.

Rows of random length come and go in a pool under pressure, so blocks are evicted all the time. The
manager's invariants are checked at each report. Ends with 1 if memory grew after the first tenth.

    .venv/bin/python bench/kv_soak.py [--operations 100000000] [--json FILE]
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from twinjet._core import BlockManager


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    random = np.random.default_rng(1)
    manager = BlockManager(60_000, 16, max_events=1000)
    rows = np.array([manager.allocate([int(t)]) for t in random.integers(0, 4, 1024)], dtype=np.int64)
    ends = random.integers(50, 1500, rows.size)
    lengths = np.ones(rows.size, dtype=np.int64)
    appends = frees = 0
    reports = []
    start = time.perf_counter()
    report_every = options.operations // 20
    while appends + frees < options.operations:
        # Few distinct ids, so blocks recur and the cache fills with duplicates too.
        if manager.append_batch(rows, random.integers(0, 4, rows.size, dtype=np.int32)) is None:
            ends[np.argsort(lengths)[-64:]] = 0  # make room: end the longest
        else:
            appends += rows.size
            lengths += 1
        for i in np.flatnonzero(lengths >= ends).tolist():
            manager.free(int(rows[i]))
            frees += 1
            rows[i] = manager.allocate(random.integers(0, 2, int(random.integers(1, 64)), dtype=np.int32))
            lengths[i] = manager.num_tokens(int(rows[i]))
            ends[i] = lengths[i] + random.integers(50, 1500)
        if (appends + frees) // report_every > len(reports):
            manager.check()
            reports.append(
                {
                    "operations": appends + frees,
                    "seconds": round(time.perf_counter() - start, 1),
                    "manager_bytes": manager.memory_bytes,
                    "resident_bytes": resident_bytes(),
                    "evicted": manager.stats().num_evicted_blocks,
                    "refused": manager.stats().num_failed,
                }
            )
            print(json.dumps(reports[-1]), flush=True)
    settled = reports[len(reports) // 10]
    growth = reports[-1]["resident_bytes"] - settled["resident_bytes"]
    is_flat = growth < 4 * 2**20 and reports[-1]["manager_bytes"] < settled["manager_bytes"] * 1.05
    print(f"appends {appends:,}, frees {frees:,}")
    print(f"resident memory grew {growth / 2**20:.2f} MiB after the first tenth")
    if options.json:
        options.json.write_text(
            json.dumps({"appends": appends, "frees": frees, "reports": reports}, indent=2)
        )
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
