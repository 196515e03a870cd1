"""Waiting requests side by side: lanes of tenants, and within the anonymous tenant's lanes of its clients.

Nothing here decides between classes or counts who was passed over; FairQueue does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterator
from contextlib import closing
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final, Generic, TypeVar

from twinjet._core import RankCounts
from twinjet.scheduler.entry import Account, Client, Entry, Tenant

MAX_LANES_COMPARED: Final = 8
"""Up to how many lanes a position looks at each counter; beyond, it takes half of the ties."""


class Lane:
    """One account's waiting requests of one priority, in three lists in the order they go.

    prompts: hashes of the prompt's blocks and its tokens. by_age: the same entries by arrival, with the first
    of them in oldest; None where that is the order they go in. shared: the lane that this one is within, of a client.
    is_over: it is empty and was taken out; who comes back gets a new one.
    """

    __slots__ = (
        "account", "by_age", "entries", "is_over", "keys", "num_bypassed", "num_overtakes", "oldest", "prompts",
        "shared",
    )  # fmt: skip

    def __init__(self, account: Account, shared: SharedLane | None, *, shortest: bool) -> None:
        self.account = account
        self.shared = shared
        self.is_over = False
        self.entries: list[Entry] = []
        self.keys: list[int] = []
        self.prompts: list[tuple[bytes, int]] = []
        self.by_age: dict[int, Entry] | None = {} if shortest else None
        self.oldest: Entry | None = None
        self.num_overtakes = 0
        self.num_bypassed = 0

    def __len__(self) -> int:
        return len(self.keys)

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


class SharedLane:
    """The anonymous tenant's waiting requests of one priority: lanes of its clients."""

    __slots__ = ("account", "is_over", "lanes", "num_waiting")

    def __init__(self, tenant: Tenant) -> None:
        self.account = tenant
        self.is_over = False
        self.lanes: Lanes[Lane] = Lanes()
        self.num_waiting = 0

    def __len__(self) -> int:
        return self.num_waiting


AnyLane = TypeVar("AnyLane", Lane, Lane | SharedLane)


class Lanes(Generic[AnyLane]):
    """Lanes of one level, none of them empty, by their accounts' counters. at_least: how many have so many requests."""

    __slots__ = ("at_least", "by_account", "heap", "num_added")

    def __init__(self) -> None:
        self.by_account: dict[Account, AnyLane] = {}
        self.heap: list[tuple[float, int, AnyLane]] = []
        self.at_least = RankCounts()
        self.num_added = 0

    def add(self, lane: AnyLane) -> None:
        self.by_account[lane.account] = lane
        self.num_added += 1
        heappush(self.heap, (lane.account.counter, self.num_added, lane))

    def drop(self, lane: AnyLane) -> None:
        lane.is_over = True
        del self.by_account[lane.account]
        if len(self.heap) > 2 * len(self.by_account) + 16:
            self.heap = [item for item in self.heap if not item[2].is_over]
            heapify(self.heap)

    def next(self) -> AnyLane | None:
        """The lane of the least counter, left at heap[0]; None without any.

        Counters only grow, so a stale key is too low and is put right when it surfaces.
        """
        heap = self.heap
        while heap:
            key, order, lane = heap[0]
            if lane.is_over:
                heappop(heap)
            elif lane.account.counter > key:
                heapreplace(heap, (lane.account.counter, order, lane))
            else:
                return lane
        return None

    def in_order(self) -> Generator[AnyLane, None, None]:
        """By counter, lowest first. The heap is whole again when the iterator is closed."""
        taken: list[tuple[float, int, AnyLane]] = []
        try:
            while (lane := self.next()) is not None:
                taken.append(heappop(self.heap))
                yield lane
        finally:
            for item in taken:
                heappush(self.heap, item)

    def num_ahead(self, rank: int, lane: AnyLane) -> int:
        """How many requests of these lanes are expected to go before the one that has `rank` of its lane ahead."""
        # For each request of ours ahead, one of each lane; then the lanes whose counter is lower.
        ahead = self.at_least.up_to(rank)
        level = self.at_least.at(rank + 1) - 1
        if level > 0 and len(self.by_account) > MAX_LANES_COMPARED:
            level //= 2
        elif level > 0:
            mine = lane.account.counter
            level = sum(
                1 for other in self.by_account.values() if len(other) > rank and other.account.counter < mine
            )
        return ahead + level


class PriorityClass:
    """The lanes of one priority. shared: the anonymous tenant's, while it has any request here.

    lane_of: the lane of an account that requests are accounted to, in lanes or in shared.
    """

    __slots__ = ("lane_of", "lanes", "num_bypassed", "num_waiting", "priority", "shared")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.lanes: Lanes[Lane | SharedLane] = Lanes()
        self.shared: SharedLane | None = None
        self.lane_of: dict[Account, Lane] = {}
        self.num_waiting = 0
        self.num_bypassed = 0

    def add(self, entry: Entry, *, shortest: bool) -> tuple[int, Lane]:
        """Gives the entry's lane and its place there."""
        lane = self.lane_of.get(entry.account)
        if lane is None:
            lane = self._open_lane(entry.account, shortest=shortest)
        place = lane.add(entry)
        self.num_waiting += 1
        if (shared := lane.shared) is not None:
            shared.num_waiting += 1
            shared.lanes.at_least.add(len(lane.keys), 1)
            self.lanes.at_least.add(shared.num_waiting, 1)
        else:
            self.lanes.at_least.add(len(lane.keys), 1)
        return place, lane

    def _open_lane(self, account: Account, *, shortest: bool) -> Lane:
        if not isinstance(account, Client):
            lane = Lane(account, None, shortest=shortest)
            self.lanes.add(lane)
        else:
            if self.shared is None:
                self.shared = SharedLane(account.tenant)
                self.lanes.add(self.shared)
            lane = Lane(account, self.shared, shortest=shortest)
            self.shared.lanes.add(lane)
        self.lane_of[account] = lane
        return lane

    def remove(self, place: int, lane: Lane) -> None:
        self.num_waiting -= 1
        if (shared := lane.shared) is None:
            self.lanes.at_least.add(len(lane.keys), -1)
            lane.remove(place)
            if not lane.keys:
                del self.lane_of[lane.account]
                self.lanes.drop(lane)
            return
        self.lanes.at_least.add(shared.num_waiting, -1)
        shared.lanes.at_least.add(len(lane.keys), -1)
        shared.num_waiting -= 1
        lane.remove(place)
        if not lane.keys:
            del self.lane_of[lane.account]
            shared.lanes.drop(lane)
        if not shared.num_waiting:
            self.lanes.drop(shared)
            self.shared = None

    def next_lane(self) -> Lane:
        """The lane whose turn it is."""
        lane = self.lanes.next()
        if isinstance(lane, SharedLane):
            lane = lane.lanes.next()
        assert lane is not None, "a class goes with its last request, and a lane with its last one"
        return lane

    def in_order(self) -> Generator[Lane, None, None]:
        """Lanes by their turn; those of one tenant's clients come together. To be closed."""
        with closing(self.lanes.in_order()) as lanes:
            for lane in lanes:
                if isinstance(lane, SharedLane):
                    with closing(lane.lanes.in_order()) as clients:
                        yield from clients
                else:
                    yield lane

    def entries(self) -> Iterator[Entry]:
        """All of them, in no useful order."""
        for lane in self.lane_of.values():
            yield from lane.entries
