"""How large a constraint may be and what its compilation may cost; see GrammarLimits for what is configurable.

The first three are checked before anything else, in time linear in the text.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DEPTH = 64
"""Objects and arrays within each other in a schema's text, and groups within each other in a pattern."""
MAX_NODES = 8192
"""Different subschemas after normalisation."""
MAX_ALTERNATIVES = 1024
"""Alternatives of one value after normalisation: combinations of anyOf, oneOf, if and dependent keywords."""
MAX_CONSTANTS = 4096
"""Values of one enum, also of one made of multipleOf within bounds."""
MAX_COMPILED_BYTES = 16 << 20
"""Of a compiled grammar: the engine's process reads it while others' requests run there."""
MAX_RECOMPILED_S = 1.0
"""Processor time of a compilation that the engine's process has to do once more, where what it makes is larger."""
MAX_REPEAT = 100_000
"""Bounds on lengths and counts above this are refused: nothing of that size fits a model's context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """What one compilation may use, and how many there may be at once.

    memory_bytes: address space beyond what an idle worker has. cpu_s: processor time. wall_s: also waiting for a
    processor. niceness: below the engine's, which shares the processors. soon_s: processor time after which the work
    gets only what nobody else wants; at once if the tenant's constraints have been refused of late. workers: compilations at once, of one tenant at most half of them (at least one). waiting:
    compilations that may wait for one, for each tenant. refused_cpu_s: processor time that a tenant may spend on
    constraints that are refused; a twentieth of a second comes back every second. cache_bytes: compiled grammars kept
    on disk.
    """

    memory_bytes: int = 1 << 30
    cpu_s: float = 5.0
    wall_s: float = 20.0
    niceness: int = 15
    soon_s: float = 0.5
    workers: int = 2
    waiting: int = 16
    refused_cpu_s: float = 10.0
    cache_bytes: int = 256 << 20
