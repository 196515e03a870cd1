"""The running model's vocabulary for the grammar compiler. Imports vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.tokenizers import cached_tokenizer_from_config

from twinjet.grammar.vocabulary import Vocabulary, write_vocabulary

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def write(config: VllmConfig, end_token_ids: tuple[int, ...], folder: Path) -> Vocabulary:
    """Write the vocabulary of vLLM's tokenizer. Raises GrammarUnavailable for one that xgrammar does not know."""
    model = config.model_config
    return write_vocabulary(
        cached_tokenizer_from_config(model),
        vocab_size=model.get_vocab_size(),
        end_token_ids=end_token_ids,
        folder=folder,
        is_compact=config.structured_outputs_config.disable_any_whitespace,
    )
