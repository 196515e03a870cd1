"""Which replica a request goes to, and when it is refused instead. Pure: no clock of its own, no network.

Costs and prefixes are judged natively (_core.Picker, _core.PrefixIndex); here are the rules that need names: which
replicas serve the model and have the adapter, and who is refused when all are full.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import random
import struct
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from twinjet._core import BlockHasher, Picker, PrefixIndex
from twinjet.addresses import take_off
from twinjet.errors import Overloaded, Unavailable

if TYPE_CHECKING:
    from twinjet._core import EppPrompt
    from twinjet.epp.orca import Reading
    from twinjet.epp.settings import IndexSettings, PickingSettings, SheddingSettings

_HOME_WORDS = 256
"""By so much of its beginning a prompt that nobody holds has a home."""

_KNOWN_SHARE = 0.25
"""With less of it cached a prompt counts as one that nobody holds."""

_HOME_SHARE = 0.6
"""The home may cost so much of the prompt more than the cheapest replica."""

_HOME_POINTS = 64
_MAX_RINGS = 64

_REPORT_LAG_S = 0.15
"""How old a replica's readings may be when its report comes: it takes them every 0.1 s."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a replica tells of a model. kv_tokens: 0 if it does not tell."""

    is_ready: bool
    deployment: str = ""
    adapters: frozenset[str] = frozenset()
    kv_tokens: int = 0


@dataclass(eq=False)
class Replica:
    """A replica as far as known. number: in the native parts. is_up: whether it answers. is_silent: it keeps its
    connection and does not. event_sizes: block size of
    its KV events by model, of the models whose cache it tells of."""

    address: str
    number: int
    models: Mapping[str, ModelFacts] = field(default_factory=dict)
    serving: Mapping[str, bool] = field(default_factory=dict)
    is_up: bool = False
    is_silent: bool = False
    expected_wait_s: float | None = None
    event_sizes: dict[str, int] = field(default_factory=dict)
    is_gone: bool = False

    def serves(self, model: str) -> bool:
        """Whether it would answer a request for the model; "" is any."""
        if not model:
            return any(self._is_serving(facts) for facts in self.models.values())
        return model in self.models and self._is_serving(self.models[model])

    def _is_serving(self, facts: ModelFacts) -> bool:
        return facts.is_ready and self.serving.get(facts.deployment, True)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as the rules see it. prompt: None if it could not be read, or has none. allowed: addresses to choose
    among; None: all. token_ids: of a text prompt, int32s, where a tokenizer is at hand. client_address: where it comes
    from (twinjet.addresses), "" where the proxy does not tell."""

    prompt: EppPrompt | None = None
    allowed: Collection[str] | None = None
    token_ids: bytes | None = None
    client_address: str = ""


@dataclass(frozen=True, slots=True)
class Pick:
    """A decision. destination: addresses, the best first. Must be given to finish() when the request has ended."""

    destination: str
    replica: Replica
    num_tokens: int
    cached_tokens: int
    tenant: str
    client_address: str
    ticket: int


def prefix_root(model: str, adapter: str, cache_salt: str) -> bytes:
    """Give what sets caches of token ids apart, as EppPrompt.hash does."""
    parts = (part.encode() for part in (model, adapter, cache_salt))
    return b"i" + b"".join(struct.pack("<I", len(part)) + part for part in parts)


class EndpointPicker:
    """See the module. All methods are called on one thread. clock: seconds."""

    def __init__(
        self,
        picking: PickingSettings,
        index: IndexSettings,
        shedding: SheddingSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        bits: Callable[[], int] = lambda: random.getrandbits(64),
    ) -> None:
        self._index_settings = index
        self._shedding = shedding
        self._num_choices = 1 + picking.fallbacks
        self._prefix_weight = picking.prefix_weight
        self._clock = clock
        self._bits = bits
        self._picker = Picker(
            prefill_per_s=picking.prefill_tokens_per_s, running_tokens=picking.running_tokens, waiting_tokens=picking.waiting_tokens,
            kv_penalty=picking.kv_penalty, report_lag_s=_REPORT_LAG_S, report_life_s=picking.report_life_s,
            max_waiting=shedding.max_waiting,
        )  # fmt: skip
        self._key = os.urandom(32)
        self._hasher = self.hasher(index.block_tokens)
        self._sent = PrefixIndex(index.max_blocks)
        self.told = PrefixIndex(index.max_blocks)
        self.replicas: dict[str, Replica] = {}
        self._by_number: dict[int, Replica] = {}
        # Without a secret, so that several pickers agree; whoever chooses prompts for one home fills its queue alone.
        self._home_hasher = BlockHasher(_HOME_WORDS, algorithm="siphash", key=bytes(32))
        self._rings: dict[bytes, tuple[list[int], list[int]]] = {}
        self._candidates: dict[tuple[str, str], bytes] = {}
        self._tenants: Counter[str] = Counter()
        # Of those that name no tenant, by address.
        self._anonymous: Counter[str] = Counter()

    # What is known of replicas.

    def hasher(self, block_size: int) -> BlockHasher:
        """Make a hasher whose hashes the indices understand."""
        return BlockHasher(block_size, algorithm="siphash", key=self._key)

    def set_replicas(self, addresses: Iterable[str]) -> tuple[list[Replica], list[Replica]]:
        """Make these the replicas; gives (added, removed)."""
        wanted = dict.fromkeys(addresses)
        removed = [replica for address, replica in self.replicas.items() if address not in wanted]
        for replica in removed:
            self._forget(replica)
        # Numbers come again.
        self._rings.clear()
        added = []
        for address in wanted:
            if address not in self.replicas:
                replica = Replica(address, self._picker.add())
                self.replicas[address] = self._by_number[replica.number] = replica
                self._set_capacity(replica)
                added.append(replica)
        self._candidates.clear()
        return added, removed

    def _forget(self, replica: Replica) -> None:
        replica.is_gone, replica.is_up = True, False
        del self.replicas[replica.address], self._by_number[replica.number]
        self._sent.clear(replica.number)
        self.told.clear(replica.number)
        self._picker.remove(replica.number)

    def set_facts(self, replica: Replica, models: Mapping[str, ModelFacts]) -> None:
        """The replica told of its models."""
        replica.models = dict(models)
        self._candidates.clear()
        self._set_capacity(replica)

    def _set_capacity(self, replica: Replica) -> None:
        told = {facts.deployment: facts.kv_tokens for facts in replica.models.values()}
        kv_tokens = sum(told.values())
        self._picker.set_kv_tokens(replica.number, float(kv_tokens))
        tokens = kv_tokens or self._index_settings.replica_tokens
        blocks = 0 if self._index_settings.mode == "off" else tokens // self._index_settings.block_tokens
        self._sent.set_capacity(replica.number, min(blocks, self._index_settings.max_blocks))

    def set_up(self, replica: Replica, *, is_up: bool, is_silent: bool = False) -> None:
        """The replica answers, or has stopped to. One whose connection is gone may come back without its cache."""
        if replica.is_gone:
            return
        replica.is_up, replica.is_silent = is_up, is_silent
        self._candidates.clear()
        if not is_up and not is_silent:
            self._sent.clear(replica.number)

    def report(self, replica: Replica, reading: Reading) -> None:
        """The replica told its load."""
        if replica.is_gone:
            return
        replica.expected_wait_s = reading.expected_wait_s
        if reading.serving != replica.serving:
            replica.serving = reading.serving
            self._candidates.clear()
        self._picker.report(
            replica.number, self._clock(), waiting=reading.waiting, running=reading.running,
            waiting_tokens=reading.waiting_tokens, kv_utilization=reading.kv_utilization,
        )  # fmt: skip

    def set_event_block_size(self, replica: Replica, model: str, block_size: int) -> None:
        """The replica tells what its cache holds of a model, in blocks of so many tokens; 0: no longer."""
        if block_size:
            replica.event_sizes[model] = block_size
        else:
            replica.event_sizes.pop(model, None)

    # Requests.

    def pick(self, ask: Ask) -> Pick:
        """Decide. Raises Unavailable if no replica can be had, Overloaded if all are full."""
        prompt = ask.prompt
        model, adapter = (prompt.model, prompt.adapter) if prompt else ("", "")
        candidates = self._candidates_for(model, adapter, ask.allowed)
        num_tokens = max(prompt.num_tokens, 1) if prompt else 1
        if ask.token_ids is not None:
            num_tokens = len(ask.token_ids) // 4
        hashes, lookups = self._lookups(prompt, ask.token_ids)
        is_exact = len(lookups) > 1
        now = self._clock()
        weight = self._prefix_weight
        choices = self._picker.rank(
            candidates, num_tokens * weight, [(i, h, size * weight) for i, h, size in lookups], now, self._bits(),
            self._num_choices,
        )  # fmt: skip
        choices = [(n, cost, cached // weight, waiting) for n, cost, cached, waiting in choices]
        if prompt is not None and hashes and choices[0][2] < num_tokens * _KNOWN_SHARE:
            self._prefer_home(choices, candidates, prompt, num_tokens, now)
        number, _, cached_tokens, waiting = choices[0]
        best = self._by_number[number]
        tenant = prompt.tenant if prompt else ""
        self._refuse_if_full(waiting, tenant, ask.client_address, prompt.priority if prompt else 0, best)
        cached_tokens = min(cached_tokens, num_tokens)
        num_new = _num_new(num_tokens, cached_tokens)
        ticket = self._picker.begin(number, num_new, now)
        self._tenants[tenant] += 1
        if not tenant:
            self._anonymous[ask.client_address] += 1
        if hashes and not (is_exact and self._full_name(model) in best.event_sizes):
            self._sent.touch(number, hashes)
        destination = ",".join(self._by_number[choice[0]].address for choice in choices)
        return Pick(destination, best, num_tokens, cached_tokens, tenant, ask.client_address, ticket)

    def finish(self, pick: Pick) -> None:
        """The request has ended, well or not."""
        take_off(self._tenants, pick.tenant)
        if not pick.tenant:
            take_off(self._anonymous, pick.client_address)
        if not pick.replica.is_gone:
            self._picker.end(pick.replica.number, pick.ticket, _num_new(pick.num_tokens, pick.cached_tokens))

    def _candidates_for(self, model: str, adapter: str, allowed: Collection[str] | None) -> bytes:
        key = (model, adapter)
        found = self._candidates.get(key)
        if found is None:
            if len(self._candidates) > 10_000:
                # Names come from clients.
                self._candidates.clear()
            found = self._candidates[key] = _numbers(self._able(model, adapter))
        if allowed is not None:
            known = (self.replicas.get(address) for address in allowed)
            numbers = {replica.number for replica in known if replica is not None}
            found = array("I", [n for n in array("I", found) if n in numbers]).tobytes()
        if not found:
            raise Unavailable(
                "no replica answers" if allowed is None else "none of the allowed replicas answers",
                reason="NO_REPLICA",
                retry_after_s=self._shedding.retry_s,
            )
        return found

    def _able(self, model: str, adapter: str) -> list[Replica]:
        """Those that will serve the request; failing that those that can say best why not."""
        up = [replica for replica in self.replicas.values() if replica.is_up]
        if not up:
            # All hang at once: more likely they are busy beyond measure, or we are.
            up = [replica for replica in self.replicas.values() if replica.is_silent]
        knowing = [replica for replica in up if model in replica.models] if model else up
        serving = [replica for replica in knowing if replica.serves(model)]
        if adapter:
            having = [replica for replica in serving if _has_adapter(replica, model, adapter)]
            serving = having or serving
        return serving or knowing or up

    def _prefer_home(
        self,
        choices: list[tuple[int, float, int, float]],
        candidates: bytes,
        prompt: EppPrompt,
        num_tokens: int,
        now: float,
    ) -> None:
        """Put the home of a prompt that nobody holds first, unless it costs too much more.

        Pickers that know nothing of each other then send its like to one replica, not to one each.
        """
        beginning = prompt.hash(self._home_hasher)[:8]
        if not beginning:
            return
        points, numbers = self._ring(candidates)
        home = numbers[bisect.bisect(points, int.from_bytes(beginning, "big")) % len(numbers)]
        number, cost, _, _ = choices[0]
        if number == home:
            return
        (at_home,) = self._picker.rank(_number(home), num_tokens * self._prefix_weight, [], now, 0, 1)
        is_full = at_home[3] >= self._shedding.max_waiting
        if not is_full and at_home[1] <= cost + num_tokens * self._prefix_weight * _HOME_SHARE:
            rest = [choice for choice in choices if choice[0] != home]
            choices[:] = [at_home, *rest][: len(choices)]

    def _ring(self, candidates: bytes) -> tuple[list[int], list[int]]:
        ring = self._rings.get(candidates)
        if ring is None:
            if len(self._rings) >= _MAX_RINGS:
                self._rings.clear()
            places = sorted(
                (
                    int.from_bytes(
                        hashlib.blake2b(f"{self._by_number[n].address} {i}".encode(), digest_size=8).digest(),
                        "big",
                    ),
                    n,
                )
                for n in array("I", candidates)
                for i in range(_HOME_POINTS)
            )
            ring = self._rings[candidates] = [point for point, _ in places], [number for _, number in places]
        return ring

    def _lookups(
        self, prompt: EppPrompt | None, token_ids: bytes | None
    ) -> tuple[bytes, list[tuple[PrefixIndex, bytes, int]]]:
        if prompt is None or self._index_settings.mode == "off":
            return b"", []
        hashes = prompt.hash(self._hasher)
        lookups = [(self._sent, hashes, self._hasher.block_size)] if hashes else []
        if self._index_settings.mode == "events":
            ids = prompt.token_ids() if prompt.has_token_ids else token_ids
            if ids:
                model = self._full_name(prompt.model)
                root = prefix_root(model, prompt.adapter, prompt.cache_salt)
                for size in {r.event_sizes.get(model, 0) for r in self.replicas.values()} - {0}:
                    exact = self.hasher(size).hash_bytes(memoryview(ids).cast("i"), salt=root)
                    if exact:
                        lookups.append((self.told, exact, size))
        return hashes, lookups

    def _full_name(self, model: str) -> str:
        """Give the name that "" stands for, where there is only one model."""
        if not model and len(names := {name for r in self.replicas.values() for name in r.models}) == 1:
            (model,) = names
        return model

    def _refuse_if_full(
        self, waiting: float, tenant: str, client_address: str, priority: int, best: Replica
    ) -> None:
        shedding = self._shedding
        if waiting < shedding.max_waiting:
            return
        mine = self._tenants.get(tenant, 0)
        share = self._tenants.total() / max(len(self._tenants), 1)
        if not tenant:
            # The anonymous tenant's share is its clients' to share.
            mine = self._anonymous.get(client_address, 0)
            share /= max(len(self._anonymous), 1)
        if waiting < shedding.hard_waiting and priority >= 0 and mine <= share:
            return
        raise Overloaded(
            f"every replica has {int(waiting)} requests waiting or more",
            retry_after_s=best.expected_wait_s or shedding.retry_s,
        )

    # For metrics.

    def num_in_flight(self, replica: Replica) -> int:
        return self._picker.in_flight(replica.number)

    def index_sizes(self) -> dict[str, tuple[int, int]]:
        """Blocks at replicas, and bytes, of each index."""
        indices = {"sent": self._sent, "told": self.told}
        return {name: (index.num_links, index.memory_bytes()) for name, index in indices.items()}


def _number(number: int) -> bytes:
    return array("I", [number]).tobytes()


def _num_new(num_tokens: int, cached_tokens: int) -> int:
    """How many tokens there are to compute; the last one always is."""
    return max(num_tokens - cached_tokens, 1)


def _has_adapter(replica: Replica, model: str, adapter: str) -> bool:
    facts = [replica.models[model]] if model else replica.models.values()
    return any(adapter in one.adapters for one in facts)


def _numbers(replicas: Iterable[Replica]) -> bytes:
    return array("I", [replica.number for replica in replicas]).tobytes()
