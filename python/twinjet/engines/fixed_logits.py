"""A model without weights: the next token's logits as a plain function of the tokens before it.

Every engine that is given this model must draw the same tokens from it, if they sample by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_CONTEXT = 8


def fixed_logits(token_ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.float32]:
    """Give float32 [vocab_size]; depends on the last eight tokens and on how many there are.

    Letters and spaces are likely, the last two ids (end and beginning of text, with bytes as tokens) are not.
    """
    seed = [len(token_ids), *token_ids[-_CONTEXT:]]
    noise = np.random.Generator(np.random.Philox(seed_of(seed))).standard_normal(vocab_size)
    logits = noise.astype(np.float32)
    logits[97:123] += 6
    logits[32] += 6
    logits[-2:] -= 4
    return logits


def seed_of(values: Sequence[int]) -> int:
    """Fold integers to 64 bits (FNV-1a over the numbers)."""
    state = 0xCBF29CE484222325
    for value in values:
        state = ((state ^ value) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return state
