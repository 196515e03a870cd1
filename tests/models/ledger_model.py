"""The scheduler's KV ledger, said slowly: numpy over all sequences, nothing kept that can be counted.

What is remembered is what decides: the forecast of each sequence, which is made anew only now and then, and
whether forecasts are kept at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from tests.models.length_model import Floats, LengthModel, horizon
from twinjet._core import BlockManager

ROOMY_ADMISSIONS = 1000
REFRESH_TOKENS = 32


@dataclass
class Output:
    sequence: int
    own: int
    num_blocks: int
    num_tokens: int = 0
    num_lost: int = 0
    refreshed: int = 0
    blocks: Floats | None = None
    spread: Floats | None = None


@dataclass
class Held:
    """What one running request holds."""

    prompt: int
    max_tokens: int
    max_blocks: int
    is_fixed: bool
    hashes: bytes
    num_cached_tokens: int
    lengths: LengthModel
    outputs: list[Output] = field(default_factory=list)


class LedgerModel:
    """margin: blocks left over, or missing if negative, at the last question to the prediction."""

    def __init__(
        self, num_blocks: int, size: int, *, shares: bool, headroom: float, lookahead: int,
        sigmas: float | None, longest: int,
    ) -> None:  # fmt: skip
        self.manager = BlockManager(num_blocks, size, prefix_cache=shares, algorithm="siphash")
        self.size, self.shares, self.lookahead, self.sigmas = size, shares, lookahead, sigmas
        self.usable = num_blocks - math.floor(num_blocks * headroom)
        self.times = horizon(longest)
        self.held: list[Held] = []
        self.predicting = False
        self.num_roomy = 0
        self.num_overflows = 0
        self.margin = math.inf

    @property
    def outputs(self) -> list[Output]:
        return [output for held in self.held for output in held.outputs]

    @property
    def used(self) -> int:
        return self.manager.num_used_blocks + self.blocks_for(sum(o.num_lost for o in self.outputs))

    @property
    def reserved(self) -> int:
        return sum(held.max_blocks - o.num_blocks for held in self.held for o in held.outputs)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.size)

    def match(self, hashes: bytes, prompt: int) -> list[int]:
        return self.manager.match_hashes(hashes, (prompt - 1) // self.size) if hashes else []

    def hold(
        self, hashes: bytes, prompt: int, n: int, max_tokens: int, is_fixed: bool, lengths: LengthModel
    ) -> Held | None:
        self.margin = math.inf
        full = prompt // self.size if self.shares else 0
        max_blocks = self.blocks_for(prompt + max_tokens + self.lookahead)
        reserve = n * (max_blocks - self.blocks_for(prompt))
        new = full + n * (self.blocks_for(prompt) - full)
        if self.used + new + self.reserved + reserve > self.usable:
            new -= sum(self.manager.reference_count(b) > 0 for b in self.match(hashes, prompt))
        if self.used + new > (self.usable if self.held else self.manager.num_blocks):
            return None
        if self.held and not self._stays_within(new, reserve, n, max_tokens, is_fixed, lengths):
            return None
        held = Held(prompt, max_tokens, max_blocks, is_fixed, hashes, 0, lengths)
        complete = self._open(held, n)
        too_many = sum(o.own for o in held.outputs) > new and bool(self.held)
        if not complete or too_many:
            for output in held.outputs:
                self.manager.free(output.sequence)
            return None
        self.held.append(held)
        if self.predicting:
            for output in held.outputs:
                self._forecast(held, output)
        return held

    def append(self, held: Held, output_index: int, count: int) -> None:
        output = held.outputs[output_index]
        output.num_tokens += count
        needed = held.prompt + output.num_tokens
        if needed <= output.num_blocks * self.size:
            return
        fits = not output.num_lost and needed <= self.manager.num_blocks * self.size
        blocks = self.manager.reserve(output.sequence, needed) if fits else None
        if blocks is None:
            output.num_lost += count
            self.num_overflows += count
            return
        output.num_blocks += len(blocks)
        output.own += len(blocks)
        if self.predicting and output.num_tokens - output.refreshed >= REFRESH_TOKENS:
            self._forecast(held, output)

    def publish(self, held: Held) -> None:
        if held.hashes:
            self.manager.publish_hashes(held.outputs[0].sequence, held.prompt, held.hashes)

    def release(self, held: Held) -> None:
        for output in held.outputs:
            self.manager.free(output.sequence)
        self.held.remove(held)
        self.predicting = self.predicting and bool(self.held)

    def _open(self, held: Held, n: int) -> bool:
        for i in range(n):
            before = self.manager.num_used_blocks
            if i and self.shares:
                forked = self.manager.fork(held.outputs[0].sequence)
                if forked is None:
                    return False
                sequence = forked[0]
            else:
                sequence = self.manager.open()
                matched = self.match(held.hashes, held.prompt)
                if self.manager.reserve(sequence, held.prompt, 0, held.hashes, matched or None) is None:
                    self.manager.free(sequence)
                    return False
                held.num_cached_tokens = len(matched) * self.size
            own = self.manager.num_used_blocks - before
            held.outputs.append(Output(sequence, own, self.blocks_for(held.prompt)))
        return True

    def _stays_within(
        self, new: int, reserve: int, n: int, max_tokens: int, is_fixed: bool, lengths: LengthModel
    ) -> bool:
        if self.used + new + self.reserved + reserve <= self.usable:
            self.num_roomy += 1
            self.predicting = self.predicting and self.num_roomy < ROOMY_ADMISSIONS
            return True
        if self.sigmas is None:
            return False
        self.num_roomy = 0
        if not self.predicting:
            self.predicting = True
            for held in self.held:
                for output in held.outputs:
                    self._forecast(held, output)
        blocks, spread = self._predict(lengths, 0, max_tokens, new / n, is_fixed)
        expected = n * blocks + sum(o.blocks for o in self.outputs if o.blocks is not None)
        variance = n * spread + sum(o.spread for o in self.outputs if o.spread is not None)
        most = float(np.max(expected + self.sigmas * np.sqrt(variance)))
        self.margin = self.usable - (self.used - sum(o.own for o in self.outputs)) - most
        return self.margin >= 0

    def _predict(
        self, lengths: LengthModel, num_tokens: int, max_tokens: int, own: float, is_fixed: bool
    ) -> tuple[Floats, Floats]:
        left = max_tokens - num_tokens
        survival = 1.0 if is_fixed else lengths.survival_near(num_tokens, self.times)
        alive = np.where(self.times < left, survival, 0.0)
        ends = np.append(self.times[1:], 2 * self.times[-1])
        held = np.minimum(ends, left) / self.size + own + self.lookahead / self.size + 0.5
        return alive * held, alive * held * (held - alive * held)

    def _forecast(self, held: Held, output: Output) -> None:
        output.blocks, output.spread = self._predict(
            held.lengths, output.num_tokens, held.max_tokens, output.own, held.is_fixed
        )
        output.refreshed = output.num_tokens
