"""Translate a resolved Sampling into the fields of vLLM's SamplingParams, one set for each output. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twinjet.engines.seeds import output_seed
from twinjet.engines.vllm.fields import EXTRA_KEY, GrammarNote
from twinjet.errors import InvalidRequest, Unsupported
from twinjet.request import GREEDY_BELOW

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from twinjet.grammar.room import CompiledGrammar
    from twinjet.request import Sampling
    from twinjet.sampling.bad_text import BadTextSettings

VLLM_MIN_TEMPERATURE = 0.01
VLLM_MAX_TEMPERATURE = 2.0


def sampling_params(
    sampling: Sampling,
    output_index: int,
    *,
    native: bool,
    grammar: CompiledGrammar | None = None,
    bad_text: BadTextSettings | None = None,
) -> SamplingParams:
    """Make vLLM's own object of sampling_fields(); imports vLLM."""
    from twinjet.engines.vllm.front.stock_params import make_params

    fields = sampling_fields(sampling, output_index, native=native, grammar=grammar, bad_text=bad_text)
    return make_params(fields, native=native)


def sampling_fields(
    sampling: Sampling,
    output_index: int,
    *,
    native: bool,
    grammar: CompiledGrammar | None = None,
    bad_text: BadTextSettings | None = None,
) -> dict[str, Any]:
    """Give the parameters of one output of a request; n is always 1.

    structured_outputs is a dict, or None. grammar: what sampling.constraint was compiled to. native: our own sampler draws, so it gets the exact temperature, the
    seed and the output index, and the strings that must not be produced (bad_text); vLLM's own knows no such
    strings, only tokens.
    Raises InvalidRequest for a temperature that vLLM's own sampler does not take, Unsupported for bad words there.
    """
    if sampling.bad_words and not native:
        raise Unsupported("bad_words", "vLLM's own sampler bans token sequences, not strings")
    temperature = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
    extra: dict[str, Any] | None = None
    if native:
        extra = {EXTRA_KEY: {"temperature": temperature, "seed": sampling.seed, "output_index": output_index}}
        if bad_text is not None:
            extra[EXTRA_KEY]["bad_text"] = list(bad_text)
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
    return {
        "n": 1,
        "temperature": temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "seed": output_seed(sampling.seed, output_index),
        # Text, and what it ends, is made of the tokens by us: vLLM would let the prompt's end into it.
        "detokenize": False,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "allowed_token_ids": list(sampling.allowed_token_ids) or None,
        "logprobs": sampling.logprobs,
        # Every output has the same prompt, so its logprobs are asked for once.
        "prompt_logprobs": sampling.prompt_logprobs if output_index == 0 else None,
        "structured_outputs": _structured(grammar, sampling),
        "extra_args": extra,
    }


def _structured(grammar: CompiledGrammar | None, sampling: Sampling) -> dict[str, Any] | None:
    if sampling.constraint is None:
        return None
    if grammar is None or grammar.vocabulary is None:
        kind = sampling.constraint.kind
        raise Unsupported(
            "json_schema" if kind == "json_object" else kind, "no grammar can be compiled for this tokenizer"
        )
    note = GrammarNote(
        grammar.path, grammar.vocabulary.path, grammar.vocabulary.end_token_ids, sampling.stop_token_ids
    )
    return {"grammar": note.encode(), "_backend": "xgrammar"}
