"""Simulates many replicas under the picker's real code: balance, cache hits, picks a second, memory.

    python bench/scale_out/epp_sim.py [--replicas 1000] [--requests 1000000] [--policies epp load ring round] ...

Time is simulated; the machine's own speed shows in picks_per_s alone, by CPU time. A replica prefills one prompt after another at
--prefill tokens a second, then decodes with a time a token that grows with the batch; it caches blocks of prompts,
longest unused out first; its load reports are 0 to 0.1 s old and come every 0.5 s. Prompts are one of --families
beginnings, drawn by Zipf's law or evenly, and a tail of their own. Prints a line of JSON a policy.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import resource
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from twinjet._core import EppPrompt
from twinjet.epp.orca import Reading
from twinjet.epp.picking import Ask, EndpointPicker, ModelFacts
from twinjet.epp.picking import Replica as Record
from twinjet.epp.settings import IndexSettings, PickingSettings, SheddingSettings
from twinjet.epp.wire import field

REPORT_S = 0.5
SAMPLE_S = 0.1
SLOTS = 64
TOKEN_S = 0.015
_LOW = bytes(i & 127 for i in range(256))


class Cache:
    """Beginnings of prompts that a replica holds: the shared ones by family, tails as they come."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.entries: OrderedDict[int, int] = OrderedDict()

    def use(self, name: int, size: int) -> bool:
        """Whether it was there; it is afterwards."""
        if name in self.entries:
            self.entries.move_to_end(name)
            return True
        self.entries[name] = size
        self.used += size
        while self.used > self.capacity:
            _, gone = self.entries.popitem(last=False)
            self.used -= gone
        return False


class Replica:
    def __init__(self, kv_tokens: int) -> None:
        self.cache = Cache(kv_tokens)
        self.kv_tokens = kv_tokens
        self.queue: deque[tuple[float, int, int, Callable[[], None]]] = (
            deque()
        )  # arrived, family, output, end
        self.running = 0
        self.held_tokens = 0
        self.waiting_tokens = 0
        self.is_prefilling = False
        self.num_requests = 0
        self.busy_s = 0.0

    def reading(self) -> Reading:
        share = min(self.held_tokens / self.kv_tokens, 1.0)
        return Reading(len(self.queue), self.running, self.waiting_tokens, share, None, {})


class Simulation:
    def __init__(self, options: argparse.Namespace, policy: str) -> None:
        self.options = options
        self.rng = random.Random(options.seed)
        self.replicas = [Replica(options.kv_tokens) for _ in range(options.replicas)]
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = 0
        self.ttft: list[float] = []
        self.hit_tokens = 0
        self.prompt_tokens = 0
        self.pick_s = 0.0
        self.choose = getattr(self, f"_{policy}")
        self.turn = 0
        self.pickers: list[tuple[EndpointPicker, list[Record], dict[str, int]]] = []
        self.seen: list[float] = []
        self.sent: list[int] = []
        self.weights: list[float] = []
        if policy == "epp":
            self._make_pickers()
        elif policy == "load":
            self.seen = [0.0] * options.replicas
            self.sent = [0] * options.replicas
        self.prefixes = [self._ids(options.shared) for _ in range(options.families)]

    def _make_pickers(self) -> None:
        for seed in range(self.options.gateways):
            bits = random.Random(seed)
            picker = EndpointPicker(
                PickingSettings(), IndexSettings(max_blocks=self.options.max_blocks), SheddingSettings(max_waiting=1e6, hard_waiting=1e6),
                clock=lambda: self.now, bits=lambda bits=bits: bits.getrandbits(64),
            )  # fmt: skip
            names = [f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}:50051" for i in range(len(self.replicas))]
            picker.set_replicas(names)
            for replica in picker.replicas.values():
                picker.set_facts(replica, {"m": ModelFacts(True, "d", kv_tokens=self.options.kv_tokens)})
                picker.set_up(replica, is_up=True)
                picker.report(replica, Reading(0, 0, 0, 0, None, {}))
            self.pickers.append(
                (picker, [picker.replicas[name] for name in names], {n: i for i, n in enumerate(names)})
            )

    def _ids(self, count: int) -> bytes:
        """A packed field of token ids below 128; two of them in a message are one list."""
        return field(3, self.rng.randbytes(count).translate(_LOW))

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (when, self.num_events, what))

    # Policies: each gives a replica's number and what to do when the request ends.

    def _round(self, family: int, tail: bytes) -> tuple[int, Callable[[], None]]:
        self.turn += 1
        return self.turn % len(self.replicas), lambda: None

    def _ring(self, family: int, tail: bytes) -> tuple[int, Callable[[], None]]:
        return hash((family, "ring")) % len(self.replicas), lambda: None

    def _load(self, family: int, tail: bytes) -> tuple[int, Callable[[], None]]:
        """Of two at random the one with less reported and sent since."""
        one, two = self.rng.randrange(len(self.replicas)), self.rng.randrange(len(self.replicas))
        best = min(one, two, key=lambda i: self.seen[i] + self.sent[i])
        self.sent[best] += 1
        return best, lambda: None

    def _epp(self, family: int, tail: bytes) -> tuple[int, Callable[[], None]]:
        picker, _, numbers = self.pickers[self.turn % len(self.pickers)]
        self.turn += 1
        message = self.prefixes[family] + tail
        began = time.thread_time()
        pick = picker.pick(Ask(EppPrompt(message, "Generate")))
        self.pick_s += time.thread_time() - began
        return numbers[pick.replica.address], lambda: picker.finish(pick)

    def _report(self, number: int) -> None:
        reading = self.replicas[number].reading()

        def arrive() -> None:
            if self.pickers:
                for picker, records, _ in self.pickers:
                    picker.report(records[number], reading)
            elif self.seen:
                self.seen[number] = reading.waiting + reading.running
                self.sent[number] = 0

        self.at(self.now + self.rng.uniform(0, SAMPLE_S), arrive)
        self.at(self.now + REPORT_S, lambda: self._report(number))

    # A request's way through its replica.

    def _arrive(self, arrivals: Iterator[float]) -> None:
        options = self.options
        family = self._draw_family()
        tail = self._ids(options.tail)
        number, end = self.choose(family, tail)
        replica = self.replicas[number]
        replica.num_requests += 1
        replica.waiting_tokens += options.shared + options.tail
        output = min(1 + int(self.rng.expovariate(1 / options.output)), 8 * options.output)
        replica.queue.append((self.now, family, output, end))
        self._work(replica)
        if (following := next(arrivals, None)) is not None:
            self.at(following, lambda: self._arrive(arrivals))

    def _work(self, replica: Replica) -> None:
        if replica.is_prefilling or not replica.queue or replica.running >= SLOTS:
            return
        options = self.options
        arrived, family, output, end = replica.queue.popleft()
        replica.waiting_tokens -= options.shared + options.tail
        cached = options.shared if replica.cache.use(family, options.shared) else 0
        replica.cache.use(-1 - self.num_events, options.tail + output)
        self.hit_tokens += cached
        self.prompt_tokens += options.shared + options.tail
        new = options.shared + options.tail - cached
        replica.is_prefilling = True
        replica.running += 1
        replica.held_tokens += options.shared + options.tail + output
        took_s = new / options.prefill + TOKEN_S
        replica.busy_s += took_s

        def first() -> None:
            self.ttft.append(self.now - arrived)
            replica.is_prefilling = False
            token_s = TOKEN_S * (1 + replica.running / SLOTS)
            self.at(self.now + output * token_s, last)
            self._work(replica)

        def last() -> None:
            replica.running -= 1
            replica.held_tokens -= options.shared + options.tail + output
            end()
            self._work(replica)

        self.at(self.now + took_s, first)

    def _draw_family(self) -> int:
        if not self.options.zipf:
            return self.rng.randrange(self.options.families)
        return self.rng.choices(range(self.options.families), cum_weights=self.weights)[0]

    def run(self) -> dict[str, float | int | str]:
        options = self.options
        total = 0.0
        self.weights = [total := total + 1 / (rank + 1) ** options.zipf for rank in range(options.families)]
        for number in range(len(self.replicas)):
            self.at(self.rng.uniform(0, REPORT_S), lambda number=number: self._report(number))

        def times() -> Iterator[float]:
            when = 0.0
            for _ in range(options.requests):
                when += self.rng.expovariate(options.rate)
                yield when

        arrivals = times()
        self.at(next(arrivals), lambda: self._arrive(arrivals))
        began = time.perf_counter()
        while len(self.ttft) < options.requests:
            self.now, _, what = heapq.heappop(self.events)
            what()
        return self._result(time.perf_counter() - began)

    def _result(self, wall_s: float) -> dict[str, float | int | str]:
        counts = [r.num_requests for r in self.replicas]
        busy = [r.busy_s for r in self.replicas]
        # The first fifth fills the caches.
        warm = sorted(self.ttft[len(self.ttft) // 5 :])
        result: dict[str, float | int | str] = {
            "hit_rate": round(self.hit_tokens / self.prompt_tokens, 3),
            "ttft_mean_ms": round(1e3 * statistics.fmean(warm), 1),
            "ttft_p50_ms": round(1e3 * warm[len(warm) // 2], 1),
            "ttft_p99_ms": round(1e3 * warm[len(warm) * 99 // 100], 1),
            "requests_cv": round(statistics.pstdev(counts) / statistics.fmean(counts), 3),
            "requests_max_to_mean": round(max(counts) / statistics.fmean(counts), 2),
            "busy_max_to_mean": round(max(busy) / statistics.fmean(busy), 2),
            "simulated_s": round(self.now, 1), "wall_s": round(wall_s, 1),
        }  # fmt: skip
        if self.pickers:
            sizes = [picker.index_sizes()["sent"] for picker, _, _ in self.pickers]
            result |= {
                "picks_per_s": round(self.options.requests / self.pick_s),
                "pick_mean_us": round(1e6 * self.pick_s / self.options.requests, 1),
                "index_blocks": sizes[0][0], "index_mb": round(sizes[0][1] / 1e6, 1),
                "bytes_per_block": round(sizes[0][1] / max(sizes[0][0], 1)),
            }  # fmt: skip
        result["rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", nargs="+", default=["epp"], choices=["epp", "load", "ring", "round"])
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--gateways", type=int, default=1, help="pickers that know nothing of each other")
    parser.add_argument("--families", type=int, default=6000)
    parser.add_argument("--zipf", type=float, default=0.0, help="exponent; 0 draws families evenly")
    parser.add_argument("--shared", type=int, default=1800, help="tokens of a beginning")
    parser.add_argument("--tail", type=int, default=200, help="tokens of a prompt's own")
    parser.add_argument("--output", type=int, default=100, help="mean tokens of an answer")
    parser.add_argument("--prefill", type=float, default=10_000.0, help="tokens a second of a replica")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; default: 8 a replica")
    parser.add_argument("--kv-tokens", type=int, default=200_000)
    parser.add_argument("--max-blocks", type=int, default=4_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.rate = options.rate or 8.0 * options.replicas
    if not math.isfinite(options.rate):
        parser.error("--rate must be finite")
    for policy in options.policies:
        facts = {
            k: getattr(options, k) for k in ("replicas", "requests", "gateways", "families", "zipf", "rate")
        }
        print(json.dumps({"policy": policy} | facts | Simulation(options, policy).run()), flush=True)


if __name__ == "__main__":
    main()
