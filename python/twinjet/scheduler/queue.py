"""The waiting requests in the order in which they go. No clock, no KV cache, no engine.

Three levels: priority classes, within a class tenants by virtual token counter, within a tenant first in,
first out or shortest prompt first. Each level that prefers some has a count of how often others may be passed
over, so that every request goes after a bounded number of dispatches (docs/scheduler.md states the bound).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from twinjet._core import RankCounts
from twinjet.scheduler.entry import Entry, Tenant

MAX_LANES_SCANNED: Final = 4
"""How many tenants' next requests are tried while earlier ones do not fit the KV cache."""

ORDER_BITS: Final = 48
"""Low bits of a key that hold the order of arrival where prompts come before it."""

FindLongest = Callable[[list[tuple[bytes, int]], int], int]
"""KvLedger.find_longest(): which of a lane's next prompts has the longest cached prefix."""

MAX_LANES_COMPARED: Final = 8
"""Up to how many tenants a position looks at each counter; beyond, it takes half of the ties."""


class Lane:
    """One tenant's waiting requests of one priority, in three lists in the order they go.

    prompts: hashes of the prompt's blocks and its tokens. by_age: the same entries by arrival, with the first
    of them in oldest; None where that is the order they go in.
    """

    __slots__ = ("by_age", "entries", "keys", "num_bypassed", "num_overtakes", "oldest", "prompts", "tenant")

    def __init__(self, tenant: Tenant, *, shortest: bool) -> None:
        self.tenant = tenant
        self.entries: list[Entry] = []
        self.keys: list[int] = []
        self.prompts: list[tuple[bytes, int]] = []
        self.by_age: dict[int, Entry] | None = {} if shortest else None
        self.oldest: Entry | None = None
        self.num_overtakes = 0
        self.num_bypassed = 0

    def add(self, entry: Entry) -> int:
        """Returns the entry's place in the lists."""
        keys, key = self.keys, entry.key
        prompt = (entry.prefix_hashes, entry.num_prompt_tokens)
        if self.by_age is not None:
            self.by_age[entry.order] = entry
            if not keys:
                self.oldest = entry
        if not keys or keys[-1] < key:
            keys.append(key)
            self.entries.append(entry)
            self.prompts.append(prompt)
            return len(keys) - 1
        place = bisect_left(keys, key)
        keys.insert(place, key)
        self.entries.insert(place, entry)
        self.prompts.insert(place, prompt)
        return place

    def remove(self, place: int) -> None:
        if self.by_age is not None:
            entry = self.entries[place]
            del self.by_age[entry.order]
            if entry is self.oldest:
                self.oldest = next(iter(self.by_age.values()), None)
        del self.entries[place], self.keys[place], self.prompts[place]

    def place(self, entry: Entry) -> int:
        return bisect_left(self.keys, entry.key)

    def oldest_place(self) -> int:
        return 0 if self.oldest is None else self.place(self.oldest)

    def is_oldest(self, place: int) -> bool:
        return place == 0 if self.oldest is None else self.entries[place] is self.oldest


class PriorityClass:
    """The lanes of one priority, by their tenants' counters."""

    __slots__ = ("at_least", "heap", "lanes", "num_bypassed", "num_waiting", "priority")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.lanes: dict[str, Lane] = {}
        self.heap: list[tuple[float, int, Lane]] = []
        self.at_least = RankCounts()
        self.num_waiting = 0
        self.num_bypassed = 0

    def next_lane(self) -> Lane | None:
        """The lane of the least counter, left at heap[0]; None without any.

        Counters only grow, so a stale key is too low and is put right when it surfaces.
        """
        heap = self.heap
        while heap:
            key, order, lane = heap[0]
            if not lane.keys:
                heappop(heap)
            elif lane.tenant.counter > key:
                heapreplace(heap, (lane.tenant.counter, order, lane))
            else:
                return lane
        return None

    def lanes_in_order(self) -> Generator[Lane, None, None]:
        """Lanes by counter, lowest first. The heap is whole again when the iterator is closed."""
        taken: list[tuple[float, int, Lane]] = []
        try:
            while (lane := self.next_lane()) is not None:
                taken.append(heappop(self.heap))
                yield lane
        finally:
            for item in taken:
                heappush(self.heap, item)


class FairQueue:
    """Waiting requests of one deployment.

    A request that waits alone, as most do that go at once, is not put into a lane before another one comes.
    """

    __slots__ = (
        "_alone",
        "_by_priority",
        "_classes",
        "_last_counter",
        "_max_bypass",
        "_max_overtakes",
        "_num_lanes",
        "_patience",
        "_shortest",
        "_window",
        "num_waiting",
    )

    def __init__(
        self, *, shortest: bool, prefix_window: int, max_overtakes: int, max_bypass: int, patience: int
    ) -> None:
        self._shortest = shortest
        self._window = max(1, prefix_window)
        self._max_overtakes = max_overtakes
        self._max_bypass = max_bypass
        self._patience = patience
        self._alone: Entry | None = None
        self._classes: dict[int, PriorityClass] = {}
        self._by_priority: list[PriorityClass] = []
        self._last_counter = 0.0
        self._num_lanes = 0
        self.num_waiting = 0

    def __len__(self) -> int:
        return self.num_waiting

    def entries(self) -> Iterator[Entry]:
        """All waiting requests, in no useful order."""
        if self._alone is not None:
            yield self._alone
        for group in self._by_priority:
            for lane in group.lanes.values():
                yield from lane.entries

    def push(self, entry: Entry) -> int:
        """Add a waiting request; returns its position(). Its tenant's counter is lifted if it had none waiting."""
        tenant = entry.tenant
        if self._shortest:
            entry.key = entry.num_prompt_tokens << ORDER_BITS | entry.order
        if self._alone is not None:
            alone, self._alone = self._alone, None
            self._put_into_lane(alone)
        if tenant.num_waiting == 0:
            tenant.counter = max(tenant.counter, self._least_counter())
        tenant.num_waiting += 1
        self.num_waiting += 1
        if self.num_waiting == 1:
            self._alone = entry
            return 0
        return self._put_into_lane(entry)

    def _put_into_lane(self, entry: Entry) -> int:
        """Gives its position()."""
        tenant = entry.tenant
        group = self._classes.get(entry.priority)
        if group is None:
            group = self._classes[entry.priority] = PriorityClass(entry.priority)
            self._by_priority = sorted(self._classes.values(), key=lambda g: -g.priority)
        lane = group.lanes.get(tenant.name)
        if lane is None:
            lane = group.lanes[tenant.name] = Lane(tenant, shortest=self._shortest)
            self._num_lanes += 1
            heappush(group.heap, (tenant.counter, self._num_lanes, lane))
        place = lane.add(entry)
        group.at_least.add(len(lane.keys), 1)
        group.num_waiting += 1
        return self._position(place, lane, group)

    def remove(self, entry: Entry) -> None:
        """Take a waiting request out, wherever it stands."""
        if entry is self._alone:
            self._remove_alone()
            return
        group = self._classes[entry.priority]
        lane = group.lanes[entry.tenant.name]
        self._remove(lane.place(entry), lane, group)

    def _remove_alone(self) -> None:
        assert self._alone is not None
        tenant, self._alone = self._alone.tenant, None
        self.num_waiting = tenant.num_waiting = 0
        self._last_counter = tenant.counter

    def _remove(self, place: int, lane: Lane, group: PriorityClass) -> None:
        tenant = lane.tenant
        group.at_least.add(len(lane.keys), -1)
        lane.remove(place)
        group.num_waiting -= 1
        self.num_waiting -= 1
        tenant.num_waiting -= 1
        if lane.keys:
            return
        del group.lanes[tenant.name]
        if len(group.heap) > 2 * len(group.lanes) + 16:
            group.heap = [item for item in group.heap if item[2].keys]
            heapify(group.heap)
        if group.num_waiting == 0:
            del self._classes[group.priority]
            self._by_priority.remove(group)
        if tenant.num_waiting == 0:
            self._last_counter = tenant.counter

    def take_next(self, fits: Callable[[Entry], bool], find_longest: FindLongest | None) -> Entry | None:
        """Remove and return the next request that fits; None if none does or one must not be passed over.

        fits commits the request to the KV cache if it returns True. find_longest: None where nothing is
        cached.
        """
        if (alone := self._alone) is not None:
            if not fits(alone):
                return None
            self._remove_alone()
            return alone
        first = self._take_first(fits, find_longest)
        if first is not None:
            return first
        head: Lane | None = None
        scanned = 0
        for group in self._classes_in_turn():
            lanes = group.lanes_in_order()
            try:
                for lane in lanes:
                    place = self._choose(lane, find_longest)
                    if fits(lane.entries[place]):
                        break
                    head = lane if head is None else head
                    scanned += 1
                    if head.num_bypassed >= self._max_bypass or scanned >= MAX_LANES_SCANNED:
                        return None
                else:
                    continue
            finally:
                lanes.close()
            if head is not None:
                head.num_bypassed += 1
            return self._take(place, lane, group)
        return None

    def _take_first(self, fits: Callable[[Entry], bool], find_longest: FindLongest | None) -> Entry | None:
        """take_next() for the usual case: one class, and the request whose turn it is fits."""
        if len(self._by_priority) != 1:
            return None
        group = self._by_priority[0]
        lane = group.next_lane()
        assert lane is not None, "a class goes with its last request"
        place = self._choose(lane, find_longest)
        return self._take(place, lane, group) if fits(lane.entries[place]) else None

    def position(self, entry: Entry) -> int:
        """How many waiting requests are expected to go before this one, O(log n).

        Exact for one class of tenants of equal weight and counter that queue like requests; otherwise an
        estimate: each tenant gives as many as this one has ahead of the request, and one more.
        """
        if entry is self._alone:
            return 0
        group = self._classes[entry.priority]
        lane = group.lanes[entry.tenant.name]
        return self._position(lane.place(entry), lane, group)

    def _position(self, rank: int, lane: Lane, group: PriorityClass) -> int:
        higher = 0
        if len(self._by_priority) > 1:
            higher = sum(other.num_waiting for other in self._by_priority if other.priority > group.priority)
        # For each request of ours ahead, one of each tenant; then the tenants whose counter is lower.
        ahead = group.at_least.up_to(rank)
        level = group.at_least.at(rank + 1) - 1
        if level > 0 and len(group.lanes) > MAX_LANES_COMPARED:
            level //= 2
        elif level > 0:
            mine = lane.tenant.counter
            level = sum(
                1
                for other_lane in group.lanes.values()
                if len(other_lane.entries) > rank and other_lane.tenant.counter < mine
            )
        return higher + ahead + level

    def _classes_in_turn(self) -> list[PriorityClass]:
        classes = self._by_priority
        if len(classes) < 2 or self._patience == 0:
            return classes
        due = max(classes, key=lambda g: g.num_bypassed)
        if due.num_bypassed < self._patience:
            return classes
        return [due, *(g for g in classes if g is not due)]

    def _choose(self, lane: Lane, find_longest: FindLongest | None) -> int:
        """The place of the lane's next request."""
        if len(lane.keys) == 1:
            return 0
        if lane.num_overtakes >= self._max_overtakes:
            return lane.oldest_place()
        if self._window == 1 or find_longest is None:
            return 0
        return find_longest(lane.prompts, self._window)

    def _take(self, place: int, lane: Lane, group: PriorityClass) -> Entry:
        entry = lane.entries[place]
        lane.num_overtakes = 0 if lane.is_oldest(place) else lane.num_overtakes + 1
        lane.num_bypassed = 0
        group.num_bypassed = 0
        if len(self._by_priority) > 1:
            for other in reversed(self._by_priority):
                if other.priority >= group.priority:
                    break
                other.num_bypassed += 1
        self._remove(place, lane, group)
        return entry

    def _least_counter(self) -> float:
        """Of the tenants that have requests waiting; with none, the last one's that had."""
        least = math.inf
        for group in self._by_priority:
            lane = group.next_lane()
            if lane is not None and lane.tenant.counter < least:
                least = lane.tenant.counter
        return self._last_counter if least == math.inf else least
