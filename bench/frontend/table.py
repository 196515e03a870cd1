"""Puts what run.py wrote into docs/frontend.md, between its two marks: `python bench/frontend/table.py RESULTS`.

Medians over the rounds. A cell that a row did not finish says so; one that a row was not asked is empty.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOC = Path(__file__).parents[2] / "docs/frontend.md"
BEGIN, END = "<!-- bench/frontend/table.py: begin -->", "<!-- end -->"
NAMES = {
    "twinjet": "Twinjet, gRPC's library", "twinjet_native": "Twinjet, native door", "rs_grpc": "vllm-rs, gRPC",
    "rs_http": "vllm-rs, HTTP", "smg_rs": "smg's servicer, Rust, no text", "smg": "smg's servicer, Python, no text",
    "openai": "vLLM's OpenAI server", "twinjet_tls": "Twinjet, gRPC's library, TLS",
    "twinjet_native_tls": "Twinjet, native door, TLS", "twinjet_limited": "gRPC's library",
    "twinjet_native_limited": "native door",
}  # fmt: skip

Column = tuple[str, str, Callable[[dict[str, Any]], float | None]]
"""Its title, the cell (mode and streams), and what of a run it shows."""


def figure(key: str, index: int | None = None, scale: float = 1) -> Callable[[dict[str, Any]], float | None]:
    def find(run: dict[str, Any]) -> float | None:
        value = run.get(key)
        if index is not None and value is not None:
            value = value[index]
        return None if value is None else value * scale

    return find


def _cpu(mode: str, streams: list[int]) -> list[Column]:
    return [(f"{n:,}", f"{mode} {n}", figure("us_per_token")) for n in streams]


TABLES: list[tuple[str, list[Column]]] = [
    (
        "One token a message, µs of CPU a token, by streams on 8 connections (1 on one), and with a connection a stream",
        [*_cpu("lockstep", [1, 32, 256, 1024, 8192]), *(
            (f"{n} conn.", f"each {n}", figure("us_per_token")) for n in (32, 256)
        )],
    ),
    (
        "An engine that never waits, with the merging that comes of it: µs of CPU a token, and tokens a second that arrived",
        [*_cpu("free", [32, 256, 1024, 8192]), *(
            (f"{n:,}, tokens/s", f"free {n}", figure("tokens_per_s")) for n in (32, 256, 1024)
        )],
    ),
    (
        "Requests of one token, 64 at a time, and 8,192 streams that are open and silent",
        [
            ("µs of CPU", "starts 64", figure("us_per_request")),
            ("new streams a second and core", "starts 64", lambda run: 1e6 / run["us_per_request"] if "us_per_request" in run else None),
            ("new streams a second", "starts 64", figure("requests_per_s")),
            ("KB an open stream", "memory 8192", figure("bytes_per_stream", scale=1e-3)),
        ],
    ),
    (
        "A token every 20 ms in each stream, the first at once; half of so many streams open on average: ms from call to "
        "first token, what of that the front end added, and between messages; as a probe among them saw it",
        [
            (f"{n:,}: {what} {share}", f"paced {n}", figure(key, index))
            for n in (64, 256, 4096)
            for what, key in (("first", "ttft_ms"), ("added", "added_ms"), ("gap", "gap_ms"))
            for index, share in enumerate(("p50", "p99"))
        ],
    ),
    (
        "10,000 calls at once, 4 tokens each, `max_streams` 1,000",
        [
            ("OK", "burst 10000", lambda run: run["statuses"].get("OK", 0) if "statuses" in run else None),
            ("RESOURCE_EXHAUSTED", "burst 10000", lambda run: run["statuses"].get("8", 0) if "statuses" in run else None),
            ("others, or without details", "burst 10000", lambda run: _strange(run)),
            ("all over after, s", "burst 10000", figure("seconds")),
            *((f"refused after, ms, {name}", "burst 10000", figure("refused_ms", i)) for i, name in enumerate(("p50", "p99", "most"))),
        ],
    ),
]  # fmt: skip


def _strange(run: dict[str, Any]) -> float | None:
    if "statuses" not in run:
        return None
    others = sum(count for status, count in run["statuses"].items() if status not in ("OK", "8"))
    return float(others + run["without_details"].get("8", 0))


def _show(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def table(results: dict[str, Any], columns: list[Column]) -> list[str]:
    """Make a table of the rows that have any of the columns' cells."""
    runs = results["runs"]
    lines = ["| | " + " | ".join(title for title, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, name in NAMES.items():
        if not any(f"{row} {cell}" in runs for _, cell, _ in columns):
            continue
        shown = []
        for _, cell, find in columns:
            found = runs.get(f"{row} {cell}")
            values = [value for run in found or () if (value := find(run)) is not None]
            shown.append(_show(statistics.median(values)) if values else "failed" if found else "")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def main() -> None:
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    machine = results["machine"]
    lines = [
        f"{machine['at']}, {machine['cores']} cores of {machine['cpu']}, load {machine['load']:.1f}, medians of up to "
        f"{machine['rounds']} interleaved rounds, "
        "all front ends' processes counted."
    ]
    for title, columns in TABLES:
        lines += ["", f"{title}:", "", *table(results, columns)]
    sizes = ", ".join(
        f"{NAMES[row]} {size / 2**20:.0f}" for row, size in results["memory"].items() if row in NAMES
    )
    lines += ["", f"Memory after the start, MiB: {sizes}."]
    before, _, rest = DOC.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{DOC} has no place for the tables: {BEGIN} ... {END}")
    DOC.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
