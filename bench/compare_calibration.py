"""How often `twinjet compare` is wrong: planted differences between two fake engines on a simulated clock.

    PYTHONPATH=python:. python bench/compare_calibration.py run RESULTS [--seeds 0,200] [--loop open] [--limit SECONDS]
    PYTHONPATH=python:. python bench/compare_calibration.py table RESULTS.. [--plots FOLDER]

The machine of the simulation drifts by 10% (time constant 20 s) and each step jitters by 15%. A verdict is false where
it names a faster side though the sides are equal, or the wrong side. `run` appends one line of JSON a repeat and
leaves out those that RESULTS has already, so it can be stopped and started at will, and shared out by seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.models.simulated_twins import compare_twins, verdict
from tests.models.virtual_time import run_virtual
from twinjet.compare.plots import Line, Plot
from twinjet.compare.workload import Load

PLANTED = (0.0, 0.02, 0.05)
LOOPS = {"closed": None, "open": Load("poisson", rate=8.0)}
_OUTCOMES = ("a_faster", "no_difference", "b_faster", "not_comparable")


@dataclass(frozen=True, slots=True)
class Repeat:
    """One comparison. ratio, low, high: B / A and its 95% interval; 0 without a verdict."""

    loop: str
    planted: float
    seed: int
    outcome: str
    ratio: float
    low: float
    high: float
    num_blocks: int

    @property
    def case(self) -> tuple[str, float]:
        return self.loop, self.planted


def repeat(loop: str, planted: float, seed: int) -> Repeat:
    """Run one comparison on a simulated clock."""
    load = LOOPS[loop]
    data = run_virtual(compare_twins(seed, planted, load=load))
    found = verdict(seed, data, "token_time" if load is None else "e2e")
    interval = found.interval
    numbers = (0.0, 0.0, 0.0) if interval is None else (interval.ratio, interval.low, interval.high)
    return Repeat(loop, planted, seed, found.outcome, *numbers, len(data.complete_blocks("main")))


def read(path: Path) -> list[Repeat]:
    """Give what was run before."""
    return [Repeat(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def run(path: Path, seeds: range, loops: Sequence[str], limit_s: float) -> None:
    """Run what is missing, seed by seed over all cases, until the limit is passed."""
    ends_at = time.monotonic() + limit_s
    done = {(*r.case, r.seed) for r in read(path)}
    missing = (
        (loop, planted, seed)
        for seed in seeds
        for loop in loops
        for planted in PLANTED
        if (loop, planted, seed) not in done
    )
    with path.open("a") as file:
        for case in missing:
            if time.monotonic() > ends_at:
                return
            print(json.dumps(asdict(repeat(*case))), file=file, flush=True)


def table(repeats: list[Repeat]) -> Iterator[str]:
    """Give the table of docs/compare.md, a line at a time."""
    yield "| loop | planted | repeats | A faster | no difference shown | B faster | not comparable | interval holds it | blocks |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for case in dict.fromkeys((loop, planted) for loop in LOOPS for planted in PLANTED):
        mine = [r for r in repeats if r.case == case]
        if not mine:
            continue
        counts = Counter(r.outcome for r in mine)
        judged = [r for r in mine if r.ratio]
        # A step that is slower by x makes a token of the closed loop cost as much more; in the open one a slower step
        # also takes up more arrivals, so there is no true ratio to hold the interval against.
        held = sum(r.low <= 1 + r.planted <= r.high for r in judged)
        coverage = (
            f"{100 * held / len(judged):.1f}%" if judged and (case[0] == "closed" or not case[1]) else ""
        )
        blocks = sum(r.num_blocks for r in mine) / len(mine)
        cells = " | ".join(str(counts[outcome]) for outcome in _OUTCOMES)
        yield f"| {case[0]} | {case[1]:.0%} | {len(mine)} | {cells} | {coverage} | {blocks:.0f} |"


def plots(repeats: list[Repeat]) -> Iterator[tuple[str, str]]:
    """Give names and SVG texts: for each loop, how the found differences of all repeats lie about the planted ones."""
    colors = {0.0: "#57606a", 0.02: "#1f6feb", 0.05: "#d1242f"}
    for loop in LOOPS:
        lines = []
        for planted in PLANTED:
            found = sorted(100 * (r.ratio - 1) for r in repeats if r.case == (loop, planted) and r.ratio)
            shares = [(value, 100 * (i + 0.5) / len(found)) for i, value in enumerate(found)]
            lines.append(Line(shares, colors[planted], f"planted {planted:.0%}"))
        plot = Plot(f"{loop} loop: found differences", "B slower than A, %", "share of repeats, %", lines)
        yield f"compare-calibration-{loop}.svg", plot.svg()


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--seeds", default="0,200", metavar="FIRST,END")
    parser.add_argument("--loop", choices=tuple(LOOPS), help="only this one")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--plots", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.action == "run":
        first, end = map(int, arguments.seeds.split(","))
        loops = tuple(LOOPS) if arguments.loop is None else (arguments.loop,)
        run(arguments.results[0], range(first, end), loops, arguments.limit)
        return
    repeats = [repeat for path in arguments.results for repeat in read(path)]
    print("\n".join(table(repeats)))
    if arguments.plots is not None:
        for name, svg in plots(repeats):
            (arguments.plots / name).write_text(svg)


if __name__ == "__main__":
    main()
