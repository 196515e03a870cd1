"""The order of the scheduler's queue, said slowly: lists, linear scans, no heaps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelRequest:
    request_id: str
    tenant: str
    priority: int
    num_prompt_tokens: int
    order: int


@dataclass
class QueueModel:
    """Priority classes with patience; in a class the tenant with the least counter; in a tenant the order."""

    shortest: bool
    max_overtakes: int
    patience: int
    waiting: list[ModelRequest] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    last_counter: float = 0.0
    lane_ages: dict[tuple[int, str], int] = field(default_factory=dict)
    overtakes: dict[tuple[int, str], int] = field(default_factory=dict)
    bypassed: dict[int, int] = field(default_factory=dict)
    num_lanes: int = 0

    def push(self, request: ModelRequest) -> None:
        tenants = {r.tenant for r in self.waiting}
        if request.tenant not in tenants:
            least = min((self.counters[t] for t in tenants), default=self.last_counter)
            self.counters[request.tenant] = max(self.counters.get(request.tenant, 0.0), least)
        lane = (request.priority, request.tenant)
        if lane not in self.lane_ages:
            self.num_lanes += 1
            self.lane_ages[lane] = self.num_lanes
            self.overtakes[lane] = 0
        self.bypassed.setdefault(request.priority, 0)
        self.waiting.append(request)

    def remove(self, request: ModelRequest) -> None:
        self.waiting.remove(request)
        lane = (request.priority, request.tenant)
        if not any((r.priority, r.tenant) == lane for r in self.waiting):
            del self.lane_ages[lane]
            del self.overtakes[lane]
        if not any(r.priority == request.priority for r in self.waiting):
            del self.bypassed[request.priority]
        if not any(r.tenant == request.tenant for r in self.waiting):
            self.last_counter = self.counters[request.tenant]

    def take(self) -> ModelRequest:
        priority = max(self.bypassed)
        if self.patience and len(self.bypassed) > 1:
            most = max(self.bypassed.values())
            if most >= self.patience:
                priority = max(p for p, count in self.bypassed.items() if count == most)
        group = [r for r in self.waiting if r.priority == priority]
        tenant = min(
            {r.tenant for r in group}, key=lambda t: (self.counters[t], self.lane_ages[(priority, t)])
        )
        lane = [r for r in group if r.tenant == tenant]
        oldest = min(lane, key=lambda r: r.order)
        chosen = oldest
        if self.shortest and self.overtakes[(priority, tenant)] < self.max_overtakes:
            chosen = min(lane, key=lambda r: (r.num_prompt_tokens, r.order))
        if chosen is oldest:
            self.overtakes[(priority, tenant)] = 0
        else:
            self.overtakes[(priority, tenant)] += 1
        self.bypassed[priority] = 0
        for other in self.bypassed:
            if other < priority:
                self.bypassed[other] += 1
        self.remove(chosen)
        return chosen
