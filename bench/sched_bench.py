"""schedule() and update_from_output() of vLLM's scheduler, stock and native, in one process.

The schedulers run the same decodes, taking turns step by step, so that noise and frequency changes
meet all of them. Between turns a buffer larger than the last-level cache is swept unless the caches are
to be warm: a model's step would have evicted the scheduler's data as well. Times are medians over
steps, in microseconds of this thread's CPU time, so that other load on the machine does not count.
With arrivals, a request is added for each that ends; steps then differ, and times are means.
With --kv-events a fourth scheduler tells its KV events to a reader in a thread, which is all that it has more than
the third.

  .venv/bin/python bench/sched_bench.py --json sched_bench.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/engines/vllm"))

from scheduler_harness import Engine, Prompt, Setup, make_native, make_stock, stock_hasher

from twinjet.engines.vllm.kv_wire import ADDRESS_ENV

PROMPT_TOKENS = 512
BLOCK_SIZE = 16
EVENTS = "native, KV events"


class Turn:
    """One scheduler and its times."""

    def __init__(self, name: str, scheduler: Any, setup: Setup, hasher: Any) -> None:
        self.name = name
        self.engine = Engine(scheduler, setup, hasher)
        self.schedule_us: list[float] = []
        self.update_us: list[float] = []

    def step(self, sweep: Any) -> None:
        engine, scheduler = self.engine, self.engine.scheduler
        sweep()
        start = time.thread_time_ns()
        output = scheduler.schedule()
        self.schedule_us.append((time.thread_time_ns() - start) / 1e3)
        engine.queue.appendleft((output, engine.runner.run(output, set())))
        if len(engine.queue) < (2 if engine.setup.is_async else 1):
            return
        past, result = engine.queue.pop()
        sweep()
        start = time.thread_time_ns()
        scheduler.update_from_output(past, result)
        self.update_us.append((time.thread_time_ns() - start) / 1e3)

    def clear(self) -> None:
        self.schedule_us.clear()
        self.update_us.clear()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Have schedulers that are made meanwhile tell their KV events to a thread that throws them away."""
    listener = socket.socket(socket.AF_UNIX)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ADDRESS_ENV] = f"{folder}/events"
        listener.bind(os.environ[ADDRESS_ENV])
        listener.listen()

        def read() -> None:
            connection, _ = listener.accept()
            while connection.recv(1 << 20):
                pass

        threading.Thread(target=read, daemon=True).start()
        yield
        del os.environ[ADDRESS_ENV]


def make_turns(setup: Setup, events: bool) -> list[Turn]:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.engine import core

    turns = [Turn("stock", make_stock(setup), setup, stock_hasher(setup.block_size))]
    names = {"manager": "manager only", "on": "native"} | ({"on+": EVENTS} if events else {})
    for name, title in names.items():
        chosen = Setup(**{**setup.__dict__, "native": name.rstrip("+")})
        with listening() if title == EVENTS else contextlib.nullcontext():
            scheduler = make_native(chosen)
        hasher = core.get_request_block_hasher(setup.block_size, get_hash_fn_by_name("sha256"))
        turns.append(Turn(title, scheduler, chosen, hasher))
        status = scheduler.scheduler_status()
        if not status.block_manager.is_native or status.decode_path.is_native != (name != "manager"):
            raise SystemExit(f"the native path was not taken: {status}")
    return turns


def prompt(index: int, rng: np.random.Generator, max_tokens: int, arrivals: bool) -> Prompt:
    tokens = tuple(int(token) for token in rng.integers(3, 999, PROMPT_TOKENS))
    limit = int(rng.integers(max_tokens // 2, max_tokens)) if arrivals else max_tokens
    return Prompt(f"{index}#{index}", tokens, limit, ignore_eos=True)


def measure(
    num_running: int, is_async: bool, num_steps: int, cold: bool, arrivals: bool, events: bool
) -> dict[str, Any]:
    max_tokens = 64 if arrivals else num_steps + 64
    blocks = num_running * ((PROMPT_TOKENS + max_tokens) // BLOCK_SIZE + 2) + 64
    setup = Setup(
        is_async=is_async,
        num_blocks=blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_running,
        max_num_batched_tokens=8192,
        max_model_len=PROMPT_TOKENS + max_tokens + 16,
    )
    turns = make_turns(setup, events)
    rngs = [np.random.default_rng(7) for _ in turns]
    added = [0] * len(turns)

    def fill(i: int) -> None:
        engine = turns[i].engine
        while len(engine.scheduler.requests) < num_running:
            engine.add(prompt(added[i], rngs[i], max_tokens, arrivals), float(added[i]))
            added[i] += 1

    eviction = np.zeros(96 << 20, dtype=np.uint8)

    def sweep() -> None:
        if cold:
            eviction.sum()

    for i, turn in enumerate(turns):
        fill(i)
        for _ in range(num_running * PROMPT_TOKENS // setup.max_num_batched_tokens + 8):
            turn.step(lambda: None)
        turn.clear()
    gc.collect()
    gc.freeze()
    for step in range(num_steps):
        # Whoever follows its like finds the caches warm, so that all come after each in turn.
        for i in sorted(range(len(turns)), key=lambda i: (i + step) % len(turns), reverse=bool(step % 2)):
            if arrivals:
                fill(i)
            turns[i].step(sweep)
    gc.unfreeze()
    stock = turns[0]
    figure = np.sum if arrivals else np.median  # arrivals make steps differ: what counts is their sum
    row: dict[str, Any] = {
        "running": num_running,
        "async": is_async,
        "cold": cold,
        "arrivals": arrivals,
        "steps": num_steps,
        "figure": "mean" if arrivals else "median",
    }
    for turn in turns:
        entry: dict[str, float] = {}
        for name in ("schedule_us", "update_us"):
            mine = getattr(turn, name)
            base = getattr(stock, name)
            entry[name] = float(statistics.fmean(mine) if arrivals else statistics.median(mine))
            entry[name.replace("_us", "_ratio")] = float(figure(base) / figure(mine))
        both = [figure(t.schedule_us) + figure(t.update_us) for t in (stock, turn)]
        entry["sum_ratio"] = float(both[0] / both[1])
        # Rows of equal length fill their blocks in the same step, which a median does not see.
        entry["sum_mean_us"] = float(statistics.fmean(turn.schedule_us) + statistics.fmean(turn.update_us))
        row[turn.name] = entry
    row["counters"] = turns[-1].engine.scheduler.scheduler_status().counters
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| running | mode | caches | load | layer | schedule us | x | update us | x | sum x | mean sum us |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        for name in ("stock", "manager only", "native", EVENTS):
            if name not in row:
                continue
            entry = row[name]
            print(
                f"| {row['running']} | {'async' if row['async'] else 'sync'} "
                f"| {'cold' if row['cold'] else 'warm'} | {'arrivals' if row['arrivals'] else 'decodes'} "
                f"| {name} | {entry['schedule_us']:.0f} | {entry['schedule_ratio']:.1f} "
                f"| {entry['update_us']:.0f} | {entry['update_ratio']:.1f} | {entry['sum_ratio']:.1f} "
                f"| {entry['sum_mean_us']:.0f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--caches", choices=["cold", "warm", "both"], default="both")
    parser.add_argument("--load", choices=["decodes", "arrivals", "both"], default="both")
    parser.add_argument("--kv-events", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for num_running in options.running:
        for is_async in (False, True):
            for cold in (False, True):
                if options.caches != "both" and cold != (options.caches == "cold"):
                    continue
                for arrivals in (False, True):
                    if options.load != "both" and arrivals != (options.load == "arrivals"):
                        continue
                    rows.append(
                        measure(num_running, is_async, options.steps, cold, arrivals, options.kv_events)
                    )
                    print_table(rows[-1:])
    print()
    print_table(rows)
    if options.json:
        machine = {"machine": platform.machine(), "python": platform.python_version()}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
