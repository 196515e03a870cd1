"""The end token that a model folder's tokenizer files name, without loading the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _text(folder: Path, name: str) -> str | None:
    file = folder / name
    if not file.is_file():
        return None
    found: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else None


def named_eos(folder: Path) -> int | None:
    """Give the id of the tokenizer's end token, None if its files do not say it.

    Raises ValueError if a file is not JSON.
    """
    text = _text(folder, "tokenizer_config.json") or _text(folder, "special_tokens_map.json")
    file = folder / "tokenizer.json"
    if text is None or not file.is_file():
        return None
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    for token in tokenizer.get("added_tokens") or ():
        if token.get("content") == text:
            return int(token["id"])
    vocabulary = tokenizer.get("model", {}).get("vocab")
    found = vocabulary.get(text) if isinstance(vocabulary, dict) else None
    return None if found is None else int(found)
