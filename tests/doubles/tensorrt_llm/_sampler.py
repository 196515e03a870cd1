"""The engine's own sampler: what it honours, ignores and miscounts, by the recorded behaviours."""

from __future__ import annotations

import math
from typing import Any

import torch

from tensorrt_llm import _contract
from tensorrt_llm._toy import VOCAB_SIZE, toy_logits

Logprob = _contract.make_dataclass("Logprob")


def sample(logits: torch.Tensor, request: Any, sequence: Any) -> int:
    """Draw the sequence's next token from a flat row; changes the row."""
    params, position = request.params, len(sequence.tokens)
    if params.embedding_bias is not None:
        logits = logits + torch.as_tensor(params.embedding_bias)
    if request.is_cpp or not _contract.has("penalties_ignored"):
        logits = _penalize(logits, params, request.prompt, sequence.tokens)
    _hold_back_the_end(logits, request, position)
    if request.is_cpp or not _contract.has("bad_words_ignored"):
        _ban(logits, params, request.prompt + sequence.tokens)
    if params._greedy_decoding:
        return int(logits.argmax())
    temperature = 1.0 if params.temperature is None else params.temperature
    probs = torch.softmax(logits / temperature, dim=-1)
    if params.top_k:
        floor = probs.topk(min(params.top_k, VOCAB_SIZE)).values[-1]
        probs = torch.where(probs >= floor, probs, 0)
    generator = torch.Generator()
    if _contract.has("seed_ignored") and not request.is_cpp:
        generator.seed()
    else:
        generator.manual_seed(((params.seed or 0) * 1_000_003 + position * 64 + sequence.index) % 2**63)
    return int(torch.multinomial(probs, 1, generator=generator))


def logprobs(logits: torch.Tensor, token: int, num: int, *, top_only: bool) -> dict[int, Any]:
    """Give an entry: the most probable tokens, and the token itself unless top_only."""
    values = torch.log_softmax(logits.reshape(-1), dim=-1)
    best = torch.topk(values, num).indices.tolist()
    ranks = {t: rank for rank, t in enumerate(best, start=1)}
    rank = ranks.get(token, int((values >= values[token]).sum()))
    listed = best if top_only else [token, *best]
    return {t: Logprob(logprob=float(values[t]), rank=ranks.get(t, rank)) for t in listed}


def prompt_logprobs(request: Any, first_output: int) -> list[dict[int, Any]]:
    """Score each token's successor; the last token's is the first output token.

    Tokens whose blocks were found in the cache went through no forward pass and have no logits.
    """
    followers = [*request.prompt[1:], first_output]
    top_only = _contract.has("prompt_logprobs_top_only")
    num = request.params.prompt_logprobs
    return [
        logprobs(toy_logits(request.prompt[: at + 1]), followers[at], num, top_only=top_only)
        for at in range(request.cached_tokens, len(request.prompt))
    ]


def _penalize(logits: torch.Tensor, params: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    logits = logits.clone()
    if params.repetition_penalty not in (None, 1.0):
        for token in {*prompt, *output}:
            logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    for token in set(output):
        logits[token] -= (params.presence_penalty or 0) + (params.frequency_penalty or 0) * output.count(
            token
        )
    return logits


def _hold_back_the_end(logits: torch.Tensor, request: Any, position: int) -> None:
    if not request.params.min_tokens:
        return
    if not request.is_cpp and _contract.has("min_tokens_counts_prompt"):
        if len(request.prompt) + position < request.params.min_tokens:
            logits[request.end_id] = -math.inf  # -1 with ignore_eos: the last token of the vocabulary
    elif position < request.params.min_tokens and request.end_id >= 0:
        logits[request.end_id] = -math.inf


def _ban(logits: torch.Tensor, params: Any, tokens: list[int]) -> None:
    for word in [*([token] for token in params.bad_token_ids or []), *(params._bad_word_ids or [])]:
        before = word[:-1]
        if not before or tokens[-len(before) :] == before:
            logits[word[-1]] = -math.inf
