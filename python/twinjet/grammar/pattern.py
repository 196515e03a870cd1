"""A schema's `pattern` as a regular expression over the text between a JSON string's quotes.

The result matches a part of what the pattern matches, never more, and only text that needs no escaping: character
classes lose quotes, backslashes and control characters, and the classes \\d, \\w, \\s mean ASCII, so that Python's and
JavaScript's readings are both met. What stands for such a character alone is written as its JSON escape. A pattern
that is not anchored may stand anywhere in the string, as JSON Schema says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from twinjet.grammar.limits import MAX_DEPTH, MAX_REPEAT

# The parser of the standard library: its tree is not public, but has been the same for twenty years.
_parser: Any = getattr(re, "_parser")  # noqa: B009
_constants: Any = getattr(re, "_constants")  # noqa: B009
_UNBOUNDED = _constants.MAXREPEAT

Ranges = list[tuple[int, int]]

_TOP = 0x10FFFF
_SAFE: Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, _TOP)]
_ESCAPES = {0x22: '\\"', 0x5C: "\\\\", 8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r"}
_DIGIT: Ranges = [(0x30, 0x39)]
_WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACE: Ranges = [(9, 13), (0x20, 0x20)]
_BEYOND: Ranges = [(0x80, _TOP)]
_WIDE_SPACE: Ranges = [
    (9, 13), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
    (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
]  # fmt: skip
_LINE_ENDS: Ranges = [(10, 10), (13, 13), (0x2028, 0x2029)]


class PatternRefused(ValueError):
    """The pattern uses something that cannot be enforced; the text says what."""


def _union(ranges: Ranges) -> Ranges:
    merged: Ranges = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def _complement(ranges: Ranges) -> Ranges:
    out: Ranges = []
    start = 0
    for low, high in _union(ranges):
        if start < low:
            out.append((start, low - 1))
        start = high + 1
    if start <= _TOP:
        out.append((start, _TOP))
    return out


def _intersect(a: Ranges, b: Ranges) -> Ranges:
    return _complement(_complement(a) + _complement(b))


# For each class its surest members, and everything that any reading counts to it.
_CATEGORIES: dict[Any, tuple[Ranges, Ranges]] = {
    _constants.CATEGORY_DIGIT: (_DIGIT, _DIGIT + _BEYOND),
    _constants.CATEGORY_WORD: (_WORD, _WORD + _BEYOND),
    _constants.CATEGORY_SPACE: (_SPACE, _WIDE_SPACE),
}
for _name in ("DIGIT", "WORD", "SPACE"):
    _sure, _all = _CATEGORIES[getattr(_constants, f"CATEGORY_{_name}")]
    _CATEGORIES[getattr(_constants, f"CATEGORY_NOT_{_name}")] = (_complement(_all), _complement(_sure))


def _class_text(ranges: Ranges) -> str:
    """Write a class of characters that need no escape; "" if there are none."""
    safe = _intersect(ranges, _SAFE)
    if not safe:
        return ""

    def char(code: int) -> str:
        if code < 0x7F and (chr(code).isalnum() or code == 0x5F):
            return chr(code)
        # Four digits always: a shorter escape would take a letter behind it for another digit.
        return f"\\u{code:04x}" if code < 0x10000 else chr(code)

    def write(parts: Ranges) -> str:
        return "".join(char(low) if low == high else f"{char(low)}-{char(high)}" for low, high in parts)

    outside = _complement(safe)
    if safe[-1][1] == _TOP:
        # Surrogates cannot be written and do not occur in a text.
        return f"[^{write(_intersect(outside, [(0, 0xD7FF), (0xE000, _TOP)]))}]"
    return f"[{write(safe)}]"


FREE = _class_text(_SAFE)
"""Any character that stands for itself between quotes."""


def length_pattern(low: int, high: int | None) -> str:
    """Give the expression for a string of low to high characters."""
    return f"{FREE}{_repeat(low, high)}"


def _repeat(low: int, high: int | None) -> str:
    if (low, high) == (0, None):
        return "*"
    if (low, high) == (1, None):
        return "+"
    return f"{{{low},{'' if high is None else high}}}"


def enforceable(pattern: str, min_length: int, max_length: int | None) -> str:
    """Translate a pattern, and a length's bounds if it has any, to an anchored expression; see the module.

    Raises PatternRefused.
    """
    source = re.sub(r"\(\?<(?![=!])", "(?P<", pattern)
    try:
        tree = _parser.parse(source)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternRefused(f"is no regular expression that can be read: {error}") from None
    if tree.state.flags & ~re.UNICODE:
        raise PatternRefused("has inline flags")
    branches = _branches(list(tree))
    texts = []
    for branch in branches:
        starts, items, ends = _anchors(branch)
        items = _within(items, min_length, max_length, is_anchored=starts and ends)
        text = "".join(_emit(item, 0) for item in items)
        texts.append(f"{'' if starts else FREE + '*'}{text}{'' if ends else FREE + '*'}")
    return texts[0] if len(texts) == 1 else "|".join(f"({text})" for text in texts)


def _branches(items: list[Any]) -> list[list[Any]]:
    """The alternatives at the top, through groups that hold everything but anchors."""
    first = next((i for i, item in enumerate(items) if item[0] is not _constants.AT), len(items))
    last = next((i for i in range(len(items), first, -1) if items[i - 1][0] is not _constants.AT), first)
    if last - first != 1:
        return [items]
    kind, value = items[first]
    if kind is _constants.BRANCH:
        inner = [b for branch in value[1] for b in _branches(list(branch))]
    elif kind is _constants.SUBPATTERN and not (value[1] or value[2]):
        inner = _branches(list(value[3]))
    else:
        return [items]
    return [[*items[:first], *branch, *items[last:]] for branch in inner]


_STARTS = (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING)
_ENDS = (_constants.AT_END, _constants.AT_END_STRING)


def _anchors(items: list[Any]) -> tuple[bool, list[Any], bool]:
    starts = ends = False
    while items and items[0][0] is _constants.AT and items[0][1] in _STARTS:
        items, starts = items[1:], True
    while items and items[-1][0] is _constants.AT and items[-1][1] in _ENDS:
        items, ends = items[:-1], True
    return starts, items, ends


def _width(items: Sequence[Any]) -> tuple[int, int | None]:
    pattern = _parser.SubPattern(_parser.State(), list(items))
    low, high = pattern.getwidth()
    return int(low), None if high >= _UNBOUNDED else int(high)


def _within(items: list[Any], low: int, high: int | None, *, is_anchored: bool) -> list[Any]:
    """Hold a pattern to a length's bounds, by changing its one repetition of a character if it has one."""
    if low == 0 and high is None:
        return items
    if not is_anchored:
        raise PatternRefused("cannot be combined with minLength or maxLength unless anchored at both ends")
    least, most = _width(items)
    if low <= least and (high is None or (most is not None and most <= high)):
        return items
    open_places = [i for i, item in enumerate(items) if _width([item])[0] != _width([item])[1]]
    if len(open_places) == 1:
        place = open_places[0]
        kind, value = items[place]
        if kind in (_constants.MAX_REPEAT, _constants.MIN_REPEAT) and _width(value[2]) == (1, 1):
            fixed = sum(_width([item])[0] for i, item in enumerate(items) if i != place)
            fewest = max(value[0], low - fixed)
            ceiling = _UNBOUNDED if high is None else high - fixed
            greatest = min(value[1], ceiling)
            if greatest < fewest or greatest < 0:
                raise PatternRefused("allows no string of the length that minLength and maxLength ask for")
            return [*items[:place], (kind, (fewest, greatest, value[2])), *items[place + 1 :]]
    raise PatternRefused("cannot be combined with minLength or maxLength unless one repetition decides")


def _emit(item: Any, depth: int) -> str:
    if depth > MAX_DEPTH:
        raise PatternRefused(f"has groups nested deeper than {MAX_DEPTH}")
    kind, value = item
    emit = _EMITTERS.get(kind)
    if emit is None:
        raise PatternRefused(f"uses {_NAMES.get(kind, str(kind).lower())}, which cannot be enforced")
    return emit(value, depth)


def _emit_all(items: Any, depth: int) -> str:
    return "".join(_emit(item, depth + 1) for item in items)


def _character(ranges: Ranges) -> str:
    text = _class_text(ranges)
    if text:
        return text
    escapes = [escape for code, escape in _ESCAPES.items() if any(lo <= code <= hi for lo, hi in ranges)]
    if not escapes:
        raise PatternRefused("asks for a character that a JSON string does not show as itself")
    # Each escape is a backslash and a letter; both are characters of the text that is matched.
    written = ["".join(f"\\u{ord(c):04x}" for c in escape) for escape in escapes]
    return "(" + "|".join(written) + ")"


def _emit_in(value: Any, _: int) -> str:
    parts = list(value)
    is_negated = bool(parts) and parts[0][0] is _constants.NEGATE
    ranges: Ranges = []
    for kind, content in parts[1:] if is_negated else parts:
        if kind is _constants.LITERAL:
            ranges.append((content, content))
        elif kind is _constants.RANGE:
            ranges.append(content)
        else:
            # What is excluded is excluded in every reading of the class.
            ranges += _CATEGORIES[content][1 if is_negated else 0]
    return _character(_complement(ranges) if is_negated else ranges)


def _emit_repeat(value: Any, depth: int) -> str:
    low, high, items = value
    if low > MAX_REPEAT or (high is not _UNBOUNDED and high > MAX_REPEAT):
        raise PatternRefused(f"repeats more than {MAX_REPEAT} times")
    return f"({_emit_all(items, depth)}){_repeat(int(low), None if high is _UNBOUNDED else int(high))}"


def _emit_group(value: Any, depth: int) -> str:
    _, add_flags, del_flags, items = value
    if add_flags or del_flags:
        raise PatternRefused("has inline flags")
    return f"({_emit_all(items, depth)})"


_EMITTERS: dict[Any, Callable[[Any, int], str]] = {
    _constants.LITERAL: lambda value, _: _character([(value, value)]),
    _constants.NOT_LITERAL: lambda value, _: _character(_complement([(value, value)])),
    _constants.ANY: lambda _value, _: _character(_complement(_LINE_ENDS)),
    _constants.IN: _emit_in,
    _constants.BRANCH: lambda value, depth: (
        "(" + "|".join(f"({_emit_all(branch, depth)})" for branch in value[1]) + ")"
    ),
    _constants.MAX_REPEAT: _emit_repeat,
    _constants.MIN_REPEAT: _emit_repeat,
    _constants.SUBPATTERN: _emit_group,
}
_NAMES = {
    _constants.ASSERT: "lookaround",
    _constants.ASSERT_NOT: "negative lookaround",
    _constants.GROUPREF: "a back-reference",
    _constants.AT: "an anchor or word boundary inside",
}
