"""Guided decoding of the stand-in's own: after the logits processors, before the draw."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

import torch
import xgrammar

from tensorrt_llm._toy import EOS, VOCAB_SIZE, toy_tokenizer


def matcher(guide: Any) -> Any:
    """Begin to follow a guide. Raises whatever the grammar compiler raises."""
    compiler = _compiler()
    if guide.json is not None:
        schema = guide.json if isinstance(guide.json, str) else json.dumps(guide.json)
        compiled = compiler.compile_json_schema(schema)
    elif guide.json_object:
        compiled = compiler.compile_builtin_json_grammar()
    elif guide.regex is not None:
        compiled = compiler.compile_regex(guide.regex)
    elif guide.structural_tag is not None:
        compiled = compiler.compile_structural_tag(guide.structural_tag)
    else:
        compiled = compiler.compile_grammar(guide.grammar)
    return xgrammar.GrammarMatcher(compiled)


def mask(logits: torch.Tensor, followed: Any) -> None:
    """Leave the tokens that the guide allows next."""
    if followed.is_terminated():
        return
    bitmask = xgrammar.allocate_token_bitmask(1, VOCAB_SIZE)
    followed.fill_next_token_bitmask(bitmask)
    for token in range(VOCAB_SIZE):
        if not (int(bitmask[0, token // 32]) >> (token % 32)) & 1:
            logits[token] = -math.inf


@lru_cache(maxsize=1)
def _compiler() -> Any:
    info = xgrammar.TokenizerInfo.from_huggingface(
        toy_tokenizer(), vocab_size=VOCAB_SIZE, stop_token_ids=[EOS]
    )
    return xgrammar.GrammarCompiler(info, max_threads=1)
