"""What a compilation hands to the engine: the text where compiling it again is quick, else what was compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twinjet.grammar import compilation
from twinjet.grammar.compilation import ConstraintRefused, perform
from twinjet.grammar.handle import load_grammar
from twinjet.grammar.job import Job
from twinjet.grammar.vocabulary import Vocabulary

MANY_PROPERTIES = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(200)}}
SMALL = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}


def _compile(schema: Any, vocabulary: Vocabulary, folder: Path) -> tuple[Path, str]:
    """Give the file that is written, and what of it is compiled."""
    path = folder / "grammar.json"
    perform(Job(kind="json_schema", value=json.dumps(schema), vocabulary=vocabulary.path, target=str(path)))
    return path, path.read_text().partition("\n")[2]


@pytest.mark.parametrize("schema", [SMALL, MANY_PROPERTIES], ids=["small", "many-properties"])
def test_both_forms_allow_the_same(
    schema: Any, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xgrammar

    grammars = []
    for quick_s, is_text in ((60.0, True), (-1.0, False)):
        monkeypatch.setattr(compilation, "_QUICK_S", quick_s)
        monkeypatch.setattr(compilation, "_MAX_RULES", 300)
        monkeypatch.setattr(compilation, "MAX_COMPILED_BYTES", 64 << 20)
        folder = tmp_path / f"{is_text}"
        folder.mkdir()
        path, compiled = _compile(schema, vocabulary, folder)
        assert (compiled == "") is is_text
        grammars.append(load_grammar(str(path), vocabulary.path))
    matchers = [xgrammar.GrammarMatcher(grammar) for grammar in grammars]
    bitmasks = [xgrammar.allocate_token_bitmask(1, 49152) for _ in matchers]
    for character in '{"':
        for matcher, bitmask in zip(matchers, bitmasks, strict=True):
            matcher.fill_next_token_bitmask(bitmask)
            assert matcher.accept_string(character)
        assert bitmasks[0].tolist() == bitmasks[1].tolist()


def test_an_object_of_many_properties_goes_as_text(
    vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its compiled form is larger than what an engine may have to read."""
    monkeypatch.setattr(compilation, "_QUICK_S", -1.0)
    monkeypatch.setattr(compilation, "MAX_RECOMPILED_S", 60.0)
    _, compiled = _compile(MANY_PROPERTIES, vocabulary, tmp_path)
    assert compiled == ""


@pytest.mark.parametrize("max_rules", [0, 300])
def test_what_takes_long_in_both_forms_is_refused(
    max_rules: int, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_QUICK_S", -1.0)
    monkeypatch.setattr(compilation, "MAX_RECOMPILED_S", -1.0)
    monkeypatch.setattr(compilation, "_MAX_RULES", max_rules)
    with pytest.raises(ConstraintRefused, match="to compile and more than 16 MiB once compiled"):
        _compile(MANY_PROPERTIES, vocabulary, tmp_path)


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("regex", r"a\ud800b", "surrogate"),
        ("regex", r"\ud83d\ude00", "surrogate"),
        ("regex", r"a[x\udc00-\udfff]", "surrogate"),
        ("ebnf", r'root ::= "a" other' + "\n" + r'other ::= "\"\\\ud800"', "surrogate"),
        ("ebnf", r'root ::= "\U00110000"', "above"),
    ],
)
def test_characters_that_no_text_holds_are_refused(
    kind: Any, value: str, why: str, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    with pytest.raises(ConstraintRefused, match=why):
        perform(Job(kind=kind, value=value, vocabulary=vocabulary.path, target=str(tmp_path / "grammar")))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", r"[^\ud800-\udfff]"),
        ("regex", r"[\u0000-\uffff]\U0001f600"),
        ("regex", r"\\ud800[\]\-\\u]"),
        ("ebnf", r'root ::= "\\ud800" [\]"] "[\"" [^\ud800]'),
    ],
)
def test_characters_beside_them_are_not(
    kind: Any, value: str, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    path = tmp_path / "grammar"
    perform(Job(kind=kind, value=value, vocabulary=vocabulary.path, target=str(path)))
    assert path.exists()
