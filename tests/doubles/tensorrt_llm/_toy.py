"""The stand-in's model and tokenizer: bytes as tokens, logits as a function of the tokens so far."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from twinjet.engines.fixed_logits import fixed_logits

EOS = 256
BOS = 257
VOCAB_SIZE = 258


def toy_logits(token_ids: Sequence[int]) -> torch.Tensor:
    """Give the next token's logits, float32 [1, 1, VOCAB_SIZE]."""
    return torch.from_numpy(fixed_logits(token_ids, VOCAB_SIZE)).reshape(1, 1, -1)


@lru_cache(maxsize=1)
def toy_tokenizer() -> Any:
    """Make a byte-level tokenizer of the usual kind, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant: {% endif %}"
    )
    return fast


def _byte_alphabet() -> list[str]:
    """Give each byte its printable stand-in, as byte-level BPE does (Radford et al. 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
