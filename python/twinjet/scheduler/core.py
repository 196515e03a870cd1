"""The scheduler's decisions, over times it is given: who is refused, who goes next, what is held.

No clock of its own, no tasks, no gRPC. The dispatcher calls it; so do tests and the simulation.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, NoReturn, TypeVar, get_args

from twinjet._core import LengthEstimator
from twinjet.engines.base import EngineInfo
from twinjet.errors import (
    AlreadyExists,
    DeadlinePassed,
    DeadlineUnreachable,
    InvalidRequest,
    NotFound,
    Overloaded,
    QuotaExcess,
    Unavailable,
)
from twinjet.request import EngineRequest
from twinjet.scheduler.entry import ENDED, RUNNING, WAITING, Account, Client, Entry, Tenant, request_bytes
from twinjet.scheduler.events import Refusal, SchedulerLoad, TenantReading
from twinjet.scheduler.ledger import KvLedger
from twinjet.scheduler.meters import BackloggedRate, ForgetfulMean, WindowRate
from twinjet.scheduler.queue import FairQueue
from twinjet.scheduler.quota import RetryPacer, TokenBucket
from twinjet.scheduler.settings import SchedulerSettings

MAX_ACCOUNTS: Final = 10_000
"""Accounts kept of tenants, and of the anonymous one's clients; beyond, those are forgotten that were longest idle.

More are kept only while they have requests.
"""

_NUM_LOOKED_AT: Final = 4
"""How many accounts may be forgotten when one comes to rest: more than come, so that too many are not kept for long."""

MAX_TIMES_LEFT: Final = 8
"""A client of the anonymous tenant may hold so many times what it leaves free of a limit of the queue or of streams."""

MIN_OBSERVED: Final = 32
"""Finished requests of a tenant after which its own output lengths count, not those of all."""


_Kept = TypeVar("_Kept", Tenant, Client)


class Scheduler:
    """Admission, order and accounts of one deployment. Times are seconds of one monotonic clock."""

    __slots__ = (
        "_account_at", "_anonymous", "_attached", "_cached_weight", "_clients", "_deadlines", "_draining",
        "_early_tokens", "_entries", "_fair", "_first_token_s", "_free_indexes", "_input_weight", "_is_blocked",
        "_ledger", "_lengths", "_many_waiting", "_many_waiting_bytes", "_many_waiting_tokens", "_max_running",
        "_num_arrivals", "_num_expired", "_num_leaving", "_num_running", "_num_running_sequences", "_output_rate",
        "_output_weight", "_pacer", "_per_token_s", "_prompt_rate", "_queue", "_refused", "_served_work",
        "_tenants", "_waiting_bytes", "_waiting_tokens", "_waiting_work", "_work_rate", "settings",
    )  # fmt: skip

    def __init__(self, settings: SchedulerSettings) -> None:
        # Settings that every request needs are copied: reading one from the model costs more than using it.
        self.settings = settings
        self._fair = settings.policy == "fair"
        self._early_tokens = settings.early_tokens if self._fair else 0
        self._input_weight = settings.input_token_weight
        self._cached_weight = settings.cached_token_weight
        self._output_weight = settings.output_token_weight
        self._many_waiting = _many(settings.max_waiting)
        self._many_waiting_tokens = _many(settings.max_waiting_tokens)
        self._many_waiting_bytes = _many(settings.max_waiting_bytes)
        self._queue = FairQueue(
            shortest=settings.tenant_order == "shortest",
            prefix_window=settings.prefix_window,
            max_overtakes=settings.max_overtakes,
            max_bypass=settings.max_bypass,
            patience=settings.priority_patience,
        )
        self._entries: dict[str, Entry] = {}
        self._tenants: OrderedDict[str, Tenant] = OrderedDict()
        self._clients: OrderedDict[str, Client] = OrderedDict()
        self._account_at: list[Account | None] = []
        self._free_indexes: list[int] = []
        self._deadlines: list[tuple[float, int, Entry]] = []
        self._num_arrivals = 0
        self._attached = False
        self._draining = False
        self._max_running = 0
        self._ledger: KvLedger | None = None
        self._num_running = 0
        self._num_running_sequences = 0
        self._num_leaving = 0
        self._is_blocked = False
        self._waiting_tokens = 0
        self._waiting_bytes = 0
        self._waiting_work = 0.0
        self._served_work = 0.0
        self._lengths = LengthEstimator(settings.default_output_tokens)
        self._anonymous = self._new_tenant("", 0.0)
        self._prompt_rate = WindowRate()
        self._output_rate = WindowRate()
        self._work_rate = BackloggedRate()
        self._first_token_s = ForgetfulMean()
        self._per_token_s = ForgetfulMean()
        self._pacer = RetryPacer(settings.min_retry_s, settings.max_retry_s)
        self._refused: dict[Refusal, int] = dict.fromkeys(get_args(Refusal), 0)
        self._num_expired = 0

    # The engine's life.

    def attach(self, info: EngineInfo) -> None:
        """Size everything to an engine that has started; nothing may be running."""
        if self._num_running:
            raise RuntimeError("attach with requests running")
        s = self.settings
        self._attached = True
        self._max_running = s.max_running or info.limits.max_num_seqs
        self._ledger = None
        if info.kv_cache is not None and self._fair:
            estimates = s.output_reserve == "estimate" and not info.kv_cache.reserves_output
            self._ledger = KvLedger(
                info.kv_cache.num_blocks,
                info.kv_cache.block_size,
                prefix_cache="prefix_cache" in info.capabilities,
                headroom=s.kv_headroom,
                lookahead_tokens=s.lookahead_tokens,
                sigmas=s.reserve_sigmas if estimates else None,
                longest=info.limits.max_context_tokens,
            )

    def detach(self) -> None:
        """No engine from now on. The caller releases every request first."""
        self._attached = False
        self._ledger = None

    def drain(self) -> None:
        self._draining = True

    def reset_prefix_cache(self) -> bool:
        """The engine has forgotten its cached prefixes: so does the ledger. False while anything runs."""
        return self._ledger is None or self._ledger.reset()

    @property
    def max_running(self) -> int:
        return self._max_running

    @property
    def num_waiting(self) -> int:
        return self._queue.num_waiting

    @property
    def is_idle(self) -> bool:
        return not self._entries

    # A request's life: offer, then take (state RUNNING), then release. Release ends it from any state.

    def offer(self, request: EngineRequest, now: float) -> Entry:
        """Take a request into the queue.

        Raises Unavailable, AlreadyExists, DeadlinePassed, Overloaded, InvalidRequest (the prompt alone
        exceeds the KV cache); then nothing has changed but counters of refusals.
        """
        self._check_open(request.request_id)
        entry = self._new_entry(request, now)
        try:
            self._check(entry, now)
        except DeadlinePassed:
            self._refused["deadline"] += 1
            raise
        except Overloaded as error:
            self._refused["quota" if error.quotas else "queue_full"] += 1
            raise
        except InvalidRequest:
            self._refused["too_large"] += 1
            raise
        self._enter(entry, now)
        if self._fair and self.settings.predict_deadlines and entry.deadline < math.inf:
            self._check_deadline(entry, now)
        return entry

    def check_before(self, request_id: str, tenant_name: str, client_address: str, now: float) -> None:
        """Raise what offer() would, whatever the prompt: Unavailable, AlreadyExists, Overloaded."""
        self._check_open(request_id)
        if not self._fair:
            return
        try:
            tenant = self._tenants.get(tenant_name) if tenant_name else self._anonymous
            client = None if tenant_name else self._clients.get(client_address)
            if tenant is not None and tenant.has_quota:
                self._check_streams(tenant, client, now)
            if self._queue.num_waiting >= self._many_waiting:
                num_waiting = 0 if client is None else client.num_waiting
                self._check_limit(
                    self.settings.max_waiting, "requests", self._queue.num_waiting, 1, num_waiting, now
                )
        except Overloaded as error:
            self._refused["quota" if error.quotas else "queue_full"] += 1
            raise

    def _check_open(self, request_id: str) -> None:
        if self._draining:
            raise Unavailable("the server is draining", reason="DRAINING", retry_after_s=1.0)
        if not self._attached:
            raise Unavailable(
                "the model is loading", reason="LOADING", retry_after_s=self.settings.loading_retry_s
            )
        if request_id in self._entries:
            raise AlreadyExists("request", request_id)

    def take(self, now: float) -> Entry | None:
        """Admit the next request to the engine; None if none can go. Call until it returns None."""
        if not self._attached or not self._queue.num_waiting:
            return None
        if self._fair and self._num_running_sequences - self._num_leaving >= self._max_running:
            return None
        self._work_rate.observe(now, self._served_work, backlogged=True)
        ledger = self._ledger
        entry = self._queue.take_next(self._fits, None if ledger is None else ledger.find_longest)
        self._is_blocked = entry is None
        if entry is None:
            return None
        self._leave_queue(entry)
        account, num_prompt_tokens = entry.account, entry.num_prompt_tokens
        entry.state = RUNNING
        entry.dispatched_at = now
        self._num_running += 1
        self._num_running_sequences += entry.num_sequences
        entry.tenant.num_running += 1
        if account is not entry.tenant:
            account.num_running += 1
        self._prompt_rate.add(now, num_prompt_tokens)
        cached = 0
        if ledger is not None and entry.holding is not None:
            cached = ledger.num_cached_tokens(entry.holding)
        work = (num_prompt_tokens - cached) * self._input_weight + cached * self._cached_weight
        self._charge(account, work, num_prompt_tokens)
        return entry

    def prompt_done(self, entry: Entry) -> None:
        """The engine has taken up the prompt."""
        if entry.holding is not None and self._ledger is not None:
            self._ledger.publish(entry.holding)

    def add_tokens(self, entry: Entry, output_index: int, token_ids: Sequence[int], now: float) -> bool:
        """Account for tokens that streamed; True if that may let another request go."""
        count = len(token_ids)
        if not count:
            return False
        if entry.first_token_at is None:
            entry.first_token_at = now
            self._first_token_s.add(now, now - entry.dispatched_at)
        entry.last_token_at = now
        entry.num_output_tokens += count
        if entry.holding is not None and self._ledger is not None:
            self._ledger.append(entry.holding, output_index, count)
        self._output_rate.add(now, count)
        self._charge(entry.account, count * self._output_weight, count)
        if entry.num_output_tokens < entry.leaves_at or entry.is_leaving:
            return False
        entry.is_leaving = True
        self._num_leaving += 1
        return self._queue.num_waiting > 0

    # The same for requests whose tokens the pump counts. It appends to the ledger itself.

    @property
    def ledger(self) -> KvLedger | None:
        return self._ledger

    def add_step(self, num_tokens: int, accounts: Iterable[tuple[int, int]], now: float) -> None:
        """Account for the tokens of a step: in all, and by Account.index."""
        self._output_rate.add(now, num_tokens)
        for index, count in accounts:
            assert index >= 0, "what has no requests has no tokens"
            account = self._account_at[index]
            if account is not None:
                self._charge(account, count * self._output_weight, count)

    def first_token(self, entry: Entry, now: float) -> None:
        """The request's first tokens have come."""
        entry.first_token_at = now
        self._first_token_s.add(now, now - entry.dispatched_at)

    def leaving(self, entry: Entry) -> None:
        """The request has so few tokens to go that another may follow it."""
        if not entry.is_leaving:
            entry.is_leaving = True
            self._num_leaving += 1

    def release(self, entry: Entry, now: float, *, finished: bool = False) -> None:
        """Forget a request, in whatever state. finished: it ran to its end. Idempotent."""
        if entry.state is ENDED:
            return
        account = entry.account
        backlogged = self._queue.num_waiting > 0
        if entry.state is WAITING:
            self._queue.remove(entry)
            self._leave_queue(entry)
        else:
            self._num_running -= 1
            self._num_running_sequences -= entry.num_sequences
            entry.tenant.num_running -= 1
            if account is not entry.tenant:
                account.num_running -= 1
            self._num_leaving -= entry.is_leaving
            if entry.holding is not None and self._ledger is not None:
                self._ledger.release(entry.holding)
            entry.holding = None
            self._learn(entry, finished=finished)
            per_output = entry.num_output_tokens // entry.num_sequences
            if entry.first_token_at is not None and per_output > 1:
                self._per_token_s.add(now, (entry.last_token_at - entry.first_token_at) / (per_output - 1))
        self._work_rate.observe(now, self._served_work, backlogged=backlogged)
        entry.state = ENDED
        del self._entries[entry.request_id]
        if account.num_running == 0 and account.num_waiting == 0:
            self._rest(account)
        if len(self._deadlines) > 2 * len(self._entries) + 64:
            self._deadlines = [item for item in self._deadlines if item[2].state is not ENDED]
            heapq.heapify(self._deadlines)

    def find(self, request_id: str) -> Entry:
        """Raises NotFound."""
        entry = self._entries.get(request_id)
        if entry is None:
            raise NotFound("request", request_id)
        return entry

    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries.values())

    # Deadlines.

    def next_deadline(self) -> float | None:
        """When expired() will next have something to give; None if never."""
        heap = self._deadlines
        while heap and heap[0][2].state is ENDED:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def expired(self, now: float) -> list[Entry]:
        """Requests whose deadline has passed, each given once. The caller ends and releases them."""
        found = []
        heap = self._deadlines
        while heap and (heap[0][0] <= now or heap[0][2].state is ENDED):
            entry = heapq.heappop(heap)[2]
            if entry.state is not ENDED:
                entry.expired = True
                self._num_expired += 1
                found.append(entry)
        return found

    # Visibility.

    def position(self, entry: Entry) -> int:
        return self._queue.position(entry) if entry.state is WAITING else 0

    def expected_wait_s(self, entry: Entry, now: float) -> float | None:
        """Predicted seconds until the request goes; None before enough was measured."""
        return self._wait_s(self.position(entry), now)

    def totals(self, now: float) -> SchedulerLoad:
        """The load without tenants and request ids, in constant time."""
        ledger = self._ledger
        return SchedulerLoad(
            waiting=self._queue.num_waiting,
            running=self._num_running,
            waiting_tokens=self._waiting_tokens,
            prompt_tokens_per_s=self._prompt_rate.rate(now),
            output_tokens_per_s=self._output_rate.rate(now),
            kv_blocks_total=ledger.num_blocks if ledger else None,
            kv_blocks_used=ledger.num_used_blocks if ledger else None,
            kv_overflows=ledger.num_overflows if ledger else 0,
            refused=sum(self._refused.values()),
            refused_by_reason=dict(self._refused),
            expired=self._num_expired,
            expected_wait_s=self._wait_s(self._queue.num_waiting, now),
        )

    def load(self, now: float) -> SchedulerLoad:
        """All of the load; takes as long as there are tenants and requests."""
        busy = [account for account in self._account_at if account is not None]
        tenants = [account for account in busy if isinstance(account, Tenant)]
        if len(tenants) < len(busy):
            tenants.append(self._anonymous)
        return replace(
            self.totals(now),
            tenants={t.name: TenantReading(t.num_waiting, t.num_running, t.served) for t in tenants},
            request_ids=tuple(self._entries),
        )

    # Admission to the queue.

    def _new_entry(self, request: EngineRequest, now: float) -> Entry:
        account: Account
        if name := request.tenant:
            account = self._tenants.get(name) or self._new_tenant(name, now)
        else:
            address = request.client_address
            account = self._clients.get(address) or self._new_client(address, now)
        self._num_arrivals += 1
        entry = Entry(request, account, self._num_arrivals, now, request_bytes(request))
        max_tokens = entry.max_tokens
        if self._early_tokens and entry.num_sequences == 1:
            entry.leaves_at = max(1, max_tokens - self._early_tokens)
        expected = float(max_tokens) if entry.is_fixed else entry.tenant.lengths.mean(max_tokens)
        entry.expected_output = expected
        output_work = expected * entry.num_sequences * self._output_weight
        entry.work = entry.num_prompt_tokens * self._input_weight + output_work
        return entry

    def _new_tenant(self, name: str, now: float) -> Tenant:
        settings = self.settings.tenant(name)
        tenant = Tenant(name, settings, self._new_bucket(settings.tokens_per_minute, now), self._lengths)
        if not name and self.settings.address_tokens_per_minute:
            tenant.has_quota = True
        return tenant

    def _new_client(self, address: str, now: float) -> Client:
        bucket = self._new_bucket(self.settings.address_tokens_per_minute, now)
        return Client(address, self._anonymous, bucket)

    def _new_bucket(self, tokens_per_minute: int, now: float) -> TokenBucket | None:
        return TokenBucket(tokens_per_minute, now) if tokens_per_minute and self._fair else None

    def _check(self, entry: Entry, now: float) -> None:
        if entry.deadline <= now:
            raise DeadlinePassed("the deadline had passed when the request arrived")
        if not self._fair:
            return
        if self._ledger is not None and not self._ledger.can_ever_hold(
            entry.num_prompt_tokens, entry.num_sequences
        ):
            raise InvalidRequest.of(
                "prompt",
                f"{entry.num_prompt_tokens} tokens for {entry.num_sequences} outputs exceed the model's KV "
                f"cache of {self._ledger.num_blocks} blocks",
            )
        if entry.tenant.has_quota:
            self._check_quota(entry, now)
        if (
            entry.tenant.has_limits
            or self._queue.num_waiting >= self._many_waiting
            or self._waiting_tokens + entry.num_prompt_tokens > self._many_waiting_tokens
            or self._waiting_bytes + entry.num_bytes > self._many_waiting_bytes
        ):
            self._check_room(entry, now)

    def _check_streams(self, tenant: Tenant, client: Client | None, now: float) -> None:
        """client: of the anonymous tenant, None if it is not known or the tenant is another."""
        limit = tenant.settings.max_streams
        if limit == 0:
            return
        text = f"{limit} concurrent streams"
        num_open = tenant.num_waiting + tenant.num_running
        if num_open >= limit:
            raise Overloaded(
                f"tenant {tenant.name!r} has reached its quota of {text}",
                retry_after_s=self._retry_s(now),
                quotas=(QuotaExcess(f"tenant:{tenant.name}", text),),
            )
        num_own = 0 if client is None else client.num_waiting + client.num_running
        if client is not None and _is_too_much(num_own, 1, limit - num_open):
            raise Overloaded(
                f"{num_own} of {text} of all who name no tenant are from this address, and the rest is kept for others",
                retry_after_s=self._retry_s(now),
                quotas=(QuotaExcess(f"address:{client.name}", text),),
            )

    def _check_quota(self, entry: Entry, now: float) -> None:
        account, num_tokens = entry.account, entry.num_prompt_tokens
        client = account if isinstance(account, Client) else None
        self._check_streams(entry.tenant, client, now)
        self._check_tokens(entry.tenant, "tenant", entry.tenant.settings.tokens_per_minute, num_tokens, now)
        if client is not None:
            self._check_tokens(client, "address", self.settings.address_tokens_per_minute, num_tokens, now)

    def _check_tokens(self, account: Account, kind: str, quota: int, num_tokens: int, now: float) -> None:
        """Refuse a prompt that an account's tokens a minute leave no room for yet."""
        if account.bucket is None:
            return
        wait = account.bucket.wait_s(now, num_tokens, account.waiting_tokens)
        if wait > 0:
            text = f"{quota} tokens a minute"
            raise Overloaded(
                f"{kind} {account.name!r} has spent its quota of {text}",
                retry_after_s=min(max(wait, self.settings.min_retry_s), self.settings.max_retry_s),
                quotas=(QuotaExcess(f"{kind}:{account.name}", text),),
            )

    def _check_room(self, entry: Entry, now: float) -> None:
        """Refuse what a limit leaves no room for, and name the limit."""
        s, t, tenant, account = self.settings, entry.tenant.settings, entry.tenant, entry.account
        requests, tokens, size = 0, 0, 0
        if isinstance(account, Client):
            requests, tokens, size = account.num_waiting, account.waiting_tokens, account.waiting_bytes
        for limits, of, waiting in (
            (s, "", (self._queue.num_waiting, self._waiting_tokens, self._waiting_bytes)),
            (t, " of one tenant", (tenant.num_waiting, tenant.waiting_tokens, tenant.waiting_bytes)),
        ):
            self._check_limit(limits.max_waiting, f"requests{of}", waiting[0], 1, requests, now)
            self._check_limit(
                limits.max_waiting_tokens,
                f"prompt tokens{of}",
                waiting[1],
                entry.num_prompt_tokens,
                tokens,
                now,
            )
            self._check_limit(limits.max_waiting_bytes, f"bytes{of}", waiting[2], entry.num_bytes, size, now)

    def _check_limit(
        self, limit: int, unit: str, held: int, wanted: int, held_by_client: int, now: float
    ) -> None:
        """Refuse `wanted` more if a limit, 0 for none, has no room or the client would leave too little to others.

        held_by_client: 0 if it is a named tenant's request.
        """
        if limit == 0:
            return
        if held + wanted > limit:
            self._refuse_full(f"{limit} {unit} are allowed", now)
        if _is_too_much(held_by_client, wanted, limit - held):
            self._refuse_full(
                f"of {limit} {unit} {held_by_client} are from this address, which names no tenant, and the rest is "
                "kept for others",
                now,
            )

    def _refuse_full(self, why: str, now: float) -> NoReturn:
        raise Overloaded(f"the queue is full: {why}", retry_after_s=self._retry_s(now))

    def _check_deadline(self, entry: Entry, now: float) -> None:
        """Refuse a queued request that would miss its deadline at the measured speeds."""
        wait = self.expected_wait_s(entry, now)
        if wait is None:
            return
        per_token = self._per_token_s.value(now) or 0.0
        first_token = self._first_token_s.value(now) or 0.0
        needed = wait + first_token + (entry.expected_output - 1) * per_token
        left = entry.deadline - now
        if needed * self.settings.deadline_confidence > left:
            self.release(entry, now)
            self._refused["deadline"] += 1
            raise DeadlineUnreachable(
                f"the request is predicted to need {needed:.2f} s, of which {wait:.2f} s in the queue; its "
                f"deadline is in {left:.2f} s"
            )

    def _enter(self, entry: Entry, now: float) -> None:
        tenant, account = entry.tenant, entry.account
        num_tokens, num_bytes = entry.num_prompt_tokens, entry.num_bytes
        if account.num_waiting == 0 and account.num_running == 0:
            self._wake(account)
        self._entries[entry.request_id] = entry
        if self._ledger is not None:
            entry.prefix_hashes = self._ledger.hash(entry.request)
        if not self._queue.num_waiting:
            # The time without a queue ends here; it says nothing about how fast one drains.
            self._work_rate.observe(now, self._served_work, backlogged=False)
        entry.position_at_arrival = self._queue.push(entry)
        tenant.waiting_tokens += num_tokens
        tenant.waiting_bytes += num_bytes
        if account is not tenant:
            account.waiting_tokens += num_tokens
            account.waiting_bytes += num_bytes
        self._waiting_tokens += num_tokens
        self._waiting_bytes += num_bytes
        self._waiting_work += entry.work
        if entry.deadline < math.inf:
            heapq.heappush(self._deadlines, (entry.deadline, entry.order, entry))

    def _leave_queue(self, entry: Entry) -> None:
        tenant, account = entry.tenant, entry.account
        num_tokens, num_bytes = entry.num_prompt_tokens, entry.num_bytes
        tenant.waiting_tokens -= num_tokens
        tenant.waiting_bytes -= num_bytes
        if account is not tenant:
            account.waiting_tokens -= num_tokens
            account.waiting_bytes -= num_bytes
        self._waiting_tokens -= num_tokens
        self._waiting_bytes -= num_bytes
        self._waiting_work = self._waiting_work - entry.work if self._queue.num_waiting else 0.0

    # Admission to the engine.

    def _fits(self, entry: Entry) -> bool:
        if not self._fair:
            return True
        staying = self._num_running_sequences - self._num_leaving
        if staying + entry.num_sequences > self._max_running and self._num_running:
            return False
        if self._ledger is None:
            return True
        entry.holding = self._ledger.hold(
            entry.prefix_hashes, entry.num_prompt_tokens, entry.num_sequences, entry.max_tokens,
            entry.is_fixed, entry.tenant.lengths,
        )  # fmt: skip
        return entry.holding is not None

    # Accounts.

    def _wake(self, account: Account) -> None:
        """The account, which may be new, gets its first request."""
        if isinstance(account, Client):
            self._clients[account.name] = account
        else:
            self._tenants[account.name] = account
        if not self._free_indexes:
            self._free_indexes.append(len(self._account_at))
            self._account_at.append(None)
        index = account.index = self._free_indexes.pop()
        self._account_at[index] = account

    def _rest(self, account: Account) -> None:
        """The account's last request has ended."""
        self._account_at[account.index] = None
        self._free_indexes.append(account.index)
        account.index = -1
        if isinstance(account, Client):
            self._clients.move_to_end(account.name)
            if len(self._clients) > MAX_ACCOUNTS:
                _forget_some(self._clients)
        else:
            self._tenants.move_to_end(account.name)
            if len(self._tenants) > MAX_ACCOUNTS:
                _forget_some(self._tenants)

    def _charge(self, account: Account, work: float, num_tokens: int) -> None:
        if isinstance(account, Client):
            account.counter += work
            if account.bucket is not None:
                account.bucket.take(num_tokens)
            account = account.tenant
        account.counter += work / account.weight
        account.served += work
        if account.bucket is not None:
            account.bucket.take(num_tokens)
        self._served_work += work

    def _learn(self, entry: Entry, *, finished: bool) -> None:
        tenant = entry.tenant
        if not entry.num_output_tokens or entry.is_fixed:
            return
        length = entry.num_output_tokens // entry.num_sequences
        complete = finished and length < entry.max_tokens
        self._lengths.observe(length, complete)
        if tenant.own_lengths is not None:
            tenant.own_lengths.observe(length, complete)
            return
        tenant.first_lengths.append((length, complete))
        if len(tenant.first_lengths) >= MIN_OBSERVED:
            own = tenant.own_lengths = tenant.lengths = LengthEstimator(self.settings.default_output_tokens)
            for observed in tenant.first_lengths:
                own.observe(*observed)
            tenant.first_lengths.clear()

    def _wait_s(self, position: int, now: float) -> float | None:
        staying = self._num_running_sequences - self._num_leaving
        free = 0 if self._is_blocked else self._max_running - staying
        ahead = position + 1 - max(free, 0)
        if ahead <= 0:
            return 0.0
        interval = self._interval_s(now)
        return None if interval is None else ahead * interval

    def _interval_s(self, now: float) -> float | None:
        """Seconds between two dispatches at the measured speed."""
        rate = self._work_rate.rate(now)
        if rate is None or not self._queue.num_waiting:
            return None
        return self._waiting_work / self._queue.num_waiting / rate

    def _retry_s(self, now: float) -> float:
        interval = self._interval_s(now)
        return self._pacer.delay_s(now, self.settings.min_retry_s if interval is None else interval)


def _is_too_much(held: int, wanted: int, left: int) -> bool:
    """Whether an address that holds some of a limit, of which so much is left, may not have more; 0 held: it may."""
    return held > 0 and held + wanted > MAX_TIMES_LEFT * left


def _many(limit: int) -> float:
    """How much may wait, of a limit or 0 for none, before anybody has to be asked how much of it is theirs."""
    return limit * MAX_TIMES_LEFT // (MAX_TIMES_LEFT + 1) if limit else math.inf


def _forget_some(accounts: OrderedDict[str, _Kept]) -> None:
    """Of too many, forget some of those that were longest idle."""
    for _ in range(_NUM_LOOKED_AT):
        if len(accounts) <= MAX_ACCOUNTS:
            return
        first = next(iter(accounts.values()))
        if first.index >= 0:  # it has requests
            accounts.move_to_end(first.name)
        else:
            del accounts[first.name]
