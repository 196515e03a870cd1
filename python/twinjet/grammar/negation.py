"""The opposite of a subschema, as schemas of which at least one must hold. Pure.

Each keyword that fails makes the whole fail, so a schema's opposite is the union of its keywords' opposites. Opposites
may be narrower than they could be (an `items` that fails is made to fail at the first item); what cannot be said in
JSON Schema's other keywords is named by Unwritten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TYPES = ("object", "array", "string", "number", "boolean", "null")
EXCLUDED = "x-twinjet-excluded"
"""A keyword of ours: the value is of this type and none of these."""


@dataclass(frozen=True, slots=True)
class Unwritten:
    """Values of a type that fail a keyword, which nothing else can say."""

    keyword: str
    kind: str


Opposite = Any


def opposites(schema: Any) -> list[Opposite]:
    """Give schemas of which at least one holds for every value that fails `schema`, and none for one that does not.

    References are left to the caller, who can resolve them.
    """
    if schema is True:
        return []
    if schema is False:
        return [True]
    found: list[Opposite] = []
    for keyword, value in schema.items():
        rule = _RULES.get(keyword)
        if rule is not None:
            found += rule(value, schema)
        elif keyword in _CANNOT:
            found.append(Unwritten(keyword, _CANNOT[keyword]))
    return found


def _type(value: Any, _: Any) -> Iterator[Opposite]:
    named = [value] if isinstance(value, str) else value
    kinds = {"number" if t == "integer" else t for t in named}
    others = [t for t in TYPES if t not in kinds]
    if others:
        yield {"type": others}
    if "integer" in named and "number" not in named:
        yield Unwritten("type", "number")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if value is None:
        return "null"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "number"


def _constants(values: list[Any]) -> Iterator[Opposite]:
    kinds = {_kind(v) for v in values}
    others = [t for t in TYPES if t not in kinds]
    if others:
        yield {"type": others}
    if "boolean" in kinds:
        yield {"enum": [v for v in (True, False) if not any(v is w for w in values)]}
    numbers = sorted(v for v in values if _kind(v) == "number")
    if numbers:
        bounds = [None, *numbers, None]
        for low, high in itertools.pairwise(bounds):
            between: dict[str, Any] = {"type": "number"}
            if low is not None:
                between["exclusiveMinimum"] = low
            if high is not None:
                between["exclusiveMaximum"] = high
            yield between
    for kind in ("string", "object", "array"):
        if excluded := [v for v in values if _kind(v) == kind]:
            yield {"type": kind, EXCLUDED: excluded}


def _properties(value: dict[str, Any], _: Any) -> Iterator[Opposite]:
    for name, schema in value.items():
        yield {"type": "object", "required": [name], "properties": {name: {"not": schema}}}


def _prefix_items(value: list[Any], _: Any) -> Iterator[Opposite]:
    for i, schema in enumerate(value):
        yield {"type": "array", "minItems": i + 1, "prefixItems": [*[True] * i, {"not": schema}]}


def _items(value: Any, schema: Any) -> Iterator[Opposite]:
    if isinstance(value, list):
        yield from _prefix_items(value, schema)
        return
    first = len(schema.get("prefixItems", ()))
    yield {"type": "array", "minItems": first + 1, "prefixItems": [*[True] * first, {"not": value}]}


def _conditional(condition: Any, schema: Any) -> Iterator[Opposite]:
    if "then" in schema:
        yield {"allOf": [condition, {"not": schema["then"]}]}
    if "else" in schema:
        yield {"allOf": [{"not": condition}, {"not": schema["else"]}]}


def _at_most(keyword: str, kind: str) -> Callable[[Any, Any], Iterator[Opposite]]:
    """The opposite of a least number of something."""

    def rule(value: Any, _: Any) -> Iterator[Opposite]:
        if value > 0:
            yield {"type": kind, keyword: int(value) - 1}

    return rule


def _at_least(keyword: str, kind: str) -> Callable[[Any, Any], Iterator[Opposite]]:
    def rule(value: Any, _: Any) -> Iterator[Opposite]:
        yield {"type": kind, keyword: int(value) + 1}

    return rule


def _number(keyword: str) -> Callable[[Any, Any], Iterator[Opposite]]:
    def rule(value: Any, _: Any) -> Iterator[Opposite]:
        yield {"type": "number", keyword: value}

    return rule


def _dependent_required(value: dict[str, list[str]], _: Any) -> Iterator[Opposite]:
    for name, needed in value.items():
        for other in needed:
            yield {"type": "object", "required": [name], "properties": {other: False}}


def _any_of(value: list[Any], _: Any) -> Iterator[Opposite]:
    yield {"allOf": [{"not": s} for s in value]}


_RULES: dict[str, Callable[[Any, Any], Iterator[Opposite]]] = {
    "type": _type,
    "const": lambda value, _: _constants([value]),
    "enum": lambda value, _: _constants(value),
    "minimum": _number("exclusiveMaximum"),
    "maximum": _number("exclusiveMinimum"),
    "exclusiveMinimum": _number("maximum"),
    "exclusiveMaximum": _number("minimum"),
    "minLength": _at_most("maxLength", "string"),
    "maxLength": _at_least("minLength", "string"),
    "minItems": _at_most("maxItems", "array"),
    "maxItems": _at_least("minItems", "array"),
    "minProperties": _at_most("maxProperties", "object"),
    "maxProperties": _at_least("minProperties", "object"),
    "required": lambda value, _: ({"type": "object", "properties": {name: False}} for name in value),
    "properties": _properties,
    "prefixItems": _prefix_items,
    "items": _items,
    "allOf": lambda value, _: ({"not": s} for s in value),
    "anyOf": _any_of,
    # Also when several hold, but that would need every pair.
    "oneOf": _any_of,
    "not": lambda value, _: iter([value]),
    "if": _conditional,
    "dependentRequired": _dependent_required,
}
_CANNOT = {
    "additionalItems": "array",
    "additionalProperties": "object",
    "contains": "array",
    "dependencies": "object",
    "dependentSchemas": "object",
    "multipleOf": "number",
    "pattern": "string",
    "patternProperties": "object",
    "propertyNames": "object",
    "unevaluatedItems": "array",
    "unevaluatedProperties": "object",
    "uniqueItems": "array",
}
