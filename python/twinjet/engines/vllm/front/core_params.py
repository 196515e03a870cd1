"""vLLM's parameters of a request for the engine core, made once for those that come again and again.

Two requests whose sampling is alike but for seed and max_tokens have the same parameters but for these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from twinjet.engines.seeds import output_seed
from twinjet.engines.vllm.fields import EXTRA_KEY
from twinjet.engines.vllm.front import wire
from twinjet.engines.vllm.front.params import sampling_fields

if TYPE_CHECKING:
    from twinjet.engines.vllm.facts import Facts
    from twinjet.grammar.room import CompiledGrammar
    from twinjet.request import Sampling
    from twinjet.sampling.bad_text import BadTextSettings

MAX_KEPT: Final = 256
"""Parameters that are kept; all are forgotten when one more comes."""


class CoreParams:
    """Makes wire.core_params() of params.sampling_fields(). The result is for encoding, not for changing."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._kept: dict[tuple[Any, ...], dict[str, Any]] = {}

    def of(
        self,
        sampling: Sampling,
        output_index: int,
        *,
        native: bool,
        grammar: CompiledGrammar | None,
        bad_text: BadTextSettings | None,
    ) -> dict[str, Any]:
        """Raises what the two functions raise."""
        s = sampling
        if s.constraint is not None or s.bad_words or s.logit_bias or s.min_tokens > s.max_tokens:
            fields = sampling_fields(s, output_index, native=native, grammar=grammar, bad_text=bad_text)
            return wire.core_params(fields, self._facts, native=native)
        key = (
            native, output_index, s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty,
            s.frequency_penalty, s.presence_penalty, s.min_tokens, s.stop_token_ids, s.ignore_eos,
            s.allowed_token_ids, s.logprobs, s.prompt_logprobs,
        )  # fmt: skip
        kept = self._kept.get(key)
        if kept is None:
            fields = sampling_fields(s, output_index, native=native)
            kept = wire.core_params(fields, self._facts, native=native)
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = kept
        params = kept.copy()
        params["seed"] = output_seed(s.seed, output_index)
        params["max_tokens"] = s.max_tokens
        if native:
            params["extra_args"] = {EXTRA_KEY: kept["extra_args"][EXTRA_KEY] | {"seed": s.seed}}
        return params
