"""What the front end must know of an engine. Plain data that crosses the process boundary; no vLLM import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Read from vLLM's configuration in the process that holds it; config.facts() makes it.

    tokenizer: folder or name. eos: the tokenizer's end token. generation_eos: those that the model's
    generation_config names. default_sampling: fields of SamplingOverrides. settings: of EngineInfo. num_blocks: usable KV blocks, None
    for a model without a KV cache; with block_size known only once the engine has started.
    """

    version: str
    device: str
    source: str
    tokenizer: str
    max_model_len: int
    vocab_size: int
    max_logprobs: int
    max_num_seqs: int
    has_adapters: bool
    has_prefix_cache: bool
    has_priority: bool
    default_sampling: dict[str, Any]
    eos: int | None
    generation_eos: tuple[int, ...]
    settings: dict[str, str]
    num_blocks: int | None = None
    block_size: int = 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an output, the tokenizer's own first."""
        first = () if self.eos is None else (self.eos,)
        return tuple(dict.fromkeys(first + self.generation_eos))
