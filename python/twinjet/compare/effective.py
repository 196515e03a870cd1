"""Effective settings of both sides, defaults filled in, side by side. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinjet.client import Model

MUST_MATCH = ("vocab_size", "eos_token_ids", "tokenizer")
"""With these unequal the token ids mean different things, and nothing can be compared."""
PROBE_TEXT = "The quick brown fox: 3.14159 naïve cafés, def f(x):\n    return x  # 東京 🦊"
"""Tokenized by both sides; two tokenizers of one size hardly agree on it."""
TOLD = ("engine", "version", "source", "deployment")
"""Shown, never held against a comparison: they are what is being compared."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting that both sides have differently; "" is not known on that side."""

    name: str
    a: str
    b: str


def effective_settings(model: Model, probe_token_ids: Sequence[int]) -> Mapping[str, str]:
    """Give what a deployment really runs with, as texts by name. probe_token_ids: what it makes of PROBE_TEXT."""
    probe = ",".join(map(str, probe_token_ids))
    limits, cache = model.limits, model.kv_cache
    defaults = {k: v for k, v in asdict(model.default_sampling).items() if v not in (None, (), {})}
    known = {
        "engine": model.engine.name,
        "version": model.engine.version,
        "source": model.engine.source,
        "deployment": model.deployment,
        "device": model.engine.device,
        "max_context_tokens": str(limits.max_context_tokens if limits else 0),
        "vocab_size": str(limits.vocab_size if limits else 0),
        "max_concurrent_sequences": str(limits.max_concurrent_sequences if limits else 0),
        "tokenizer": hashlib.sha256(probe.encode()).hexdigest()[:12],
        "eos_token_ids": " ".join(map(str, sorted(model.eos_token_ids))),
        "kv_tokens": str(cache.num_blocks * cache.block_size) if cache else "",
        "kv_block_size": str(cache.block_size) if cache else "",
        "sampler": model.sampler.implementation if model.sampler else "",
        "block_manager": model.block_manager.implementation if model.block_manager else "",
        "default_sampling": str(defaults),
    }
    return known | dict(model.settings)


def differences(a: Mapping[str, str], b: Mapping[str, str]) -> list[Difference]:
    """Give what differs, without what only names the sides."""
    return [
        Difference(name, a.get(name, ""), b.get(name, ""))
        for name in sorted({*a, *b} - set(TOLD))
        if a.get(name, "") != b.get(name, "")
    ]


def objections(found: Collection[Difference], allowed: Collection[str]) -> list[Difference]:
    """Give the differences that stop a run: those that cannot be allowed, and those that were not ("all" allows)."""
    return [d for d in found if d.name in MUST_MATCH or not ({"all", d.name} & set(allowed))]
