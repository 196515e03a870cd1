"""Long texts go to the tokenizer's batches, which give up the interpreter's lock, and come back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from twinjet.models import unlocked


class Recorded:
    """A tokenizer that tells what was called."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.called.append(name)
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(("times", "kind"), [(3, ""), (3000, "_batch")])
def test_what_is_long_is_done_in_a_batch_of_one(demo_model_path: Path, times: int, kind: str) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model_path / "tokenizer.json"))
    recorded: Any = Recorded(tokenizer)
    text = "naïve café <|im_end|> 東京 " * times
    found = unlocked.encode(recorded, text, add_special_tokens=False)
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert (found.ids, found.offsets) == (expected.ids, expected.offsets)
    assert unlocked.decode(recorded, found.ids, skip_special_tokens=False) == text
    assert recorded.called == [f"encode{kind}", f"decode{kind}"]
