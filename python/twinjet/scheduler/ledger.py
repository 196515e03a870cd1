"""KV ledger: which blocks the engine's running requests hold, as far as can be known from outside.

It mirrors the engine block for block: a shared prefix counts once, streamed tokens append. Only prompts are
known to its prefix cache, outputs are counted without their ids. Admission asks
whether the use to come stays within the cache; the ledger itself never takes a block from anyone. What it
cannot see: how far ahead of the stream the engine is (lookahead_tokens) and the engine's own eviction order,
which decides only what a prompt costs to compute, not how many blocks it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from twinjet._core import BlockManager
from twinjet.engines.base import KvCache
from twinjet.request import EngineRequest
from twinjet.scheduler.estimate import Floats, LengthEstimator, horizon

_ROOMY_ADMISSIONS: Final = 1000
"""After so many admissions in a row with room for the worst case, predictions are no longer kept up."""

_REFRESH_TOKENS: Final = 32
"""After so many tokens a sequence's part in the prediction is made anew."""


class _Sequence:
    """One output of a running request. own: blocks it alone took; blocks, spread: its part of the sums."""

    __slots__ = (
        "blocks", "handle", "max_blocks", "max_tokens", "num_lost", "num_slots", "num_tokens", "own",
        "prompt", "refreshed", "spread",
    )  # fmt: skip

    def __init__(
        self, handle: int, prompt: int, max_tokens: int, max_blocks: int, own: int, num_slots: int
    ) -> None:
        self.handle = handle
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.max_blocks = max_blocks
        self.own = own
        self.num_slots = num_slots
        self.num_tokens = 0
        self.num_lost = 0
        self.refreshed = 0
        self.blocks: Floats | None = None
        self.spread: Floats | None = None


class Holding:
    """What one running request holds. num_cached_tokens: prompt tokens found in the cache at admission."""

    __slots__ = ("hashes", "is_fixed", "lengths", "num_cached_tokens", "sequences")

    def __init__(
        self, sequences: list[_Sequence], num_cached: int, lengths: LengthEstimator, *, is_fixed: bool
    ) -> None:
        self.sequences = sequences
        self.hashes: bytes | None = None
        self.num_cached_tokens = num_cached
        self.lengths = lengths
        self.is_fixed = is_fixed


class KvLedger:
    """Blocks of one engine.

    headroom: share of the blocks that admission leaves free. sigmas: None reserves max_tokens for every
    output, so that use never exceeds the cache; otherwise the expected use at each step ahead plus so many
    standard deviations must stay within it, outputs taken as independent.
    """

    def __init__(
        self,
        cache: KvCache,
        *,
        prefix_cache: bool,
        headroom: float,
        lookahead_tokens: int,
        sigmas: float | None,
        longest: int,
    ) -> None:
        self._size = cache.block_size
        self._lookahead = lookahead_tokens
        self._sigmas = sigmas
        # The hashes stay in this process and name no content, so the faster function will do.
        self._manager = BlockManager(
            cache.num_blocks, cache.block_size, prefix_cache=prefix_cache, algorithm="siphash"
        )
        self._num_slots = cache.num_blocks * cache.block_size
        self._match = self._manager.match_hashes
        self._shares = prefix_cache
        self._usable = cache.num_blocks - math.floor(cache.num_blocks * headroom)
        self._times = horizon(longest)
        self._end_blocks = np.append(self._times[1:], 2 * self._times[-1]) / cache.block_size
        self._blocks = np.zeros(len(self._times))
        self._spread = np.zeros(len(self._times))
        self._num_own = 0
        self._num_reserved = 0
        self._num_lost = 0
        self._num_sequences = 0
        self._sequences: dict[int, tuple[_Sequence, Holding]] = {}
        self._predicting = False
        self._num_roomy = 0
        self._fresh: tuple[float, Floats, Floats] | None = None
        self.num_overflows = 0

    @property
    def num_blocks(self) -> int:
        return self._manager.num_blocks

    @property
    def num_used_blocks(self) -> int:
        """Blocks held now, those for which there was no room included; so it may exceed num_blocks."""
        return self._manager.num_used_blocks - (-self._num_lost // self._size)

    def can_ever_hold(self, request: EngineRequest) -> bool:
        """Whether the prompt and one token of each output fit an empty cache."""
        n = request.sampling.n
        if 2 * n * (len(request.prompt_token_ids) + self._size) <= self._num_slots:
            return True
        shared = (len(request.prompt_token_ids) // self._size) if self._shares else 0
        each = self._num_blocks_for(len(request.prompt_token_ids) + 1) - shared
        return shared + each * n <= self.num_blocks

    def hash(self, request: EngineRequest) -> bytes | None:
        """Block hashes of the prompt, for find_cached() and admit(); None without a prefix cache."""
        if not self._shares:
            return None
        return self._manager.hasher.hash_bytes(request.prompt_token_ids, salt=_salt(request))

    def find_cached(self, hashes: bytes | None, num_prompt_tokens: int) -> int:
        """Prompt tokens that are in the cache now."""
        size = self._size
        return len(self._match(hashes, (num_prompt_tokens - 1) // size)) * size if hashes else 0

    def admit(self, request: EngineRequest, hashes: bytes | None, lengths: LengthEstimator) -> Holding | None:
        """Hold the blocks of a request's prompt if the use to come stays within the cache; else None.

        A request that is alone is held if its prompt fits, for it could never run otherwise.
        """
        prompt, n = len(request.prompt_token_ids), request.sampling.n
        is_fixed = request.sampling.ignore_eos and not request.sampling.stop
        size = self._size
        prompt_blocks = -(-prompt // size)
        full_blocks = prompt // size if self._shares else 0
        max_blocks = -(-(prompt + request.sampling.max_tokens + self._lookahead) // size)
        reserve = n * (max_blocks - prompt_blocks)
        new = n * (prompt_blocks - full_blocks) + full_blocks
        if self.num_used_blocks + new + self._num_reserved + reserve > self._usable:
            # What running requests share costs nothing more; looked up only where it may matter.
            new -= self._num_referenced(hashes, prompt)
        if self.num_used_blocks + new > (self._usable if self._num_sequences else self.num_blocks):
            return None
        if self._num_sequences and not self._stays_within(request, new, reserve, lengths, is_fixed):
            return None
        sequences, num_cached = self._open(request, hashes, max_blocks)
        if not sequences:
            self._fresh = None
            return None
        if sum(s.own for s in sequences) > new and self._num_sequences:
            # The cache shares less than it seemed: what was asked of the prediction does not hold.
            for sequence in sequences:
                self._manager.free(sequence.handle)
            self._fresh = None
            return None
        holding = Holding(sequences, num_cached, lengths, is_fixed=is_fixed)
        holding.hashes = hashes
        for sequence in sequences:
            self._num_sequences += 1
            self._num_own += sequence.own
            self._num_reserved += max_blocks - prompt_blocks
            self._sequences[sequence.handle] = (sequence, holding)
            if self._predicting:
                self._begin_prediction(sequence, holding)
        self._fresh = None
        return holding

    def append(self, holding: Holding, output_index: int, token_ids: Sequence[int]) -> None:
        """Account for tokens that streamed."""
        sequence = holding.sequences[output_index]
        count = len(token_ids)
        sequence.num_tokens += count
        needed = sequence.prompt + sequence.num_tokens
        if needed <= sequence.num_slots:
            return
        if sequence.num_lost or needed > self._num_slots:
            self._lose(sequence, count)
            return
        blocks = self._manager.reserve(sequence.handle, needed)
        if blocks is None:
            self._lose(sequence, count)
            return
        new = len(blocks)
        sequence.num_slots += new * self._size
        sequence.own += new
        self._num_own += new
        self._num_reserved -= new
        if self._predicting and sequence.num_tokens - sequence.refreshed >= _REFRESH_TOKENS:
            self._refresh(sequence, holding)

    def publish(self, holding: Holding) -> None:
        """The engine has computed the prompt: others may share it from now on."""
        if holding.hashes:
            sequence = holding.sequences[0]
            self._manager.publish_hashes(sequence.handle, sequence.prompt, holding.hashes)

    def release(self, holding: Holding) -> None:
        """Give back everything; blocks of the prompt stay in the cache until their room is needed."""
        for sequence in holding.sequences:
            self._num_reserved -= sequence.max_blocks - sequence.num_slots // self._size
            self._num_own -= sequence.own
            self._num_lost -= sequence.num_lost
            self._num_sequences -= 1
            self._manager.free(sequence.handle)
            del self._sequences[sequence.handle]
            if sequence.blocks is not None and sequence.spread is not None:
                self._blocks -= sequence.blocks
                self._spread -= sequence.spread
        if not self._num_sequences and self._predicting:
            self._stop_predicting()

    def reset(self) -> bool:
        """Forget cached prefixes; False while anything is held."""
        return self._manager.reset()

    def check(self) -> None:
        """Verify every invariant of the block manager. Raises RuntimeError. For tests."""
        self._manager.check()

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._size)

    def _num_referenced(self, hashes: bytes | None, num_prompt_tokens: int) -> int:
        """Leading prompt blocks that a running sequence holds, which cost nothing more.

        Whoever holds a block of a chain holds those before it, so the boundary is found by bisection.
        """
        if not hashes:
            return 0
        blocks = self._match(hashes, (num_prompt_tokens - 1) // self._size)
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if self._manager.reference_count(blocks[middle]):
                low = middle + 1
            else:
                high = middle
        return low

    def _stays_within(
        self, request: EngineRequest, new: int, reserve: int, lengths: LengthEstimator, is_fixed: bool
    ) -> bool:
        used = self.num_used_blocks + new
        if used + self._num_reserved + reserve <= self._usable:
            # Room for the worst case. Predictions cost more than they tell while that goes on.
            self._num_roomy += 1
            if self._predicting and self._num_roomy >= _ROOMY_ADMISSIONS:
                self._stop_predicting()
            return True
        if self._sigmas is None:
            return False
        self._num_roomy = 0
        if not self._predicting:
            self._predicting = True
            for sequence, holding in self._sequences.values():
                self._refresh(sequence, holding)
        n = request.sampling.n
        own = new / n
        blocks, spread = self._predict(lengths, 0, request.sampling.max_tokens, own, is_fixed)
        many_blocks, many_spread = (blocks, spread) if n == 1 else (n * blocks, n * spread)
        expected = self._blocks + many_blocks
        deviation = self._spread + many_spread
        np.maximum(deviation, 0.0, out=deviation)
        np.sqrt(deviation, out=deviation)
        deviation *= self._sigmas
        expected += deviation
        if float(expected.max()) > self._usable - (used - new - self._num_own):
            return False
        self._fresh = (own, blocks, spread)
        return True

    def _predict(
        self, lengths: LengthEstimator, num_tokens: int, max_tokens: int, own: float, is_fixed: bool
    ) -> tuple[Floats, Floats]:
        """Mean and variance of the blocks a sequence holds for itself, at each step ahead."""
        left = max_tokens - num_tokens
        alive: Any = self._times < left
        if not is_fixed:
            alive = alive * lengths.survival_near(num_tokens, self._times)
        # A sequence begins its next block half a block from now, on average.
        size = np.minimum(self._end_blocks, left / self._size)
        size += own + self._lookahead / self._size + 0.5
        blocks = alive * size
        size -= blocks
        size *= blocks
        return blocks, size

    def _stop_predicting(self) -> None:
        self._predicting = False
        for sequence, _ in self._sequences.values():
            sequence.blocks = sequence.spread = None
        # Sums of floats drift, so they start again from zero.
        self._blocks[:] = 0.0
        self._spread[:] = 0.0

    def _refresh(self, sequence: _Sequence, holding: Holding) -> None:
        if sequence.blocks is not None and sequence.spread is not None:
            self._blocks -= sequence.blocks
            self._spread -= sequence.spread
        sequence.blocks, sequence.spread = self._predict(
            holding.lengths, sequence.num_tokens, sequence.max_tokens, sequence.own,
            holding.is_fixed,
        )  # fmt: skip
        self._blocks += sequence.blocks
        self._spread += sequence.spread
        sequence.refreshed = sequence.num_tokens

    def _begin_prediction(self, sequence: _Sequence, holding: Holding) -> None:
        fresh = self._fresh
        if fresh is None or fresh[0] != sequence.own:
            self._refresh(sequence, holding)
            return
        # Admission asked for the very same.
        _, sequence.blocks, sequence.spread = fresh
        self._blocks += sequence.blocks
        self._spread += sequence.spread

    def _open(
        self, request: EngineRequest, hashes: bytes | None, max_blocks: int
    ) -> tuple[list[_Sequence], int]:
        """Make the sequences of a request: all of them, or none."""
        manager, prompt = self._manager, len(request.prompt_token_ids)
        sequences: list[_Sequence] = []
        num_cached = 0
        for i in range(request.sampling.n):
            before = manager.num_used_blocks
            if i and self._shares:
                forked = manager.fork(sequences[0].handle)
                handle = None if forked is None else forked[0]
            else:
                handle = manager.open()
                matched = self._match(hashes, (prompt - 1) // self._size) if hashes else []
                if manager.reserve(handle, prompt, 0, hashes, matched or None) is None:
                    manager.free(handle)
                    handle = None
                num_cached = len(matched) * self._size
            if handle is None:
                for sequence in sequences:
                    manager.free(sequence.handle)
                return [], 0
            own = manager.num_used_blocks - before
            sequences.append(
                _Sequence(
                    handle,
                    prompt,
                    request.sampling.max_tokens,
                    max_blocks,
                    own,
                    self._num_blocks_for(prompt) * self._size,
                )
            )
        return sequences, num_cached

    def _lose(self, sequence: _Sequence, count: int) -> None:
        sequence.num_lost += count
        self._num_lost += count
        self.num_overflows += count


def _salt(request: EngineRequest) -> bytes:
    """What keeps prefixes apart in the engine: the adapter and the salt, unambiguous when joined."""
    if not request.adapter:
        return request.cache_salt.encode()
    adapter = request.adapter.encode()
    return len(adapter).to_bytes(4, "big") + b"\0" + adapter + request.cache_salt.encode()
