"""The demo model's vocabulary, and walks through grammars compiled for it."""

from __future__ import annotations

import pytest

from twinjet.grammar.vocabulary import Vocabulary, write_vocabulary

pytest.importorskip("xgrammar")

from tests.grammar.walker import Walker


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """The demo model's vocabulary, written to a file."""
    transformers = pytest.importorskip("transformers")
    from twinjet.models.demo import demo_model

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model(lambda *_: None))
    return write_vocabulary(
        tokenizer, vocab_size=49152, end_token_ids=(2,), folder=tmp_path_factory.mktemp("vocabulary")
    )


@pytest.fixture(scope="session")
def walker(vocabulary: Vocabulary) -> Walker:
    return Walker(vocabulary)
