"""vLLM's KVCacheManager interface on the native block manager, for one full-attention group.

Makes the decisions of vLLM's own manager (hits, admission, order of eviction), so a scheduler cannot
tell them apart. What belongs to features the native path leaves to vLLM (connectors, several groups,
copy-on-write tails) is either empty here or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.request import Request, RequestStatus

from twinjet._core import BlockManager

from .kv_events import KvEventSender

_WATERMARKED = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class NativeBlocks(KVCacheBlocks):  # type: ignore[misc]
    """Block ids of one group; KVCacheBlock objects are made only when somebody asks for them."""

    __slots__ = ("ids", "manager")

    def __init__(self, manager: BlockManager, ids: Sequence[int]) -> None:
        self.manager = manager
        self.ids = ids

    @property
    def blocks(self) -> tuple[Sequence[KVCacheBlock], ...]:
        return ([_make_block(self.manager, block, i) for i, block in enumerate(self.ids)],)

    def __add__(self, other: KVCacheBlocks) -> NativeBlocks:
        return NativeBlocks(self.manager, [*self.ids, *other.get_block_ids()[0]])

    def get_block_ids(
        self, allow_none: bool = False, *, group_ids: Sequence[int] | None = None
    ) -> tuple[list[int], ...] | None:
        if group_ids is not None:
            groups: tuple[list[int], ...] = tuple([list(self.ids)][group] for group in group_ids)
            return None if allow_none and not any(groups) else groups
        return None if allow_none and not self.ids else (list(self.ids),)

    def get_unhashed_block_ids(self) -> list[int]:
        return [block for block in self.ids if self.manager.block_hash(block) is None]

    def get_unhashed_block_ids_all_groups(self) -> list[list[int]]:
        return [self.get_unhashed_block_ids()]

    def new_empty(self) -> NativeBlocks:
        return NativeBlocks(self.manager, ())

    def __repr__(self) -> str:
        return f"NativeBlocks({list(self.ids)})"


def _make_block(manager: BlockManager, block: int, index: int) -> KVCacheBlock:
    made = KVCacheBlock(block_id=block, ref_cnt=manager.reference_count(block))
    block_hash = manager.block_hash(block)
    if block_hash is not None:
        made.set_block_hash(
            make_block_hash_with_group_id(block_hash, 0), num_tokens=(index + 1) * manager.block_size
        )
    return made


class NativeBlockPool:
    """The part of vLLM's BlockPool that code outside its KV-cache manager uses."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self.num_gpu_blocks = manager.num_blocks
        self.enable_caching = manager.prefix_cache

    def get_num_free_blocks(self) -> int:
        return self._manager.num_free_blocks

    def get_usage(self) -> float:
        # vLLM's own arithmetic, so that reported numbers are the same to the last bit.
        total = self.num_gpu_blocks - 1
        return 1.0 - (self._manager.num_free_blocks / total) if total else 0

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        self._manager.evict(list(block_ids))

    def reset_prefix_cache(self) -> bool:
        return self._manager.reset()

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        self._manager.free_blocks([block.block_id for block in ordered_blocks])

    def take_events(self) -> list[Any]:
        return []


class NativeKVCacheManager:
    """Stands in for vLLM's KVCacheManager; takes its configuration over from the one it replaces."""

    def __init__(
        self, stock: KVCacheManager, manager: BlockManager, events: KvEventSender | None = None
    ) -> None:
        self.manager = manager
        self.events = events
        # request id -> sequence of the native manager
        self.sequences: dict[str, int] = {}
        # Requests that vLLM would see beside those in `running`: a scheduler hides rows while it lets
        # stock code work on the rest.
        self.has_hidden_requests = False
        # Frees put off so that they happen in the order of a step's rows; None: free at once.
        self._put_off: list[str] | None = None

        self.max_model_len: int = stock.max_model_len
        self.enable_caching: bool = stock.enable_caching
        self.enable_kv_cache_events = False
        self.use_eagle = False
        self.log_stats: bool = stock.log_stats
        self.metrics_collector = None
        self.prefix_cache_stats = PrefixCacheStats() if self.log_stats else None
        self.num_kv_cache_groups = 1
        self.retained_hit_group_ids: tuple[int, ...] = ()
        self.kv_cache_config = stock.kv_cache_config
        self.watermark_blocks: int = stock.watermark_blocks
        self.kv_cache_event_metadata = stock.kv_cache_event_metadata
        self.mamba_shared_prefix_checkpoint = False
        self.block_pool = NativeBlockPool(manager)
        group = stock.coordinator.single_type_managers[0]
        self.coordinator = SimpleNamespace(
            single_type_managers=(
                SimpleNamespace(
                    block_size=group.block_size,
                    kv_cache_spec=group.kv_cache_spec,
                    kv_cache_group_id=0,
                    enable_caching=self.enable_caching,
                    records_new_block_ids=False,
                    use_eagle=False,
                    req_to_blocks=_TablesView(self),
                ),
            ),
            block_pool=self.block_pool,
            enable_partial_hash_hits=False,
            num_reprefillable_tokens=0,
            eagle_group_ids=frozenset(),
            kv_cache_config=stock.kv_cache_config,
        )
        self.empty_kv_cache_blocks = NativeBlocks(manager, ())

    # Usage and statistics.

    @property
    def usage(self) -> float:
        return self.block_pool.get_usage()

    def make_prefix_cache_stats(self) -> PrefixCacheStats | None:
        if not self.log_stats:
            return None
        stats, self.prefix_cache_stats = self.prefix_cache_stats, PrefixCacheStats()
        return stats

    def prefix_cache_lookup_enabled(self, request: Request) -> bool:
        return self.enable_caching and not request.skip_reading_prefix_cache

    def record_prefix_cache_stats(self, request: Request, num_hits: int) -> None:
        if self.prefix_cache_stats is not None and self.prefix_cache_lookup_enabled(request):
            self.prefix_cache_stats.record(
                num_tokens=request.num_tokens, num_hits=num_hits, preempted=request.num_preemptions > 0
            )

    # Look-up and allocation.

    def get_computed_blocks(self, request: Request) -> tuple[NativeBlocks, int, int]:
        if not self.prefix_cache_lookup_enabled(request):
            return self.empty_kv_cache_blocks, 0, 0
        # One token at least must be computed, for its logits.
        block_size = self.manager.block_size
        ids = self.manager.match_hashes(request.block_hashes or b"", (request.num_tokens - 1) // block_size)
        if not ids:
            return self.empty_kv_cache_blocks, 0, 0
        return NativeBlocks(self.manager, ids), len(ids) * block_size, 0

    def get_computed_blocks_for_connector(self, request: Request) -> tuple[NativeBlocks, int, int, bool]:
        return *self.get_computed_blocks(request), False

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
        num_encoder_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        reserved_blocks: int = 0,
        has_scheduled_reqs: bool = True,
        skip_zeroing_group_ids: tuple[int, ...] = (),
    ) -> NativeBlocks | None:
        if num_external_computed_tokens or num_encoder_tokens or skip_zeroing_group_ids:
            raise ValueError("external and encoder tokens are not supported by the native block manager")
        if num_new_tokens == 0 and num_new_computed_tokens == 0:
            raise ValueError("num_new_tokens must be greater than 0 when no computed tokens are adopted")
        manager = self.manager
        request_id = request.request_id
        sequence = self.sequences.get(request_id)
        matched = new_computed_blocks.get_block_ids()[0] if new_computed_blocks is not None else None

        kept_free = reserved_blocks
        watermark = 0
        if self.watermark_blocks and request.status in _WATERMARKED:
            watermark = self.watermark_blocks if has_scheduled_reqs or self.has_hidden_requests else 0
            kept_free += watermark
        num_computed = request.num_computed_tokens + num_new_computed_tokens
        num_computed_capped = min(num_computed, self.max_model_len)
        if full_sequence_must_fit and not self._fits_whole(request, sequence, matched, watermark):
            return None

        num_slots = min(num_computed_capped + num_new_tokens + num_lookahead_tokens, self.max_model_len)
        num_to_cache = 0
        if self.enable_caching and not delay_cache_blocks:
            num_to_cache = min(num_computed_capped + num_new_tokens, request.num_tokens)
        is_new = sequence is None
        if sequence is None:
            sequence = manager.open()
            if self.events is not None:
                self.events.begin(sequence, request)
        tokens = request._all_token_ids if self.events is not None else None
        blocks = manager.reserve(
            sequence,
            num_slots,
            num_to_cache,
            request.block_hashes or b"",
            matched or None,
            kept_free,
            False,
            tokens,
        )
        if blocks is None:
            if is_new:
                self._free(sequence)
            return None
        if is_new:
            self.sequences[request_id] = sequence
        return NativeBlocks(manager, blocks) if blocks else self.empty_kv_cache_blocks

    def admit(
        self, request: Request, budget: int, has_scheduled_reqs: bool
    ) -> tuple[int, int, list[int] | None]:
        """get_computed_blocks() and allocate_slots() in one, for a request that never ran and is to be computed whole.

        Gives the tokens found and those to compute, and the block ids; without these, and with nothing allocated, if
        more must be computed than budget, or there are too few blocks.
        """
        manager = self.manager
        num_tokens = request.num_prompt_tokens
        hashes = request.block_hashes or b""
        hits: list[int] = []
        if self.enable_caching and not request.skip_reading_prefix_cache:
            # One token at least must be computed, for its logits.
            hits = manager.match_hashes(hashes, (num_tokens - 1) // manager.block_size)
        num_hit = len(hits) * manager.block_size
        num_new = num_tokens - num_hit
        if num_new > budget:
            return num_hit, num_new, None
        kept_free = 0
        if self.watermark_blocks and (has_scheduled_reqs or self.has_hidden_requests):
            kept_free = self.watermark_blocks
        sequence = manager.open()
        tokens = None
        if self.events is not None:
            self.events.begin(sequence, request)
            tokens = request._all_token_ids
        num_to_cache = num_tokens if self.enable_caching else 0
        blocks = manager.reserve(
            sequence, num_tokens, num_to_cache, hashes, hits or None, kept_free, False, tokens
        )
        if blocks is None:
            self._free(sequence)
            return num_hit, num_new, None
        self.sequences[request.request_id] = sequence
        return num_hit, num_new, [*hits, *blocks]

    def _fits_whole(
        self, request: Request, sequence: int | None, matched: list[int] | None, watermark: int
    ) -> bool:
        """Whether the request's tokens so far fit at once, hits counted."""
        manager = self.manager
        held = 0 if sequence is None else len(manager.block_table(sequence))
        needed = manager.blocks_needed(min(request.num_tokens, self.max_model_len)) - held
        room = manager.num_free_blocks - watermark
        if needed <= room:
            return True
        if not matched:
            return False
        num_matched_free = sum(manager.reference_count(block) == 0 for block in matched)
        return max(needed - len(matched), 0) + num_matched_free <= room

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        if self.enable_caching:
            sequence = self.sequences[request.request_id]
            tokens = request._all_token_ids if self.events is not None else None
            self.manager.publish_hashes(sequence, num_computed_tokens, request.block_hashes or b"", tokens)

    def truncate_computed_blocks(self, blocks: KVCacheBlocks, num_computed_tokens: int) -> NativeBlocks:
        ids = blocks.get_block_ids()[0]
        return NativeBlocks(self.manager, ids[: num_computed_tokens // self.manager.block_size])

    # Release.

    def free(self, request: Request) -> None:
        if self._put_off is not None:
            self._put_off.append(request.request_id)
            return
        sequence = self.sequences.pop(request.request_id, None)
        if sequence is not None:
            self._free(sequence)

    def _free(self, sequence: int) -> None:
        self.manager.free(sequence)
        if self.events is not None:
            self.events.end(sequence)

    def put_off_frees(self) -> None:
        """From here to free_put_off(), only note which requests free() names."""
        self._put_off = []

    def free_put_off(self, rows: Iterable[str]) -> None:
        """Free what was noted, in the order of `rows` (request ids), the rest after them."""
        noted, self._put_off = self._put_off, None
        if not noted:
            return
        position = {request_id: i for i, request_id in enumerate(rows)}
        noted.sort(key=lambda request_id: position.get(request_id, len(position)))
        for request_id in noted:
            sequence = self.sequences.pop(request_id, None)
            if sequence is not None:
                self._free(sequence)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        sequence = self.sequences.pop(request.request_id, None)
        if sequence is None:
            return []
        ids = self.manager.detach(sequence)
        if self.events is not None:
            self.events.end(sequence)
        return [_make_block(self.manager, block, i) for i, block in enumerate(ids)]

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Full attention needs every block, so nothing is skipped."""

    def evict_blocks(self, block_ids: set[int]) -> None:
        self.block_pool.evict_blocks(block_ids)

    def reset_prefix_cache(self) -> bool:
        if not self.manager.reset():
            return False
        if self.prefix_cache_stats is not None:
            self.prefix_cache_stats.reset = True
        return True

    # Inspection.

    def get_blocks(self, request_id: str) -> NativeBlocks:
        sequence = self.sequences.get(request_id)
        ids = self.manager.block_ids(sequence) if sequence is not None else ()
        return NativeBlocks(self.manager, ids)

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return (list(self.get_blocks(request_id).ids),)

    def get_block_ids_for_computed_tokens(
        self, request_id: str, num_computed_tokens: int
    ) -> tuple[list[int], ...]:
        num_valid = self.manager.blocks_needed(num_computed_tokens)
        return (list(self.get_blocks(request_id).ids[:num_valid]),)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> list[int]:
        return [0]

    def estimate_cached_tokens(self, request: Request) -> int:
        ids = self.get_blocks(request.request_id).ids
        for index in range(len(ids) - 1, -1, -1):
            if self.manager.block_hash(ids[index]) is not None:
                return (index + 1) * self.manager.block_size
        return 0

    def create_kv_cache_blocks(self, blocks: tuple[Sequence[KVCacheBlock], ...]) -> NativeBlocks:
        return NativeBlocks(self.manager, [block.block_id for block in blocks[0]])

    # Of features that are left to vLLM's own manager.

    def take_events(self) -> list[Any]:
        return []

    def take_new_block_ids(self) -> list[int]:
        return []

    def record_blocks_for_zeroing(self, request_id: str, start_token: int) -> None:
        """No KV zeroing on this path."""

    def take_kv_cache_block_copies(self) -> tuple[list[Any], list[KVCacheBlock]]:
        return [], []

    def take_boundary_state_offloads(self) -> dict[str, list[tuple[int, int, int]]]:
        return {}

    def finalize_partial_tail_offloads(self, request: Request) -> list[tuple[int, int, int]]:
        return []

    def new_step_starts(self) -> None:
        """Nothing is kept by the step."""


class _TablesView:
    """Read-only mapping request id -> KVCacheBlock list, as vLLM's per-group manager has one."""

    def __init__(self, owner: NativeKVCacheManager) -> None:
        self._owner = owner

    def __getitem__(self, request_id: str) -> Sequence[KVCacheBlock]:
        return self._owner.get_blocks(request_id).blocks[0]

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._owner.sequences

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner.sequences)

    def __len__(self) -> int:
        return len(self._owner.sequences)
