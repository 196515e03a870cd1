"""What the scheduler's decisions cost: per request and per token, at 1,000 queued and 256 running.

CPU time of the policy core alone, no engine and no event loop; medians over rounds. JSON to --out or
stdout.

    .venv/bin/python bench/scheduler_decision.py
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from types import MappingProxyType

from twinjet.engines.base import Component, EngineInfo, KvCache, Limits
from twinjet.request import EngineRequest, Sampling, SamplingOverrides
from twinjet.scheduler import SchedulerSettings
from twinjet.scheduler.core import Scheduler
from twinjet.scheduler.entry import Entry

NUM_QUEUED = 1000
NUM_RUNNING = 256
BLOCK_SIZE = 16
SHARED_PREFIX = 256


def make_request(number: int, *, tenants: int, named: bool, prompt: int, rng: random.Random) -> EngineRequest:
    """One of `tenants` tenants' or, unless named, of as many addresses that name none."""
    group = number % 8
    shared = range(group * SHARED_PREFIX, (group + 1) * SHARED_PREFIX)
    own = (rng.randrange(100_000) for _ in range(prompt - SHARED_PREFIX))
    return EngineRequest(
        request_id=f"r{number}",
        prompt_token_ids=(*shared, *own),
        tenant=f"t{number % tenants}" if named else "",
        client_address=f"ipv4:10.0.0.{number % tenants}",
        sampling=Sampling(
            temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, frequency_penalty=0.0,
            presence_penalty=0.0, logit_bias=MappingProxyType({}), seed=0, n=1, max_tokens=1024, min_tokens=0,
            stop=(), stop_token_ids=(), include_stop=False, ignore_eos=False, bad_words=(),
            allowed_token_ids=(), logprobs=None, prompt_logprobs=None, skip_special_tokens=True,
            constraint=None,
        ),
    )  # fmt: skip


def make_info(num_blocks: int) -> EngineInfo:
    return EngineInfo(
        name="fake",
        version="0",
        device="cpu",
        source="",
        limits=Limits(32768, 128_000, 1, 20, NUM_RUNNING),
        capabilities=frozenset({"generate", "prefix_cache"}),
        default_sampling=SamplingOverrides(),
        eos_token_ids=(0,),
        sampler=Component("engine"),
        block_manager=Component("engine"),
        kv_cache=KvCache(num_blocks, BLOCK_SIZE),
    )


class Run:
    """A scheduler kept at 1,000 queued and 256 running (or as many as the cache holds)."""

    def __init__(
        self, *, tenants: int, prompt: int, num_blocks: int, settings: dict[str, object], named: bool = True
    ) -> None:
        self.rng = random.Random(1)
        self.tenants = tenants
        self.named = named
        self.prompt = prompt
        self.now = 0.0
        self.number = 0
        self.core = Scheduler(SchedulerSettings.model_validate(settings))
        self.core.attach(make_info(num_blocks))
        self.running: list[Entry] = []
        for request in self.requests(NUM_QUEUED + NUM_RUNNING):
            self.core.offer(request, self.now)
            self.take()
        while self.core.load(self.now).waiting < NUM_QUEUED:
            self.core.offer(self.requests(1)[0], self.now)

    def requests(self, count: int) -> list[EngineRequest]:
        made = [
            make_request(
                self.number + i, tenants=self.tenants, named=self.named, prompt=self.prompt, rng=self.rng
            )
            for i in range(count)
        ]
        self.number += count
        return made

    def take(self) -> None:
        while (entry := self.core.take(self.now)) is not None:
            self.core.prompt_done(entry)
            self.running.append(entry)

    def replace(self, count: int) -> list[tuple[float, float]]:
        """End `count` running requests, each time queue another and let the next in.

        A request is made just before its offer, as in the service, so its token ids are in the CPU's cache.
        Returns seconds for each: all of it, and hashing the prompt alone (once more, for comparison).
        """
        victims = self.rng.sample(self.running, count)
        for victim in victims:
            self.running.remove(victim)
        core, now, clock = self.core, self.now, time.thread_time
        seconds = []
        for victim in victims:
            (request,) = self.requests(1)
            taken = []
            start = clock()
            core.release(victim, now, finished=True)
            core.offer(request, now)
            while (entry := core.take(now)) is not None:
                core.prompt_done(entry)
                taken.append(entry)
            middle = clock()
            assert core._ledger is not None
            core._ledger.hash(request)
            seconds.append((middle - start, clock() - middle))
            self.running += taken
            now += 0.002
        self.now = now
        return seconds

    def step(self, steps: int) -> float:
        """One token to every running request, `steps` times; seconds a token."""
        core, now, running = self.core, self.now, self.running
        token = (17,)
        start = time.thread_time()
        for _ in range(steps):
            now += 0.01
            for entry in running:
                core.add_tokens(entry, 0, token, now)
        seconds = (time.thread_time() - start) / (steps * len(running))
        self.now = now
        return seconds


SCENARIOS: dict[str, dict[str, object]] = {
    "slots bind, 20 tenants": {"tenants": 20, "prompt": 512, "num_blocks": 40_000, "settings": {}},
    "slots bind, 1,000 tenants": {"tenants": 1000, "prompt": 512, "num_blocks": 40_000, "settings": {}},
    "slots bind, 20 addresses": {
        "tenants": 20, "named": False, "prompt": 512, "num_blocks": 40_000, "settings": {},
    },
    "slots bind, shortest first": {
        "tenants": 20, "prompt": 512, "num_blocks": 40_000, "settings": {"tenant_order": "shortest"},
    },
    "KV cache binds, 20 tenants": {"tenants": 20, "prompt": 512, "num_blocks": 10_000, "settings": {}},
    "prompts of 2,048": {"tenants": 20, "prompt": 2048, "num_blocks": 80_000, "settings": {}},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out")
    args = parser.parse_args()
    runs = {name: Run(**scenario) for name, scenario in SCENARIOS.items()}  # type: ignore[arg-type]
    requests: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    tokens: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            requests[name].extend(run.replace(min(128, len(run.running) // 2)))
            tokens[name].append(run.step(16))
    result: dict[str, dict[str, float]] = {
        name: {
            "us_per_request": round(statistics.median(r for r, _ in requests[name]) * 1e6, 2),
            "us_per_request_best": round(min(r for r, _ in requests[name]) * 1e6, 2),
            "us_of_which_hashing": round(statistics.median(h for _, h in requests[name]) * 1e6, 2),
            "us_per_token": round(statistics.median(tokens[name]) * 1e6, 3),
            "running": len(run.running),
            "waiting": run.core.load(run.now).waiting,
            "overflows": run.core.load(run.now).kv_overflows,
        }
        for name, run in runs.items()
    }
    print(f"{'scenario':28} {'us/request':>11} {'best':>6} {'hashing':>8} {'us/token':>9}", file=sys.stderr)
    for name, row in result.items():
        print(
            f"{name:28} {row['us_per_request']:11.1f} {row['us_per_request_best']:6.1f} "
            f"{row['us_of_which_hashing']:8.1f} {row['us_per_token']:9.2f}",
            file=sys.stderr,
        )
    start = time.thread_time()
    for _ in range(1_000_000):
        pass
    loop_ns = (time.thread_time() - start) * 1e3
    result["machine"] = {"empty_loop_ns": round(loop_ns, 1)}
    print(f"an empty loop takes {loop_ns:.0f} ns a turn here and now", file=sys.stderr)
    text = json.dumps(result, indent=1)
    if args.out:
        with open(args.out, "w") as file:
            file.write(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
