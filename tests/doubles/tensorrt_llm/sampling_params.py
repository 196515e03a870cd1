"""SamplingParams and GuidedDecodingParams: recorded fields, and the recorded rules between them."""

from __future__ import annotations

import enum
import os
from typing import Any

from tensorrt_llm import _contract


def _check_guides(self: Any) -> None:
    guides = [self.json, self.regex, self.grammar, self.json_object, self.structural_tag]
    if sum(bool(guide) for guide in guides) > 1:
        raise ValueError("more than one guide")


GuidedDecodingParams = _contract.make_dataclass("GuidedDecodingParams", after_init=_check_guides)


def _check(self: Any) -> None:
    self.best_of = self.best_of or self.n
    if self.top_p is not None and not 0 <= self.top_p <= 1:
        raise ValueError(f"top_p is {self.top_p}")
    if self.top_k is not None and self.top_k < 0:
        raise ValueError(f"top_k is {self.top_k}")
    if self.temperature is not None and self.temperature < 0:
        raise ValueError(f"temperature is {self.temperature}")
    if self.best_of < self.n:
        raise ValueError(f"best_of {self.best_of} below n {self.n}")
    if (
        self.best_of > 1
        and self._greedy_decoding
        and not self.use_beam_search
        and not os.environ.get("TLLM_ALLOW_N_GREEDY_DECODING")
    ):
        raise ValueError("several greedy outputs")
    if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
        raise ValueError("truncate_prompt_tokens below 1")


def _greedy(self: Any) -> bool:
    if self.use_beam_search:
        return False
    if self.temperature is None and self.top_p is None and self.top_k is None:
        return not (_contract.VERSION >= "1.3" and self.min_p)
    return self.top_k == 1 or self.top_p == 0 or self.temperature == 0


LogprobMode = enum.Enum("LogprobMode", ["RAW", "PROCESSED"])
SamplingParams = _contract.make_dataclass(
    "SamplingParams",
    members={"RAW": LogprobMode["RAW"]},
    after_init=_check,
    _greedy_decoding=property(_greedy),
    _stop_word_ids=None,
    _bad_word_ids=None,
    _stream_interval=1,
)


def setup(params: Any, tokenizer: Any, stream_interval: int, generation_eos: list[int]) -> None:
    """Fill in what the package fills in at submission, changing the caller's object."""
    if params.end_id is None:
        params.end_id = tokenizer.eos_token_id
        params.pad_id = params.end_id if params.pad_id is None else params.pad_id

        def encode(words: Any) -> list[list[int]]:
            words = [words] if isinstance(words, str) else words or []
            return [tokenizer.encode(word, add_special_tokens=False) for word in words]

        if _contract.has("setup_adds_eos"):
            ends = [token for token in generation_eos if token != params.end_id]
            params.stop_token_ids = [*(params.stop_token_ids or []), *ends] or None
        params._stop_word_ids = encode(params.stop)
        params._bad_word_ids = encode(params.bad)
    elif params.stop or params.bad:
        raise ValueError("stop or bad words are not processed by tokenizer")
    params._stream_interval = stream_interval


def stop_reasons(params: Any) -> list[tuple[Any, list[int]]]:
    """List (stop reason, its token ids), tokens first."""
    words = [params.stop] if isinstance(params.stop, str) else params.stop or []
    return [(token, [token]) for token in params.stop_token_ids or []] + list(
        zip(words, params._stop_word_ids or [], strict=False)
    )
