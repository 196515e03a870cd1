"""From a resolved request to the keyword arguments of SamplingParams and generate_async.

Nothing is left to the engine's defaults, since they are not the contract's: unset, its temperature, top-p and
top-k together mean greedy and its max_tokens is 32. What the engine's own sampler cannot honour is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from twinjet.engines.base import Capability
from twinjet.engines.seeds import output_seed
from twinjet.engines.tensorrt_llm.worker.grammar import GrammarHandle
from twinjet.engines.tensorrt_llm.worker.logits import DrawProcessor, DrawSettings
from twinjet.errors import Unsupported
from twinjet.request import EngineRequest, KvRetention, Sampling
from twinjet.sampling.bad_text import BadTextSettings

_GUIDES = {"schema": "json", "regex": "regex", "ebnf": "grammar", "structural_tag": "structural_tag"}
"""What grammar.compilation.written() gives, as fields of GuidedDecodingParams."""
DEFAULT_RETENTION = 35
"""TensorRT-LLM's own priority of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSampler:
    """What the engine's own sampler honours on this installation, as far as it was tried or is known."""

    penalties: bool = False
    min_p: bool = False
    logit_bias: bool = False
    min_tokens: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    guided_backend: str | None = None
    guided_decoding: Any | None = None

    @property
    def has_guides(self) -> bool:
        return self.guided_backend is not None and self.guided_decoding is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFacts:
    """The model's tokens. first_eos_token_id: the one the engine itself ends at."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    first_eos_token_id: int


def common_kwargs(sampling: Sampling, tokens: TokenFacts) -> dict[str, Any]:
    """Give what does not depend on who draws.

    The engine's result keeps stop tokens and is not detokenized: text and ends are made from the tokens, by
    the rules of twinjet.engines.tensorrt_llm.front.outputs. The engine knows one end token of its own; the model's
    others go with the stop tokens.
    """
    stop = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stop |= set(tokens.eos_token_ids) - {tokens.first_eos_token_id}
    kwargs: dict[str, Any] = {
        # Both given, the engine adds nothing of its own: else the model's end tokens would stop an output that
        # is to ignore them.
        "end_id": tokens.first_eos_token_id,
        "pad_id": tokens.first_eos_token_id,
        "n": 1,
        "best_of": 1,
        "max_tokens": sampling.max_tokens,
        "ignore_eos": sampling.ignore_eos,
        "include_stop_str_in_output": True,
        "detokenize": False,
    }
    if stop:
        kwargs["stop_token_ids"] = sorted(stop)
    if sampling.prompt_logprobs is not None:
        # 0 means off to some versions, and the token itself always comes along.
        kwargs["prompt_logprobs"] = max(1, sampling.prompt_logprobs)
    return kwargs


def drawn_by_us(
    request: EngineRequest,
    output_index: int,
    tokens: TokenFacts,
    *,
    key: int,
    report_path: str,
    bad_text: BadTextSettings | None,
    grammar: GrammarHandle | None,
    drawn_token_ids: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Give SamplingParams arguments for an output that our sampler draws.

    The engine's sampler is greedy and gets no other setting: a ban or penalty of its own could hit the one
    token that the processor left.
    """
    s = request.sampling
    ends = set(s.stop_token_ids) if s.ignore_eos else {*tokens.eos_token_ids, *s.stop_token_ids}
    settings = DrawSettings(
        key=key,
        report_path=report_path,
        vocab_size=tokens.vocab_size,
        num_prompt_tokens=len(request.prompt_token_ids),
        output_index=output_index,
        seed=s.seed,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        logit_bias=dict(s.logit_bias),
        allowed_token_ids=s.allowed_token_ids,
        bad_text=bad_text,
        min_tokens=s.min_tokens,
        max_tokens=s.max_tokens,
        end_token_ids=tuple(sorted(ends)),
        fault_token_id=tokens.first_eos_token_id,
        num_logprobs=s.logprobs,
        grammar=grammar,
        drawn_token_ids=drawn_token_ids,
    )
    return {
        **common_kwargs(s, tokens),
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 1,
        "logits_processor": DrawProcessor(settings),
    }


def drawn_by_engine(
    request: EngineRequest,
    output_index: int,
    tokens: TokenFacts,
    can: EngineSampler,
    guide: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Give SamplingParams arguments for an output that the engine's sampler draws.

    guide: the constraint, as grammar.compilation.written() gives it.
    Raises Unsupported for what it would ignore.
    """
    s = request.sampling
    refuse_unsupported(s, tokens, can)
    kwargs = common_kwargs(s, tokens)
    if s.is_greedy:
        kwargs |= {"temperature": 1.0, "top_p": 1.0, "top_k": 1}
    else:
        kwargs |= {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
        kwargs["seed"] = output_seed(s.seed, output_index)
        if s.min_p > 0:
            kwargs["min_p"] = s.min_p
    if s.repetition_penalty != 1:
        kwargs["repetition_penalty"] = s.repetition_penalty
    if s.frequency_penalty != 0:
        kwargs["frequency_penalty"] = s.frequency_penalty
    if s.presence_penalty != 0:
        kwargs["presence_penalty"] = s.presence_penalty
    if s.min_tokens > 0 and not s.ignore_eos:
        kwargs["min_tokens"] = s.min_tokens
    if s.logit_bias:
        kwargs["embedding_bias"] = bias_vector(s.logit_bias, tokens.vocab_size)
    if s.logprobs is not None:
        kwargs["logprobs"] = max(1, s.logprobs)
    if guide is not None:
        kind, text = guide
        kwargs["guided_decoding"] = can.guided_decoding(**{_GUIDES[kind]: text})  # type: ignore[misc]
    return kwargs


def refuse_unsupported(s: Sampling, tokens: TokenFacts, can: EngineSampler) -> None:
    """Raise Unsupported for what the engine's own sampler would ignore or get wrong in silence."""
    asked: dict[Capability, tuple[bool, bool]] = {
        "logit_bias": (bool(s.logit_bias), can.logit_bias),
        "min_tokens": (s.min_tokens > 0, can.min_tokens),
        "logprobs": (s.logprobs is not None, can.logprobs),
        "prompt_logprobs": (s.prompt_logprobs is not None, can.prompt_logprobs),
    }
    for capability, (is_asked, is_honoured) in asked.items():
        if is_asked and not is_honoured:
            raise Unsupported(capability, "TensorRT-LLM's own sampler was seen not to honour it here")
    ends = set(s.stop_token_ids) | (set() if s.ignore_eos else set(tokens.eos_token_ids))
    if s.min_tokens > 0 and ends - {tokens.first_eos_token_id}:
        raise Unsupported("min_tokens", "TensorRT-LLM's own sampler holds back one end token, not several")
    penalties = s.repetition_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0
    if penalties and not can.penalties:
        raise Unsupported("penalties", "TensorRT-LLM's own sampler ignores them")
    if s.min_p > 0 and not can.min_p:
        raise Unsupported("min_p", "TensorRT-LLM's own sampler may ignore it")
    if s.bad_words:
        raise Unsupported("bad_words", "TensorRT-LLM's own sampler bans token sequences, not strings")
    if s.allowed_token_ids:
        raise Unsupported("allowed_token_ids", "TensorRT-LLM's own sampler has no such setting")
    if s.constraint is not None and not can.has_guides:
        kind = s.constraint.kind
        raise Unsupported(
            "json_schema" if kind == "json_object" else kind,
            "set guided_decoding_backend in the deployment's options, or native_sampler",
        )


def retention_config(retention: KvRetention, config_type: Any) -> Any:
    """Make the engine's retention settings: one range over the whole prompt, and the output."""
    lasts = None if retention.duration_s is None else timedelta(seconds=retention.duration_s)
    prompt = DEFAULT_RETENTION if retention.prompt_priority is None else retention.prompt_priority
    output = DEFAULT_RETENTION if retention.output_priority is None else retention.output_priority
    return config_type(
        [config_type.TokenRangeRetentionConfig(0, None, prompt, lasts)],
        decode_retention_priority=output,
        decode_duration_ms=lasts,
    )


def engine_priority(priority: int) -> float:
    """Map -100 .. 100 to the engine's 0 .. 1; 0 is its default, 0.5."""
    return min(1.0, max(0.0, (priority + 100) / 200))


def bias_vector(biases: Mapping[int, float], vocab_size: int) -> Any:
    """Make the engine's embedding_bias: a float32 tensor [vocab_size]."""
    import torch

    vector = torch.zeros(vocab_size, dtype=torch.float32)
    for token_id, bias in biases.items():
        vector[token_id] = bias
    return vector
