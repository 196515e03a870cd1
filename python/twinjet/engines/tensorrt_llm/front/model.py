"""What the engine must know of its model: tokenizer, end tokens, limits and defaults."""

from __future__ import annotations

from dataclasses import dataclass

from twinjet.engines.tensorrt_llm.front.handle import EngineHandle
from twinjet.engines.tensorrt_llm.front.params import TokenFacts
from twinjet.engines.tensorrt_llm.front.tokenizer import (
    HfTokenizer,
    ModelFiles,
    model_folder,
    unwrap_tokenizer,
)
from twinjet.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's files, tokenizer and tokens. device: the GPU's name, or "cpu"."""

    files: ModelFiles
    tokenizer: HfTokenizer
    tokens: TokenFacts
    device: str


def learn_model(handle: EngineHandle) -> ModelFacts:
    """Read the model's files; may take a second. Raises ConfigError naming the setting that would help."""
    path = f"deployments.{handle.name}"
    files = ModelFiles(model_folder(handle.model, handle.llm))
    wrapped = getattr(handle.llm, "tokenizer", None)
    if wrapped is None:
        raise ConfigError(f"{path}: the model has no tokenizer; set options.tokenizer to its folder")
    hf = unwrap_tokenizer(wrapped)
    vocab_size = files.vocab_size or len(hf)
    tokenizer = HfTokenizer(hf, vocab_size)
    eos = tuple(dict.fromkeys(handle.settings.own.eos_token_ids or files.eos_token_ids))
    # The engine ends at the tokenizer's end token whatever the model's files say, so it is one.
    first = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos[0] if eos else None
    if first is None:
        raise ConfigError(f"{path}: the model names no end token; set options.twinjet.eos_token_ids")
    tokens = TokenFacts(
        vocab_size=vocab_size, eos_token_ids=tuple(dict.fromkeys((*eos, first))), first_eos_token_id=first
    )
    return ModelFacts(files, tokenizer, tokens, _device_name())


def _device_name() -> str:
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"
