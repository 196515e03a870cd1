"""Effective settings of both sides, defaults filled in, side by side. Pure but for the model message it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToDict

if TYPE_CHECKING:
    from twinjet.v1 import model_pb2

MUST_MATCH = ("vocab_size", "eos_token_ids")
"""With these unequal the token ids mean different things, and nothing can be compared."""
TOLD = ("engine", "version", "source", "deployment")
"""Shown, never held against a comparison: they are what is being compared."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting that both sides have differently; "" is not known on that side."""

    name: str
    a: str
    b: str


def effective_settings(model: model_pb2.Model) -> Mapping[str, str]:
    """Give what a deployment really runs with, as texts by name."""
    known = {
        "engine": model.engine.name,
        "version": model.engine.version,
        "source": model.engine.source,
        "deployment": model.deployment,
        "device": model.engine.device,
        "max_context_tokens": str(model.limits.max_context_tokens),
        "vocab_size": str(model.limits.vocab_size),
        "max_concurrent_sequences": str(model.limits.max_concurrent_sequences),
        "eos_token_ids": " ".join(map(str, sorted(model.eos_token_ids))),
        "kv_tokens": str(model.kv_cache.num_blocks * model.kv_cache.block_size)
        if model.HasField("kv_cache")
        else "",
        "kv_block_size": str(model.kv_cache.block_size) if model.HasField("kv_cache") else "",
        "sampler": model.sampler.implementation,
        "block_manager": model.block_manager.implementation,
        "default_sampling": str(MessageToDict(model.default_sampling, preserving_proto_field_name=True)),
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
