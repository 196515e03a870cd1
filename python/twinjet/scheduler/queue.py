"""The waiting requests in the order in which they go. No clock, no KV cache, no engine.

Levels: priority classes, within a class tenants by virtual token counter, within the anonymous tenant its clients in the
same way, and at last first in, first out or shortest prompt first. Each level that prefers some has a count of how often
others may be passed over, so that every request goes after a bounded number of dispatches (docs/scheduler.md states the
bound).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

from twinjet.scheduler.entry import Entry
from twinjet.scheduler.lanes import Lane, PriorityClass

MAX_LANES_SCANNED: Final = 4
"""How many lanes' next requests are tried while earlier ones do not fit the KV cache."""

ORDER_BITS: Final = 48
"""Low bits of a key that hold the order of arrival where prompts come before it."""

FindLongest = Callable[[list[tuple[bytes, int]], int], int]
"""KvLedger.find_longest(): which of a lane's next prompts has the longest cached prefix."""


class FairQueue:
    """Waiting requests of one deployment.

    A request that waits alone, as most do that go at once, is not put into a lane before another one comes.
    """

    __slots__ = (
        "_alone",
        "_by_priority",
        "_classes",
        "_last_client_counter",
        "_last_counter",
        "_max_bypass",
        "_max_overtakes",
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
        self._last_client_counter = 0.0
        self.num_waiting = 0

    def __len__(self) -> int:
        return self.num_waiting

    def entries(self) -> Iterator[Entry]:
        """All waiting requests, in no useful order."""
        if self._alone is not None:
            yield self._alone
        for group in self._by_priority:
            yield from group.entries()

    def push(self, entry: Entry) -> int:
        """Add a waiting request; returns its position().

        The counters of its tenant and, if that is the anonymous one, its client are lifted if they had none waiting.
        """
        tenant, account = entry.tenant, entry.account
        if self._shortest:
            entry.key = entry.num_prompt_tokens << ORDER_BITS | entry.order
        if not self.num_waiting:
            if tenant.counter < self._last_counter:
                tenant.counter = self._last_counter
            if account is not tenant and account.counter < self._last_client_counter:
                account.counter = self._last_client_counter
            self.num_waiting = tenant.num_waiting = account.num_waiting = 1
            self._alone = entry
            return 0
        if self._alone is not None:
            alone, self._alone = self._alone, None
            self._put_into_lane(alone)
        if tenant.num_waiting == 0:
            tenant.counter = max(tenant.counter, self._least_counter())
        tenant.num_waiting += 1
        if account is not tenant:
            if account.num_waiting == 0:
                account.counter = max(account.counter, self._least_client_counter())
            account.num_waiting += 1
        self.num_waiting += 1
        return self._put_into_lane(entry)

    def _put_into_lane(self, entry: Entry) -> int:
        """Gives its position()."""
        group = self._classes.get(entry.priority)
        if group is None:
            group = self._classes[entry.priority] = PriorityClass(entry.priority)
            self._by_priority = sorted(self._classes.values(), key=lambda g: -g.priority)
        place, lane = group.add(entry, shortest=self._shortest)
        return self._position(place, lane, group)

    def remove(self, entry: Entry) -> None:
        """Take a waiting request out, wherever it stands."""
        if entry is self._alone:
            self._remove_alone()
            return
        group = self._classes[entry.priority]
        lane = group.lane_of[entry.account]
        self._remove(lane.place(entry), lane, group)

    def _remove_alone(self) -> None:
        assert self._alone is not None
        tenant, account = self._alone.tenant, self._alone.account
        self._alone = None
        self.num_waiting = tenant.num_waiting = account.num_waiting = 0
        self._last_counter = tenant.counter
        if account is not tenant:
            self._last_client_counter = account.counter

    def _remove(self, place: int, lane: Lane, group: PriorityClass) -> None:
        entry = lane.entries[place]
        group.remove(place, lane)
        self.num_waiting -= 1
        if group.num_waiting == 0:
            del self._classes[group.priority]
            self._by_priority.remove(group)
        tenant, account = entry.tenant, entry.account
        tenant.num_waiting -= 1
        if tenant.num_waiting == 0:
            self._last_counter = tenant.counter
        if account is not tenant:
            account.num_waiting -= 1
            if account.num_waiting == 0:
                self._last_client_counter = account.counter

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
            lanes = group.in_order()
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
        place = self._choose(lane, find_longest)
        return self._take(place, lane, group) if fits(lane.entries[place]) else None

    def position(self, entry: Entry) -> int:
        """How many waiting requests are expected to go before this one, O(log n).

        Exact for one class of tenants of equal weight and counter that queue like requests; otherwise an
        estimate: each tenant gives as many as this one has ahead of the request, and one more. So do the anonymous
        tenant's clients among themselves.
        """
        if entry is self._alone:
            return 0
        group = self._classes[entry.priority]
        lane = group.lane_of[entry.account]
        return self._position(lane.place(entry), lane, group)

    def _position(self, place: int, lane: Lane, group: PriorityClass) -> int:
        higher = 0
        if len(self._by_priority) > 1:
            higher = sum(other.num_waiting for other in self._by_priority if other.priority > group.priority)
        if (shared := lane.shared) is None:
            return higher + group.lanes.num_ahead(place, lane)
        return higher + group.lanes.num_ahead(shared.lanes.num_ahead(place, lane), shared)

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
            lane = group.lanes.next()
            if lane is not None and lane.account.counter < least:
                least = lane.account.counter
        return self._last_counter if least == math.inf else least

    def _least_client_counter(self) -> float:
        """The same of the anonymous tenant's clients."""
        least = math.inf
        for group in self._by_priority:
            lane = None if group.shared is None else group.shared.lanes.next()
            if lane is not None and lane.account.counter < least:
                least = lane.account.counter
        return self._last_client_counter if least == math.inf else least
