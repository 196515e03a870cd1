"""Translate a resolved Sampling into vLLM's SamplingParams, one for each output. Pure; imports vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from twinjet.engines.seeds import output_seed
from twinjet.engines.vllm.fields import EXTRA_KEY, NO_TOKEN, GrammarNote
from twinjet.errors import InvalidRequest
from twinjet.request import GREEDY_BELOW

if TYPE_CHECKING:
    from twinjet.grammar.room import CompiledGrammar
    from twinjet.request import Sampling

VLLM_MIN_TEMPERATURE = 0.01
VLLM_MAX_TEMPERATURE = 2.0


class OwnParams(SamplingParams):  # type: ignore[misc]
    """SamplingParams that may hold NO_TOKEN among the stop tokens, and a GrammarNote for a grammar."""

    def _validate_structured_outputs(self, *_: Any) -> None:
        # vLLM's checks compile the grammar in this process, and under "auto" with another compiler.
        if self.structured_outputs is not None:
            self.structured_outputs._backend = "xgrammar"

    def _validate_stop_token_ids(self, model_config: Any) -> None:
        ids = list(self.stop_token_ids)  # type: ignore[has-type]
        self.stop_token_ids = [token for token in ids if token != NO_TOKEN]
        try:
            super()._validate_stop_token_ids(model_config)
        finally:
            self.stop_token_ids = ids


def sampling_params(
    sampling: Sampling, output_index: int, *, native: bool, grammar: CompiledGrammar | None = None
) -> SamplingParams:
    """Make the parameters of one output of a request; n is always 1.

    native: our own sampler draws, so it gets the exact temperature, the seed and the output index.
    grammar: what sampling.constraint was compiled to.
    Raises InvalidRequest for a temperature that vLLM's own sampler does not take.
    """
    temperature = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
    extra: dict[str, Any] | None = None
    if native:
        extra = {EXTRA_KEY: {"temperature": temperature, "seed": sampling.seed, "output_index": output_index}}
        # vLLM checks its own range even where it does not sample.
        temperature = min(temperature, VLLM_MAX_TEMPERATURE)
    elif temperature > VLLM_MAX_TEMPERATURE:
        raise InvalidRequest.of(
            "sampling.temperature",
            f"{temperature:g} is out of range for this deployment's sampler; "
            f"allowed: 0 to {VLLM_MAX_TEMPERATURE:g}",
        )
    if 0 < temperature < VLLM_MIN_TEMPERATURE:
        temperature = VLLM_MIN_TEMPERATURE
    params = OwnParams(
        n=1,
        temperature=temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=output_seed(sampling.seed, output_index),
        # Text, and what it ends, is made of the tokens by us: vLLM would let the prompt's end into it.
        detokenize=False,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        bad_words=list(sampling.bad_words),
        allowed_token_ids=list(sampling.allowed_token_ids) or None,
        logprobs=sampling.logprobs,
        # Every output has the same prompt, so its logprobs are asked for once.
        prompt_logprobs=sampling.prompt_logprobs if output_index == 0 else None,
        structured_outputs=_structured(grammar, sampling),
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra,
        skip_clone=True,
    )
    if native and sampling.constraint is None:
        # Not among all_stop_token_ids, which vLLM's min-tokens rule masks. Grammars get the stop tokens and
        # refuse it; there, a row without a token ends by a token that the grammar rejects.
        params.stop_token_ids.append(NO_TOKEN)
    return params


def _structured(grammar: CompiledGrammar | None, sampling: Sampling) -> StructuredOutputsParams | None:
    if sampling.constraint is None:
        return None
    if grammar is None or grammar.vocabulary is None:
        raise ValueError("a constraint comes with its compiled grammar")
    note = GrammarNote(
        grammar.path, grammar.vocabulary.path, grammar.vocabulary.end_token_ids, sampling.stop_token_ids
    )
    return StructuredOutputsParams(grammar=note.encode())
