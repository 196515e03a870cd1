"""Patterns against Python's own search: what a translated pattern produces, the pattern matches."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.grammar.walker import Walker
from twinjet.grammar.pattern import PatternRefused, enforceable

KEPT = [
    ("^a.*b$", 0, None), ("foo", 0, None), ("^[^a]+$", 0, None), (r"^\d{3}-\w+\s$", 0, None),
    ("^(a|b)+$|^c$", 0, None), ("^(foo|bar$)", 0, None), (r"^\S+@\S+$", 0, None), ('^"x\\\\y/$', 0, None),
    ("^[\\n\\t]$", 0, None), ("^é+$", 0, None), ("^[A-Z][a-z]*$", 3, 6), ("^[a-z]+$", 2, 4),
    ("^[A-Z]{3}$", 3, 3), ("^[\u4e00-\u9fff]{2}$", 0, None), ("", 0, None), ("^$", 0, None),
    ("^\\W\\D\\S$", 0, None), ("^/[^/]*\\.json$", 0, None), ("a|", 0, None), ("^x{0,3}?y$", 0, None),
    ("^(\\([0-9]{3}\\))?[0-9]{3}-[0-9]{4}$", 0, None),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "low", "high"), KEPT)
def test_what_comes_out_is_json_and_matches(walker: Walker, pattern: str, low: int, high: int | None) -> None:
    schema = {"type": "string", "pattern": pattern, "minLength": low}
    if high is not None:
        schema["maxLength"] = high
    compiled = walker.compile("json_schema", json.dumps(schema))
    random = np.random.default_rng(1)
    for _ in range(12):
        text = walker.walk(compiled, random, most=60)
        if text is not None:
            value = json.loads(text)
            assert re.search(pattern, value)
            assert low <= len(value) <= (high or len(value))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"\bfoo", "boundary"), (r"^(?=a)b", "lookaround"), (r"^(?!a)b", "negative lookaround"),
        ("a^b", "anchor"), (r"^(a)\1$", "back-reference"), (r"\p{L}", "no regular expression"),
        ("(?i)a", "flags"), ("a{1,1000000}", "repeats"), ("\ud800", "does not show"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_named(pattern: str, why: str) -> None:
    with pytest.raises(PatternRefused, match=why):
        enforceable(pattern, 0, None)


def test_a_length_that_the_pattern_decides_in_two_places_is_refused() -> None:
    with pytest.raises(PatternRefused, match="one repetition"):
        enforceable("^a*b*$", 0, 5)
    with pytest.raises(PatternRefused, match="anchored"):
        enforceable("a", 0, 5)


_atoms = st.sampled_from(["a", "b", ".", "\\d", "\\w", "[^b]", "[a-c]", '"', "\\\\", "\\n", "é"])
_patterns = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}"])).map(lambda t: f"({t[0]}){t[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=60, derandomize=True)
@example('(.")*', True, True, 0)
@example('"', False, True, 2588)
@given(_patterns, st.booleans(), st.booleans(), st.integers(0, 2**32))
@example('\\w"', False, False, 0)
def test_any_pattern_is_kept(walker: Walker, body: str, starts: bool, ends: bool, seed: int) -> None:
    pattern = f"{'^' * starts}{body}{'$' * ends}"
    compiled = walker.compile("json_schema", json.dumps({"type": "string", "pattern": pattern}))
    random = np.random.default_rng(seed)
    for _ in range(3):
        text = walker.walk(compiled, random, most=40)
        if text is not None:
            assert re.search(pattern, json.loads(text)), text
