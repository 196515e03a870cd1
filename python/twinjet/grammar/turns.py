"""Who may have a grammar worker next, and who has wasted too much of their time. One asyncio loop; no work here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from twinjet.errors import Overloaded, QuotaExcess
from twinjet.grammar.limits import GrammarLimits

_RETRY_AFTER_S = 1.0
_REGAINED_A_SECOND = 0.05
"""Of what a tenant has wasted. So nobody can hold more than a twentieth of a processor for long."""
_FREE_S = 1.0
"""Processor time of a compilation that served its purpose and counts for nothing."""


@dataclass(slots=True)
class _Tenant:
    running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class Turns:
    """Tenants have workers in turn, none more than its share."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits = limits
        self._share = max(1, limits.workers // 2)
        self._running = 0
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncGenerator[None, None]:
        """Hold a worker. Raises Overloaded if too many of this tenant's wait already."""
        tenant = self._tenants.setdefault(name, _Tenant())
        if len(tenant.waiting) >= self._limits.waiting:
            raise Overloaded(
                f"{len(tenant.waiting)} grammars of this tenant wait to be compiled",
                retry_after_s=_RETRY_AFTER_S,
            )
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tenant.waiting.append(granted)
        self._grant()
        try:
            await granted
        except BaseException:
            if granted.done() and not granted.cancelled():
                self._give_back(name)
            else:
                tenant.waiting.remove(granted)
                self._forget(name)
            raise
        try:
            yield
        finally:
            self._give_back(name)

    def _give_back(self, name: str) -> None:
        self._running -= 1
        self._tenants[name].running -= 1
        self._forget(name)
        self._grant()

    def _forget(self, name: str) -> None:
        tenant = self._tenants[name]
        if not tenant.running and not tenant.waiting:
            del self._tenants[name]

    def _grant(self) -> None:
        while self._running < self._limits.workers:
            name = next((n for n, t in self._tenants.items() if t.waiting and t.running < self._share), None)
            if name is None:
                return
            tenant = self._tenants[name]
            self._tenants.move_to_end(name)
            granted = tenant.waiting.popleft()
            if granted.done():
                continue
            tenant.running += 1
            self._running += 1
            granted.set_result(None)


class Waste:
    """Processor time that tenants spent on constraints that came to nothing, or that took very long."""

    def __init__(self, allowed_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed_s = allowed_s
        self._clock = clock
        self._regained_at: dict[str, float] = {}
        """When a tenant will have nothing wasted any more; who is not here has not."""

    def of(self, tenant: str) -> float:
        """Give what a tenant has wasted and not regained, in seconds."""
        return max(0.0, self._regained_at.get(tenant, 0.0) - self._clock()) * _REGAINED_A_SECOND

    def check(self, tenant: str) -> None:
        """Raise Overloaded while a tenant has wasted more than it may."""
        over_s = self.of(tenant) - self._allowed_s
        if over_s <= 0:
            return
        raise Overloaded(
            f"this tenant's refused constraints took more than {self._allowed_s:g} s of processor time; "
            "new ones are compiled again later",
            retry_after_s=over_s / _REGAINED_A_SECOND,
            quotas=(
                QuotaExcess(
                    f"tenant:{tenant}",
                    f"{self._allowed_s:g} s of processor time for constraints that are refused",
                ),
            ),
        )

    def charge(self, tenant: str, cpu_s: float, *, was_refused: bool) -> None:
        """Count a compilation."""
        wasted_s = cpu_s if was_refused else cpu_s - _FREE_S
        if wasted_s <= 0:
            return
        now = self._clock()
        self._regained_at = {name: at for name, at in self._regained_at.items() if at > now}
        self._regained_at[tenant] = (
            max(now, self._regained_at.get(tenant, now)) + wasted_s / _REGAINED_A_SECOND
        )
