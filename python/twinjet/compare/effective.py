"""Effective settings of both sides, defaults filled in, side by side. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from twinjet.errors import ConfigError

if TYPE_CHECKING:
    from twinjet.client import Model

MUST_MATCH = ("vocab_size", "eos_token_ids", "tokenizer")
"""With these unequal the token ids mean different things, and nothing can be compared."""
PROBE = "Twinjet 3.14: naïve café, Привет мир, 東京タワー, مرحبا 🙂\n\tfor (int i = 0; i < 10; ++i) { x[i] *= 2; }\n\n  end  "
"""Tokenized on both sides: scripts, digits, code and blanks, where vocabularies and their rules part."""
TOLD = ("engine", "version", "source", "deployment")
"""Shown, never held against a comparison: they are what is being compared."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting that both sides have differently; "" is not known on that side."""

    name: str
    a: str
    b: str


def effective_settings(model: Model, probe_ids: Sequence[int]) -> Mapping[str, str]:
    """Give what a deployment really runs with, as texts by name. probe_ids: the tokens of PROBE; empty: not known.

    Raises ConfigError for a model that is not ready.
    """
    if model.state != "ready":
        raise ConfigError(_not_ready(model))
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
        "tokenizer": hashlib.sha256(json.dumps(list(probe_ids)).encode()).hexdigest()[:12]
        if probe_ids
        else "",
        "max_concurrent_sequences": str(limits.max_concurrent_sequences if limits else 0),
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
    return [
        d for d in found if (d.name in MUST_MATCH and d.a and d.b) or not ({"all", d.name} & set(allowed))
    ]


def check_equal(a: Mapping[str, str], b: Mapping[str, str], allowed: Collection[str]) -> None:
    """Raise ConfigError for settings that differ and must not, or were not allowed to."""
    stopping = objections(differences(a, b), allowed)
    if any(d.name in MUST_MATCH and d.a and d.b for d in stopping):
        told = "; ".join(f"{d.name}: {d.a} and {d.b}" for d in stopping if d.name in MUST_MATCH)
        raise ConfigError(
            f"the two have different tokenizers, so their tokens mean different things ({told})"
        )
    if stopping:
        told = "; ".join(f"{d.name}: {d.a or 'unknown'} and {d.b or 'unknown'}" for d in stopping)
        raise ConfigError(f"the two differ in {told}. Make them equal, or allow each by --allow NAME")


def _not_ready(model: Model) -> str:
    if model.loading is not None:
        return (
            f"model {model.name!r} is {model.state} ({model.loading.phase}, {100 * model.loading.done:.0f}%); "
            "compare it when it is ready"
        )
    return f"model {model.name!r} is {model.state}" + (f": {model.failure}" if model.failure else "")
