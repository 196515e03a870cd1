"""One side of an earlier run as the other side of a new one: its legs are read, not run. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from twinjet.compare.records import Arm, LegFacts, Phase, Record, RunData

_LEG_AS_B: Mapping[Arm, Mapping[int, int]] = {"a": {0: 1, 3: 2}, "b": {1: 1, 2: 2}}
"""Where a leg of either arm stands when it plays B in A B B A: both arms send the same requests in each half."""


@dataclass(frozen=True, slots=True)
class RecordedSide:
    """Legs of one arm, placed as arm B's, by phase, block, leg and rate."""

    legs: Mapping[tuple[Phase, int, int, float], tuple[LegFacts, tuple[Record, ...]]]

    @classmethod
    def of(cls, data: RunData, arm: Arm) -> RecordedSide:
        """Take one arm out of a run; the self-test is of A alone and is left out."""
        places = _LEG_AS_B[arm]
        records: dict[tuple[Phase, int, int, float], list[Record]] = {}
        for record in data.records:
            if record.arm == arm and record.phase != "self" and record.leg in places:
                moved = replace(record, arm="b", leg=places[record.leg])
                records.setdefault((moved.phase, moved.block, moved.leg, moved.rate), []).append(moved)
        legs = {}
        for leg in data.legs:
            if leg.arm == arm and leg.phase != "self" and leg.leg in places:
                facts = replace(leg, arm="b", leg=places[leg.leg])
                key = (facts.phase, facts.block, facts.leg, facts.rate)
                legs[key] = (facts, tuple(records.get(key, ())))
        return cls(legs)

    def num_blocks(self, phase: Phase, rate: float = 0.0) -> int:
        """Give how many blocks from the first on are whole."""
        count = 0
        while all((phase, count, leg, rate) in self.legs for leg in (1, 2)):
            count += 1
        return count
