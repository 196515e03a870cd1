"""A model's tokens as the grammar compiler wants them, written to a file that every process reads once.

Special tokens are left out of the text: a grammar could otherwise be met by the letters of `<|im_start|>`, which the
server then drops from the text. Imports xgrammar only when it is used.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_NICE = 5
"""Of the process that writes a vocabulary beside a server."""


class GrammarUnavailable(Exception):
    """xgrammar cannot be used here; the text says why."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """path: the file. key: names its content. end_token_ids: end an output once its grammar is complete.

    is_compact: JSON without any white space.
    """

    path: str
    key: str
    end_token_ids: tuple[int, ...] = ()
    is_compact: bool = False


def write_vocabulary(
    hf_tokenizer: Any,
    *,
    vocab_size: int,
    end_token_ids: tuple[int, ...],
    folder: Path,
    is_compact: bool = False,
) -> Vocabulary:
    """Write a Hugging Face tokenizer's vocabulary into a folder; takes about half a second.

    Raises GrammarUnavailable if xgrammar is missing, too old or does not know the tokenizer's kind.
    """
    try:
        xgrammar = importlib.import_module("xgrammar")
    except ImportError as error:
        raise GrammarUnavailable(f"xgrammar cannot be imported: {error}") from error
    if not hasattr(xgrammar.CompiledGrammar, "deserialize_json"):
        raise GrammarUnavailable("this xgrammar cannot serialise grammars")
    try:
        found = xgrammar.TokenizerInfo.from_huggingface(
            hf_tokenizer, vocab_size=vocab_size, stop_token_ids=list(end_token_ids)
        )
        tokens = list(found.decoded_vocab)
        for token_id in _special_ids(hf_tokenizer):
            if token_id < len(tokens):
                tokens[token_id] = b""
        info = xgrammar.TokenizerInfo(
            tokens,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=vocab_size,
            stop_token_ids=list(end_token_ids),
            add_prefix_space=False,
        )
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise GrammarUnavailable(f"xgrammar does not know this tokenizer: {error}") from error
    text = info.serialize_json()
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / f"vocabulary-{key}.json"
    path.write_text(text)
    return Vocabulary(str(path), key, end_token_ids, is_compact)


def _special_ids(hf_tokenizer: Any) -> set[int]:
    added = getattr(hf_tokenizer, "added_tokens_decoder", {})
    return set(hf_tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


async def write_vocabulary_apart(
    tokenizer: str,
    *,
    vocab_size: int,
    end_token_ids: tuple[int, ...],
    folder: Path,
    is_compact: bool = False,
) -> Vocabulary:
    """Do the same in a process of its own, which loads the tokenizer by folder or name.

    Keeps xgrammar and transformers, some hundred megabytes, out of this process. Raises GrammarUnavailable.
    """
    wanted = {
        "tokenizer": tokenizer, "vocab_size": vocab_size, "end_token_ids": end_token_ids,
        "folder": str(folder), "is_compact": is_compact,
    }  # fmt: skip
    # Workers of engines import this module for its files alone.
    import asyncio

    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "twinjet.grammar.vocabulary", json.dumps(wanted),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    lines = output.decode().splitlines()
    answer = (
        json.loads(lines[-1]) if lines else {"error": f"its process ended with code {process.returncode}"}
    )
    if "error" in answer:
        raise GrammarUnavailable(answer["error"])
    return Vocabulary(answer["path"], answer["key"], end_token_ids, is_compact)


def _main(wanted: dict[str, Any]) -> dict[str, str]:
    # Some 3 s of CPU that nobody waits for yet, just when the first requests come.
    os.nice(_NICE)
    try:
        transformers = importlib.import_module("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(wanted["tokenizer"])
        made = write_vocabulary(
            tokenizer,
            vocab_size=wanted["vocab_size"],
            end_token_ids=tuple(wanted["end_token_ids"]),
            folder=Path(wanted["folder"]),
        )
    except (GrammarUnavailable, ImportError, OSError, ValueError) as error:
        return {"error": str(error)}
    return {"path": made.path, "key": made.key}


@lru_cache(maxsize=8)
def tokenizer_info(path: str) -> Any:
    """Read a vocabulary's file as xgrammar's TokenizerInfo, once in each process."""
    xgrammar = importlib.import_module("xgrammar")
    return xgrammar.TokenizerInfo.deserialize_json(Path(path).read_text())


@lru_cache(maxsize=8)
def token_lengths(path: str) -> Any:
    """The bytes of each token of a vocabulary, an int array; reading them takes a tenth of a second."""
    import numpy as np

    return np.array([len(token) for token in tokenizer_info(path).decoded_vocab])


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
