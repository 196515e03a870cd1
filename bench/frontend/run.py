"""What a front end costs, measured behind a mock of vLLM's engine core: `make bench-frontend`.

Starts each front end (front_ends.py) with a mock of its own, then runs the cells in turn, so that noise of the
machine meets all of them; prints medians and writes JSON, which table.py puts into docs/frontend.md. CPU is what
the kernel's scheduler counted for the front end's processes (schedstat of every thread), without the mock and
without the client.

Cells:
  lockstep  the next token of all streams comes when the client has the last one: CPU a token, one a message
  each      the same with a connection a stream
  free      the engine never waits: CPU a token and tokens a second, with the merging that comes of it
  starts    streams of one token, so many at a time: CPU a request and new streams a second
  paced     a token every 20 ms in every stream, the first at once; evenly spaced arrivals at half the rate that
            keeps so many streams open; a probe, a client of its own that asks 47 times a second, tells TTFT, what
            the front end added to it (load.cc: added), and gaps
  memory    all streams open and silent: bytes a stream
  burst     so many calls at once, 4 tokens each: how each ends, and how long those that are refused wait for it

    python bench/frontend/run.py --rows twinjet,rs_grpc --streams 1,32,256 --rounds 3
    python bench/frontend/run.py --campaign --out build/bench/frontend.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from front_ends import ROOT, Bench, FrontEnd, started

PACE_S = 0.02
CELL_TIMEOUT_S = 45
PACED_S = 12
PROBE_PER_S = 47  # no multiple of a step: it meets all of its phases
PROBE_TOKENS = 16
PACED_TOKENS = {4096: 128}
TOKENS = {1: 256, 32: 256, 256: 256, 1024: 256, 4096: 128, 8192: 8}
REQUESTS_OF_STARTS = 20
SHOWN = {
    "lockstep": ("us_per_token", "tokens_per_message"), "each": ("us_per_token", "tokens_per_message"),
    "free": ("us_per_token", "tokens_per_s", "tokens_per_message"), "starts": ("us_per_request", "requests_per_s"),
    "paced": ("ttft_ms", "added_ms", "up_ms", "down_ms", "late_ms", "parse_ms", "gap_ms", "us_per_token", "cores"), "memory": ("bytes_per_stream",),
    "burst": ("seconds", "ttft_ms", "refused_ms"),
}  # fmt: skip


class Cell(NamedTuple):
    """One cell, the rows that it is about, and in how many rounds of a campaign it is run."""

    mode: str
    streams: int
    fits: Callable[[str], bool]
    rounds: int


def _is_plain(row: str) -> bool:
    return not any(kind in row.split("_") for kind in ("tls", "limited"))


def _is_native(row: str) -> bool:
    """Whether the row's path of a token is native from end to end."""
    return _is_plain(row) and ("native" in row or row.startswith("rs_") or row == "smg_rs")


def _is_plain_or_tls(row: str) -> bool:
    return "limited" not in row.split("_")


def _is_limited(row: str) -> bool:
    return "limited" in row.split("_")


def _has_many(row: str) -> bool:
    """Rows that take up thousands of streams within a cell's time, with or without TLS."""
    return _is_plain_or_tls(row) and row != "openai"


CAMPAIGN_ROWS = (
    "twinjet", "twinjet_native", "rs_grpc", "rs_http", "smg_rs", "smg", "openai", "twinjet_tls",
    "twinjet_native_tls", "twinjet_limited", "twinjet_native_limited",
)  # fmt: skip
CAMPAIGN = (
    # First: afterwards an allocator has memory in hand that it would fill.
    Cell("memory", 8192, _has_many, 1),
    *(Cell("lockstep", n, _is_plain if n < 256 else _is_plain_or_tls, 3) for n in (1, 32, 256, 1024)),
    *(Cell("each", n, _is_plain, 3) for n in (32, 256)),
    Cell("each", 1024, _is_native, 3),
    *(Cell("free", n, _is_plain, 3) for n in (32, 256, 1024)),
    Cell("starts", 64, _is_plain_or_tls, 3),
    *(Cell("paced", n, _is_plain, 3) for n in (64, 256)),
    Cell("paced", 4096, _is_native, 2),
    *(Cell(mode, 8192, _is_plain, 1) for mode in ("lockstep", "free")),
    Cell("burst", 10_000, _is_limited, 3),
)


def run_cell(bench: Bench, end: FrontEnd, mode: str, streams: int, pace_s: float = PACE_S) -> dict[str, Any]:
    """Run one cell once. Raises RuntimeError if not every request ended as it should."""
    # At any pace so that streams last as long, and as many begin.
    num_paced = round(PACED_TOKENS.get(streams, PROBE_TOKENS) * PACE_S / pace_s)
    num_tokens = {"starts": 1, "burst": 4, "paced": num_paced}.get(mode)
    num_tokens = num_tokens or TOKENS.get(streams, 64)
    control = end.control
    control.put("received", 0)
    control.put("emitted", 0)
    control.put("lockstep", int(mode in ("lockstep", "each")))
    control.put("step_us", int(1e6 * pace_s) if mode == "paced" else 0)
    control.put("gather", streams if mode in ("lockstep", "each", "free") else 1)
    options: dict[str, Any] = {"timeout": CELL_TIMEOUT_S}
    if mode == "memory":
        return memory(bench, end, streams)
    if mode == "each":
        options["connections"] = streams
    if mode == "starts":
        options["requests"] = streams * REQUESTS_OF_STARTS
    before, mock_before = end.cpu_s(), end.mock_cpu_s()
    if mode == "paced":
        result = paced(bench, end, num_tokens, streams, pace_s)
    else:
        result = bench.load(end, num_tokens, streams, **options)
    cpu, mock_cpu = end.cpu_s() - before, end.mock_cpu_s() - mock_before
    if result["statuses"] != {"OK": result["requests"]} and mode != "burst":
        raise RuntimeError(f"{end.name}, {mode}, {streams} streams: {result}")
    return result | {
        "cpu_s": cpu,
        "cores": [seconds / result["seconds"] for seconds in (cpu, mock_cpu, result["client_cpu_s"])],
        "us_per_token": 1e6 * cpu / max(1, result["tokens"]),
        "us_per_request": 1e6 * cpu / max(1, result["done"]),
        "tokens_per_s": result["tokens"] / result["seconds"],
        "requests_per_s": result["done"] / result["seconds"],
        "tokens_per_message": result["tokens"] / max(1, result["messages"]),
    }


def paced(bench: Bench, end: FrontEnd, num_tokens: int, streams: int, pace_s: float) -> dict[str, Any]:
    """Keep half of the streams open on average, a few of which are a probe's; gives what the probe saw of times.

    "load" in the result: the times as the client saw them whose streams are the others.
    """
    rate = (streams / 2 / pace_s - PROBE_PER_S * PROBE_TOKENS) / num_tokens
    end.control.put("run", 0)
    options = {"timeout": CELL_TIMEOUT_S, "rate": rate, "requests": int(rate * PACED_S)}
    with bench.loading(end, num_tokens, streams, **options) as client:
        while not end.control.run and client.poll() is None:
            time.sleep(0.01)
        time.sleep(num_tokens * pace_s)  # then as many end as begin
        seconds = max(1.0, PACED_S - num_tokens * pace_s - 1)
        options |= {"rate": PROBE_PER_S, "requests": int(PROBE_PER_S * seconds), "connections": 1, "probe": 1}
        with bench.loading(end, PROBE_TOKENS, 4 * PROBE_TOKENS, **options) as prober:
            seen, error = prober.communicate()
        out, error = client.communicate()
    if client.returncode != 0:
        raise RuntimeError(f"the load client failed on {end.name}: {error.strip()}")
    load: dict[str, Any] = json.loads(out)
    probe: dict[str, Any] = json.loads(seen)
    both = {key: load[key] + probe[key] for key in ("requests", "done", "tokens", "messages", "client_cpu_s")}
    statuses = {status: load["statuses"].get(status, 0) + probe["statuses"].get(status, 0)
                for status in load["statuses"] | probe["statuses"]}  # fmt: skip
    return probe | both | {"seconds": load["seconds"], "statuses": statuses, "load": load}


def memory(bench: Bench, end: FrontEnd, streams: int) -> dict[str, Any]:
    """Hold streams open before their first token and see what they weigh."""
    end.control.put("gather", 1 << 40)
    start, before = end.control.num_requests, end.memory_bytes()
    with bench.loading(end, 2, streams, timeout=CELL_TIMEOUT_S) as client:
        deadline = time.monotonic() + CELL_TIMEOUT_S - 5
        while end.control.num_requests - start < streams and time.monotonic() < deadline:
            time.sleep(0.05)
        arrived = end.control.num_requests - start
        held = end.memory_bytes() - before
        end.control.put("gather", 1)
        out, _ = client.communicate()
    return {"streams_open": arrived, "bytes_per_stream": held / max(1, arrived), **json.loads(out)}


def summary(runs: list[dict[str, Any]], key: str) -> str:
    """Give the median, and the range where the figure is one number."""
    values = [run[key] for run in runs if key in run]
    if not values:
        return "failed"
    if isinstance(values[0], list):
        return " / ".join(f"{statistics.median(v[i] for v in values):.1f}" for i in range(len(values[0])))
    return f"{statistics.median(values):,.1f} [{min(values):,.1f}-{max(values):,.1f}]"


def turns(options: argparse.Namespace) -> Iterator[tuple[str, int, Callable[[str], bool]]]:
    """Give the cells to run, one round after the other."""
    cells: tuple[Cell, ...] = CAMPAIGN
    if not options.campaign:
        streams = [int(n) for n in options.streams.split(",")]
        modes = options.modes.split(",")
        cells = tuple(Cell(mode, n, lambda _: True, options.rounds) for mode in modes for n in streams)
    for number in range(max(cell.rounds for cell in cells)):
        yield from (cell[:3] for cell in cells if number < min(cell.rounds, options.rounds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=None, help="see front_ends.py; default: twinjet")
    parser.add_argument("--streams", default="1,32,256")
    parser.add_argument("--modes", default="lockstep,free,starts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--pace-ms", type=float, default=1e3 * PACE_S, help="time between a paced stream's tokens"
    )
    parser.add_argument("--campaign", action="store_true", help="all rows and cells of docs/frontend.md")
    parser.add_argument("--model", type=Path, default=None, help="folder; default: the demo model")
    parser.add_argument("--load", type=Path, default=ROOT / "build/bench/load")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--keep-logs", type=Path, default=None)
    options = parser.parse_args()
    rows = (
        options.rows.split(",") if options.rows else list(CAMPAIGN_ROWS if options.campaign else ["twinjet"])
    )
    model = options.model
    if model is None:
        from twinjet.models.demo import demo_model

        model = demo_model()
    runs: dict[str, list[dict[str, Any]]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-frontend-") as folder:
        bench = Bench(Path(folder), model, options.load)
        try:
            with started(bench, rows) as ends:
                resting = {end.name: end.memory_bytes() for end in ends}
                for mode, streams, fits in turns(options):
                    for end in ends:
                        if not fits(end.name):
                            continue
                        try:
                            result = run_cell(bench, end, mode, streams, options.pace_ms * 1e-3)
                        except RuntimeError as error:
                            result = {"error": str(error)}
                            print(error, file=sys.stderr, flush=True)
                        runs.setdefault(f"{end.name} {mode} {streams}", []).append(result)
                    print(f"{time.monotonic() - began:6.0f} s: {mode} {streams}", file=sys.stderr, flush=True)
        finally:
            if options.keep_logs is not None:
                options.keep_logs.mkdir(parents=True, exist_ok=True)
                for log in Path(folder).glob("*.log"):
                    shutil.copy(log, options.keep_logs)
    for name, found in runs.items():
        shown = ", ".join(f"{key} {summary(found, key)}" for key in SHOWN[name.split()[1]])
        print(f"{name}: {shown}")
    for name, size in resting.items():
        print(f"{name}: {size / 2**20:.0f} MiB")
    if options.out is not None:
        machine = {
            "cpu": _cpu(), "cores": os.cpu_count(), "load": os.getloadavg()[2], "at": time.strftime("%Y-%m-%d"),
            "rounds": options.rounds, "minutes": (time.monotonic() - began) / 60,
        }  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "memory": resting, "runs": runs}, indent=1))


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
