"""What constraints are written as for xgrammar."""

from __future__ import annotations

import pytest
import xgrammar

from twinjet.grammar.compilation import written


@pytest.mark.parametrize("choice", ["🌶🌶", "é", 'a"b', "a\\b", "\n\t", "\u0001", "yes"])
def test_a_choice_is_the_very_text(choice: str) -> None:
    """A grammar of surrogate pairs would make text that is no text."""
    kind, text = written("choice", "", [choice])
    assert kind == "ebnf"
    info = xgrammar.TokenizerInfo([chr(i).encode("latin-1") for i in range(256)], stop_token_ids=[255])
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(text)
    matcher = xgrammar.GrammarMatcher(compiled)
    assert all(matcher.accept_token(byte) for byte in choice.encode())
    assert matcher.accept_token(255)
