"""Schemas: what is written for the compiler is kept by every output, or refused by keyword."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.grammar.walker import Walker
from twinjet.grammar.schema import SchemaRefused, normalise

INTEGER: dict[str, Any] = {"type": "integer"}
KEPT: list[dict[str, Any]] = [
    {"allOf": [{"type": "string"}, {"enum": ["yes", "no", 3]}]},
    {"allOf": [{"properties": {"a": INTEGER}, "required": ["a"]}], "properties": {"b": {"type": "boolean"}}},
    {"type": "object", "required": ["a"]},
    {"required": ["a"], "type": "object", "additionalProperties": {"type": "boolean"}},
    {"pattern": "^[ab]{3}$"},
    {"maxLength": 2},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"anyOf": [{"type": "string"}, INTEGER], "maxLength": 1, "minimum": 5},
    {"$ref": "#/$defs/n", "minimum": 3, "$defs": {"n": {"type": "integer", "maximum": 9}}},
    {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "not": {"required": ["a"]}},
    {"type": ["integer", "string"], "not": {"type": "string"}},
    {"enum": ["aa", "b", "ab"], "not": {"pattern": "^a"}},
    {"type": "integer", "not": {"const": 7}, "minimum": 6, "maximum": 8},
    {
        "type": "object", "properties": {"a": {"enum": [1, 2]}, "b": INTEGER},
        "if": {"properties": {"a": {"const": 1}}, "required": ["a"]},
        "then": {"required": ["b"]}, "else": {"properties": {"b": False}},
    },
    {"enum": [1, 5, 20], "minimum": 4, "maximum": 10},
    {"oneOf": [INTEGER, {"type": "number", "minimum": 2}]},
    {"oneOf": [
        {"type": "object", "properties": {"k": {"const": "a"}, "x": INTEGER}, "required": ["k"]},
        {"type": "object", "properties": {"k": {"const": "b"}, "y": INTEGER}, "required": ["k"]},
    ]},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 2},
    {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
    {"type": "array", "contains": {"const": 1}, "items": INTEGER, "maxItems": 3},
    {"type": "array", "prefixItems": [INTEGER, {"type": "string"}], "items": False, "minItems": 1},
    {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "dependentRequired": {"a": ["b"]}},
    {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": INTEGER},
    {"type": "object", "patternProperties": {"^k[0-9]$": INTEGER}, "additionalProperties": False},
    {"type": "object", "properties": {"a": INTEGER}, "unevaluatedProperties": False},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
    {"type": ["null", "boolean"], "enum": [None, True, 3]},
    {"const": {"a": [1, None, "é\""]}},
    {"$ref": "#/$defs/t", "$defs": {"t": {
        "type": "object", "properties": {"v": INTEGER, "kids": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
        "required": ["v"],
    }}},
    {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [INTEGER],
     "additionalItems": {"type": "boolean"}},
]  # fmt: skip


@pytest.mark.parametrize("schema", KEPT, ids=lambda s: json.dumps(s)[:60])
def test_outputs_keep_to_the_schema(walker: Walker, schema: dict[str, Any]) -> None:
    compiled = walker.compile("json_schema", json.dumps(schema))
    checker = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
    random = np.random.default_rng(2)
    texts = [text for _ in range(20) if (text := walker.walk(compiled, random)) is not None]
    assert texts
    for text in texts:
        checker.validate(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"$ref": "#"}, r"\$ref at /: leads back"),
        ({"$ref": "https://example.com/other.json"}, r"\$ref at /: .* is not within"),
        ({"type": "array", "items": INTEGER, "uniqueItems": True}, "uniqueItems at /"),
        ({"properties": {"p": {"type": "integer", "multipleOf": 7}}}, "multipleOf at /properties/p"),
        ({"type": "string", "not": {"pattern": "^a"}}, "not at /: the opposite of pattern"),
        ({"type": "string", "not": {"const": "abc"}}, "not at /: excluding a string"),
        ({"type": "string", "format": "json-pointer"}, "format at /"),
        ({"type": "string", "allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "pattern at /"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no JSON value"),
        ({"enum": []}, "no JSON value"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no JSON value"),
        ({"type": "array", "items": INTEGER, "minItems": 10**18}, "minItems at /: 1e.18 is too large"),
        ({"type": "array", "items": 5}, "not a JSON schema"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "drafts 3 and 4"),
    ],
    ids=lambda v: json.dumps(v)[:50],
)
def test_what_cannot_be_kept_is_refused_by_keyword(schema: dict[str, Any], keyword: str) -> None:
    with pytest.raises(SchemaRefused, match=keyword):
        normalise(json.dumps(schema))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"), ("[]", "must be a JSON object"), ('{"minimum": NaN}', "NaN"),
        ('{"minimum": 1e999}', "too large"), ('{"items":' * 150 + "{}" + "}" * 150, "151 deep"),
    ],
)  # fmt: skip
def test_what_is_no_schema_says_so(text: str, why: str) -> None:
    with pytest.raises(SchemaRefused, match=why):
        normalise(text)


def test_brackets_inside_strings_do_not_count_as_depth() -> None:
    assert normalise(json.dumps({"const": "[" * 500})) == {"enum": ["[" * 500]}
