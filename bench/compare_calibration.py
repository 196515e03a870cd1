"""How often `twinjet compare` is wrong: planted differences between two fake engines on a simulated clock.

PYTHONPATH=python:. python bench/compare_calibration.py [--repeats 200] [--json FILE]

The machine of the simulation drifts by 10% (time constant 20 s) and each step jitters by 15%. A verdict is false where
it names a faster side though the sides are equal, or the wrong side.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from tests.models.simulated_twins import compare_twins, outcome
from tests.models.virtual_time import run_virtual
from twinjet.compare.workload import Load

PLANTED = (0.0, 0.02, 0.05)


def main() -> None:
    """Run all repeats and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, dict[str, int]] = {}
    for kind, load in (("closed loop", None), ("open loop", Load("poisson", rate=8.0))):
        metric = "token_time" if load is None else "e2e"
        for planted in PLANTED:
            counts: Counter[str] = Counter()
            for seed in range(arguments.repeats):
                data = run_virtual(compare_twins(seed, planted, load=load))
                counts[outcome(seed, data, metric)] += 1  # type: ignore[arg-type]
            results[f"{kind}, {planted:.0%}"] = dict(counts)
            print(f"{kind}, planted {planted:.0%}: {dict(counts)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"repeats": arguments.repeats, "results": results}, indent=1))


if __name__ == "__main__":
    main()
