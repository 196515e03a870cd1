"""The order of the scheduler's queue, said slowly: lists, linear scans, no heaps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelRequest:
    """client: matters where the tenant is "" alone."""

    request_id: str
    tenant: str
    client: str
    priority: int
    num_prompt_tokens: int
    order: int

    @property
    def accounts(self) -> list[str]:
        """Names of its accounts, each within the one before."""
        return [self.tenant] if self.tenant else ["", f"/{self.client}"]


@dataclass
class QueueModel:
    """Priority classes with patience; in a class the tenant with the least counter; among those of the tenant "" the client
    with the least counter; then the order.
    """

    shortest: bool
    max_overtakes: int
    patience: int
    waiting: list[ModelRequest] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    last_counters: list[float] = field(default_factory=lambda: [0.0, 0.0])
    lane_ages: dict[tuple[int, str], int] = field(default_factory=dict)
    overtakes: dict[tuple[int, str], int] = field(default_factory=dict)
    bypassed: dict[int, int] = field(default_factory=dict)
    num_lanes: int = 0

    def push(self, request: ModelRequest) -> None:
        for level, account in enumerate(request.accounts):
            others = self.waiting_at(level)
            if account not in others:
                least = min((self.counters[a] for a in others), default=self.last_counters[level])
                self.counters[account] = max(self.counters.get(account, 0.0), least)
            lane = (request.priority, account)
            if lane not in self.lane_ages:
                self.num_lanes += 1
                self.lane_ages[lane] = self.num_lanes
                self.overtakes[lane] = 0
        self.bypassed.setdefault(request.priority, 0)
        self.waiting.append(request)

    def waiting_at(self, level: int) -> set[str]:
        return {r.accounts[level] for r in self.waiting if len(r.accounts) > level}

    def remove(self, request: ModelRequest) -> None:
        self.waiting.remove(request)
        for level, account in enumerate(request.accounts):
            lane = (request.priority, account)
            if not any(
                (r.priority, r.accounts[level : level + 1]) == (lane[0], [account]) for r in self.waiting
            ):
                del self.lane_ages[lane]
                del self.overtakes[lane]
            if account not in self.waiting_at(level):
                self.last_counters[level] = self.counters[account]
        if not any(r.priority == request.priority for r in self.waiting):
            del self.bypassed[request.priority]

    def take(self) -> ModelRequest:
        priority = max(self.bypassed)
        if self.patience and len(self.bypassed) > 1:
            most = max(self.bypassed.values())
            if most >= self.patience:
                priority = max(p for p, count in self.bypassed.items() if count == most)
        lane = [r for r in self.waiting if r.priority == priority]
        for level in range(2):
            accounts = {r.accounts[level] for r in lane if len(r.accounts) > level}
            if accounts:
                turn = min(accounts, key=lambda a: (self.counters[a], self.lane_ages[(priority, a)]))
                lane = [r for r in lane if r.accounts[level] == turn]
        oldest = min(lane, key=lambda r: r.order)
        chosen = oldest
        if self.shortest and self.overtakes[(priority, turn)] < self.max_overtakes:
            chosen = min(lane, key=lambda r: (r.num_prompt_tokens, r.order))
        if chosen is oldest:
            self.overtakes[(priority, turn)] = 0
        else:
            self.overtakes[(priority, turn)] += 1
        self.bypassed[priority] = 0
        for other in self.bypassed:
            if other < priority:
                self.bypassed[other] += 1
        self.remove(chosen)
        return chosen
