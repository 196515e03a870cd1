"""The seed that an engine's own sampler gets for each output of a request.

Twinjet's sampler takes the request's 64 bits and the output index as they are. The engines' samplers keep a seed
in a signed 64-bit number and read a negative one as no seed or as an error, so theirs are below 2^63.
"""

from __future__ import annotations

ENGINE_SEED_BITS = 63

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def output_seed(seed: int, output_index: int) -> int:
    """Derive the seed of one output for an engine's own sampler, in 0 .. 2^63 - 1.

    seed: 64 bits. Output 0 has the request's seed itself where it fits; every other is mixed (SplitMix64), so
    that output 1 of seed s is not output 0 of seed s + 1.
    """
    if output_index == 0 and seed >> ENGINE_SEED_BITS == 0:
        return seed
    z = (seed + output_index * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> (64 - ENGINE_SEED_BITS)
