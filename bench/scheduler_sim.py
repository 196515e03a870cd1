"""Discrete-event simulation: this scheduler in front of an engine beside first come first served into it.

The scheduler is the real one (twinjet.scheduler.core); the engine is a model with continuous batching, a
paged KV cache with prefix sharing (the real block manager), its own first-come-first-served queue, and
preemption of the latest request when a token finds no block. Both policies see the same trace.

Shape of the trace, from published statistics of production loads:
- arrivals of each client as a Gamma renewal process, bursty (coefficient of variation above 1) for the few
  large clients that make most of the load: ServeGen (arXiv 2505.09999); Gamma burstiness also BurstGPT
  (2401.17644);
- prompt lengths log-normal with a Pareto tail, output lengths exponential: ServeGen; medians near those of
  the Azure conversation trace of 2023 (1,020 prompt and 129 output tokens), described in Splitwise (ISCA
  2024);
- each client's requests begin with a system prompt of its own.

Engine speeds are parameters (about an 8B model on one large GPU), not measurements: read ratios, not
seconds.

    .venv/bin/python bench/scheduler_sim.py --requests 20000 --replicas 4
    .venv/bin/python bench/scheduler_sim.py --requests 1000000 --replicas 64 --loads 0.9 --out 0.9.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections import deque
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from twinjet._core import BlockManager
from twinjet.engines.base import Component, EngineInfo, KvCache, Limits
from twinjet.request import EngineRequest, Sampling, SamplingOverrides
from twinjet.scheduler import SchedulerSettings
from twinjet.scheduler.core import Scheduler
from twinjet.scheduler.entry import Entry

BLOCK_SIZE = 16
NUM_BLOCKS = 8_000
MAX_NUM_SEQS = 256
STEP_S = 0.008
STEP_PER_SEQUENCE_S = 0.00006
PREFILL_PER_TOKEN_S = 0.00006
CHUNK = 8
MAX_PROMPT = 16_000
MAX_OUTPUT = 2048
NUM_TENANTS = 24
TTFT_SLO_S = 2.0
TPOT_SLO_S = 0.1


@dataclass
class Arrival:
    at: float
    tenant: int
    prompt: int
    output: int


@dataclass
class Job:
    """One request on its way: what the clock said, and what it still needs."""

    number: int
    arrival: Arrival
    tokens: tuple[int, ...]
    entry: Entry | None = None
    sequence: int = -1
    done: int = 0
    first_at: float = -1.0
    end_at: float = -1.0
    preemptions: int = 0


def make_trace(count: int, load: float, seed: int) -> list[Arrival]:
    """A trace for one replica; load: share of the model's capacity that the mean rate asks for."""
    rng = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, NUM_TENANTS + 1) ** 1.2
    shares /= shares.sum()
    mean_prompt, mean_output = 1350.0, 200.0
    # Seconds of engine time that a mean request takes at a full batch.
    batch = min(MAX_NUM_SEQS, NUM_BLOCKS * BLOCK_SIZE / (mean_prompt + mean_output / 2))
    full_step = STEP_S + STEP_PER_SEQUENCE_S * batch
    seconds = mean_prompt * PREFILL_PER_TOKEN_S + mean_output * full_step / batch
    rate = load / seconds
    arrivals: list[Arrival] = []
    for tenant, share in enumerate(shares):
        number = max(1, round(count * share))
        cv = 4.0 if tenant < 3 else 1.2
        shape = 1.0 / cv**2
        gaps = rng.gamma(shape, 1.0 / (rate * share * shape), number)
        times = np.cumsum(gaps)
        body = rng.lognormal(math.log(800), 0.8, number)
        tail = 2000 * (1 + rng.pareto(2.2, number))
        prompts = np.clip(np.where(rng.random(number) < 0.08, tail, body), 16, MAX_PROMPT).astype(int)
        outputs = np.clip(rng.exponential(mean_output, number), 1, MAX_OUTPUT).astype(int)
        arrivals += [
            Arrival(float(t), tenant, int(p), int(o)) for t, p, o in zip(times, prompts, outputs, strict=True)
        ]
    arrivals.sort(key=lambda a: a.at)
    return arrivals[:count]


class Engine:
    """Continuous batching with a first-come-first-served queue of its own and preemption by recompute."""

    def __init__(self) -> None:
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, algorithm="siphash", watermark=0.01)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.preemptions = 0
        self.busy_s = 0.0

    def admit(self) -> float:
        """Take jobs in while slots and blocks last; the seconds their prefill costs."""
        seconds = 0.0
        while self.waiting and len(self.running) < MAX_NUM_SEQS:
            job = self.waiting[0]
            sequence = self.manager.allocate(job.tokens + (7,) * job.done, use_watermark=True)
            if sequence is None:
                break
            self.waiting.popleft()
            job.sequence = sequence
            computed = len(job.tokens) + job.done - self.manager.num_cached_tokens(sequence)
            seconds += computed * PREFILL_PER_TOKEN_S
            self.running.append(job)
        return seconds

    def decode(self, steps: int) -> list[tuple[Job, int]]:
        """Give each running job up to `steps` tokens; preempts the latest where blocks run out."""
        given: list[tuple[Job, int]] = []
        i = 0
        while i < len(self.running):
            job = self.running[i]
            count = min(steps, job.arrival.output - job.done)
            fits = count == 0 or self.manager.append(job.sequence, (7,) * count) is not None
            while not fits and len(self.running) > i + 1:
                self.preempt(self.running.pop())
                fits = self.manager.append(job.sequence, (7,) * count) is not None
            if not fits:
                self.preempt(self.running.pop())
                break
            job.done += count
            given.append((job, count))
            i += 1
        return given

    def preempt(self, job: Job) -> None:
        self.manager.free(job.sequence)
        job.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(job)

    def finish(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.manager.free(job.sequence)
        gone = {job.number for job in jobs}
        self.running = [job for job in self.running if job.number not in gone]


class Replica:
    """One deployment under one policy."""

    def __init__(self, policy: str, trace: list[Arrival], seed: int) -> None:
        self.policy = policy
        self.trace = trace
        self.engine = Engine()
        self.core = Scheduler(SchedulerSettings(max_waiting=0, max_waiting_tokens=0, max_waiting_bytes=0))
        self.core.attach(INFO)
        self.rng = np.random.default_rng(seed + 1)
        self.prefixes = [
            tuple(range(10**6 * t, 10**6 * t + int(self.rng.integers(64, 800)))) for t in range(NUM_TENANTS)
        ]
        self.jobs: dict[str, Job] = {}
        self.decision_s = 0.0

    def make_job(self, number: int, arrival: Arrival) -> Job:
        prefix = self.prefixes[arrival.tenant][: max(0, arrival.prompt - 16)]
        start = 10**8 + (number * 20_000) % 10**9
        return Job(number, arrival, prefix + tuple(range(start, start + arrival.prompt - len(prefix))))

    def run(self) -> list[Job]:
        now, i, finished = 0.0, 0, []
        trace, engine, fair = self.trace, self.engine, self.policy == "fair"
        while i < len(trace) or self.jobs:
            if not self.jobs and i < len(trace):
                now = max(now, trace[i].at)
            while i < len(trace) and trace[i].at <= now:
                self.arrive(self.make_job(i, trace[i]), fair)
                i += 1
            if fair:
                self.dispatch(now)
            prefill_s = engine.admit()
            steps = CHUNK
            duration = prefill_s + steps * (STEP_S + STEP_PER_SEQUENCE_S * len(engine.running))
            given = engine.decode(steps)
            first_at = now + prefill_s + STEP_S
            now += duration
            ended = []
            for job, count in given:
                if job.first_at < 0 and count:
                    job.first_at = first_at
                if fair and count and job.entry is not None:
                    if job.done == count:
                        self.core.prompt_done(job.entry)
                    self.core.add_tokens(job.entry, 0, (7,) * count, now)
                if job.done >= job.arrival.output:
                    job.end_at = now
                    ended.append(job)
            engine.finish(ended)
            for job in ended:
                key = f"r{job.number}"
                del self.jobs[key]
                if job.entry is not None:
                    self.core.release(job.entry, now, finished=True)
                job.entry, job.tokens = None, ()
            finished += ended
        self.end = now
        return finished

    def arrive(self, job: Job, fair: bool) -> None:
        key = f"r{job.number}"
        self.jobs[key] = job
        if not fair:
            self.engine.waiting.append(job)
            return
        request = EngineRequest(
            request_id=key, prompt_token_ids=job.tokens, sampling=SAMPLING, tenant=str(job.arrival.tenant)
        )
        start = time.thread_time()
        job.entry = self.core.offer(request, job.arrival.at)
        self.decision_s += time.thread_time() - start

    def dispatch(self, now: float) -> None:
        start = time.thread_time()
        while (entry := self.core.take(now)) is not None:
            self.engine.waiting.append(self.jobs[entry.request.request_id])
        self.decision_s += time.thread_time() - start


SAMPLING = Sampling(
    temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, frequency_penalty=0.0,
    presence_penalty=0.0, logit_bias=MappingProxyType({}), seed=0, n=1, max_tokens=MAX_OUTPUT, min_tokens=0,
    stop=(), stop_token_ids=(), include_stop=False, ignore_eos=False, bad_words=(), allowed_token_ids=(),
    logprobs=None, prompt_logprobs=None, skip_special_tokens=True, constraint=None,
)  # fmt: skip
INFO = EngineInfo(
    name="fake", version="0", device="model", source="",
    limits=Limits(MAX_PROMPT + MAX_OUTPUT, 2**31 - 1, 1, 0, MAX_NUM_SEQS),
    capabilities=frozenset({"generate", "prefix_cache"}), default_sampling=SamplingOverrides(),
    eos_token_ids=(0,), sampler=Component("engine"), block_manager=Component("engine"),
    kv_cache=KvCache(NUM_BLOCKS, BLOCK_SIZE),
)  # fmt: skip


def simulate(task: tuple[str, int, float, int]) -> dict[str, Any]:
    """One replica under one policy; plain arrays, so that it may run in another process."""
    policy, count, load, seed = task
    trace = make_trace(count, load, seed)
    replica = Replica(policy, trace, seed)
    jobs = replica.run()
    return {
        "policy": policy,
        "tenant": np.array([j.arrival.tenant for j in jobs]),
        "ttft": np.array([j.first_at - j.arrival.at for j in jobs]),
        "tpot": np.array([(j.end_at - j.first_at) / max(1, j.arrival.output - 1) for j in jobs]),
        "output": np.array([j.arrival.output for j in jobs]),
        "preemptions": replica.engine.preemptions,
        "end": replica.end,
        "overflows": replica.core.load(0.0).kv_overflows,
        "decision_s": replica.decision_s,
    }


def summarize(parts: list[dict[str, Any]]) -> dict[str, float]:
    ttft = np.concatenate([p["ttft"] for p in parts])
    tpot = np.concatenate([p["tpot"] for p in parts])
    tenant = np.concatenate([p["tenant"] for p in parts])
    met = (ttft <= TTFT_SLO_S) & (tpot <= TPOT_SLO_S)
    seconds = sum(p["end"] for p in parts) / len(parts)
    attained = np.array([met[tenant == t].mean() for t in np.unique(tenant)])
    light = tenant >= 3
    return {
        "requests": len(ttft),
        "ttft_p50_s": float(np.percentile(ttft, 50)),
        "ttft_p99_s": float(np.percentile(ttft, 99)),
        "light_tenants_ttft_p99_s": float(np.percentile(ttft[light], 99)),
        "tpot_p99_s": float(np.percentile(tpot, 99)),
        "goodput_per_replica_s": float(met.sum() / len(parts) / seconds),
        "slo_attained": float(met.mean()),
        "fairness_jain": float(attained.sum() ** 2 / (len(attained) * (attained**2).sum() + 1e-12)),
        "worst_tenant_slo": float(attained.min()),
        "preemptions_per_1000": 1000 * sum(p["preemptions"] for p in parts) / len(ttft),
        "output_tokens_per_s": float(sum(p["output"].sum() / p["end"] for p in parts) / len(parts)),
        "decision_us_per_request": 1e6 * sum(p["decision_s"] for p in parts) / len(ttft),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000, help="in all, spread over the replicas")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 0.9, 1.1])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", help="JSON")
    parser.add_argument("--plot", help="SVG; needs matplotlib")
    parser.add_argument("--from-json", nargs="+", help="draw --plot from earlier --out files; no simulation")
    args = parser.parse_args()
    if args.from_json:
        plot([part for name in args.from_json for part in read_loads(name).items()], args.plot)
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for load in args.loads:
            count = args.requests // args.replicas
            tasks = [(p, count, load, args.seed + r) for r in range(args.replicas) for p in ("fair", "fcfs")]
            parts = pool.map(simulate, tasks, chunksize=1)
            row = {p: summarize([x for x in parts if x["policy"] == p]) for p in ("fair", "fcfs")}
            results[f"{load:g}"] = row
            for key in row["fair"]:
                fair, fcfs = row["fair"][key], row["fcfs"][key]
                print(f"load {load:<4g} {key:26} fair {fair:10.3f}   fcfs {fcfs:10.3f}", file=sys.stderr)
    summary = {
        "requests": args.requests,
        "replicas": args.replicas,
        "seed": args.seed,
        "wall_s": round(time.perf_counter() - started, 1),
        "loads": results,
    }
    if args.out:
        with open(args.out, "w") as file:
            json.dump(summary, file, indent=1)
            file.write("\n")
    else:
        print(json.dumps(summary, indent=1))
    if args.plot:
        plot(list(results.items()), args.plot)


def read_loads(path: str) -> dict[str, dict[str, dict[str, float]]]:
    with open(path) as file:
        loads: dict[str, dict[str, dict[str, float]]] = json.load(file)["loads"]
    return loads


def plot(results: list[tuple[str, dict[str, dict[str, float]]]], path: str) -> None:
    """Draw the light tenants' TTFT and the share of requests within the SLO, by load."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    results.sort(key=lambda item: float(item[0]))
    loads = [load for load, _ in results]
    x = np.arange(len(loads))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    for offset, policy, color in ((-0.2, "fair", "#1b6ca8"), (0.2, "fcfs", "#c1440e")):
        rows = [row[policy] for _, row in results]
        left.bar(x + offset, [r["light_tenants_ttft_p99_s"] for r in rows], 0.38, color=color, label=policy)
        right.bar(x + offset, [r["slo_attained"] * 100 for r in rows], 0.38, color=color, label=policy)
    left.set_ylabel("TTFT p99 of the 21 light tenants, s")
    right.set_ylabel(f"% of requests in SLO (TTFT {TTFT_SLO_S:g} s)")
    for axis in (left, right):
        axis.set_xticks(x, [f"load {k}" for k in loads])
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
