"""Sampling parameters of requests, converted and checked once for what clients send again and again.

Most clients send the same few bytes with every request. What they mean depends on these bytes and the model
alone, but for the seed that is drawn and for how many tokens the context has left; so the rest is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from twinjet.request import Sampling, SamplingOverrides, resolve_sampling
from twinjet.server import convert
from twinjet.v1 import sampling_pb2

if TYPE_CHECKING:
    from twinjet.engines.base import Capability, EngineInfo, Limits

MAX_KEPT: Final = 1024
"""Wishes that are kept; all are forgotten when one more comes."""
MAX_KEPT_BYTES: Final = 512
"""Size of the largest message that is kept."""


class Wish:
    """What a request asks of the sampler; see proto SamplingParams."""

    __slots__ = ("_capabilities", "_limits", "_model_defaults", "_most_tokens", "_resolved", "overrides")

    def __init__(self, overrides: SamplingOverrides) -> None:
        self.overrides = overrides
        self._resolved: Sampling | None = None
        self._limits: Limits | None = None
        self._model_defaults: SamplingOverrides | None = None
        self._capabilities: frozenset[Capability] = frozenset()
        self._most_tokens = 0

    @property
    def base(self) -> Sampling | None:
        """What the last resolve() began with: its results differ from it in seed and max_tokens only."""
        return self._resolved

    def resolve(self, info: EngineInfo, *, num_prompt_tokens: int, seed: int) -> Sampling:
        """Give what request.resolve_sampling() gives of the overrides, and raise what it raises."""
        overrides, limits, defaults = self.overrides, info.limits, info.default_sampling
        room = limits.max_context_tokens - num_prompt_tokens
        known = self._resolved
        if (
            known is None
            or limits is not self._limits
            or defaults is not self._model_defaults
            or info.capabilities != self._capabilities
            or room < (overrides.max_tokens or 1)
            or room < (overrides.min_tokens or 0)
        ):
            known = resolve_sampling(overrides, info, num_prompt_tokens=num_prompt_tokens, seed=seed)
            self._limits, self._model_defaults, self._capabilities = limits, defaults, info.capabilities
            self._most_tokens = overrides.max_tokens or defaults.max_tokens or limits.max_context_tokens
            self._resolved = known
            return known
        if overrides.seed is not None:
            seed = overrides.seed
        elif defaults.seed is not None:
            seed = defaults.seed
        return known.fitted(seed=seed, max_tokens=min(self._most_tokens, room))


class Samplings:
    """The wishes of a server's clients."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Wish] = {}

    def wish(self, message: sampling_pb2.SamplingParams) -> Wish:
        """Convert SamplingParams. Raises InvalidRequest for an empty constraint."""
        key = message.SerializeToString()
        return self._kept.get(key) or self._convert(message, key)

    def wish_of(self, message: bytes) -> Wish:
        """The same of an encoded message. Raises DecodeError, too."""
        return self._kept.get(message) or self._convert(
            sampling_pb2.SamplingParams.FromString(message), message
        )

    def _convert(self, message: sampling_pb2.SamplingParams, key: bytes) -> Wish:
        wish = Wish(convert.sampling_overrides(message))
        if len(key) <= MAX_KEPT_BYTES:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = wish
        return wish
