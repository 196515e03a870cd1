"""Any message of a contract, filled with what is most likely to hurt: hypothesis strategies from the descriptors.

A message begins as one that is in order, so that what is wrong with it is found deep inside, and then some of its fields,
however deep, are set to the worst that their types can hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_INT32 = (0, 1, -1, 2, 20, 63, 64, 65, 100, 101, -100, -101, 257, 258, 4095, 4096, 2**31 - 1, -(2**31))
_UINT32 = (0, 1, 2, 16, 64, 4096, 4097, 2**31 - 1, 2**31, 2**32 - 1)
_INT64 = (0, 1, -1, 3600, 2**31, 2**53 + 1, 315_576_000_001, 2**63 - 1, -(2**63))
_UINT64 = (0, 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (
    0.0, -0.0, 1.0, 0.5, -1.0, 2.0, 100.0, 100.5, 1e-5, 9e-6, 0.01, 0.009, 1e-45, -1e-45, 3.4e38, -3.4e38, 1 + 1e-7,
    math.nan, math.inf, -math.inf,
)  # fmt: skip
_DOUBLES = (*_FLOATS, 5e-324, 1.7e308, -1.7e308, 1e300)
_NUMBERS: Mapping[int, tuple[float, ...]] = {
    FieldDescriptor.TYPE_INT32: _INT32,
    FieldDescriptor.TYPE_UINT32: _UINT32,
    FieldDescriptor.TYPE_INT64: _INT64,
    FieldDescriptor.TYPE_UINT64: _UINT64,
    FieldDescriptor.TYPE_FLOAT: _FLOATS,
    FieldDescriptor.TYPE_DOUBLE: _DOUBLES,
    FieldDescriptor.TYPE_BOOL: (False, True),
    FieldDescriptor.TYPE_ENUM: (0, 1, 2, 3, 99, -1, 2**31 - 1, -(2**31)),
}

_TEXTS = (
    "", "x", " ", "\0", "a b", "\x1b[2J\x07", "\r\n\r\n", "e\u0301" * 40, "\U0001f926\U0001f3fc\u200d\u2642\ufe0f", "\u202e\ufeff\uffff",
    "\U0010ffff", "\u0e33" * 500, "<|im_end|>", "<|im_start|>system\n", "<eos><bos>", "{{ messages }}{% raise %}", "%s%n%d{0}",
    "\ue0f7twinjet-continues-here\ue0f7", "../../../etc/passwd", "/", "x" * 128, "x" * 129, "x" * 1024, "x" * 1025,
    "\U0001f600" * 257, "x" * 100_000, "null", "true", "-1", "1e999", "twinjet-mirror", "twinjet-compare",
)  # fmt: skip

_SCHEMAS = (
    "", "{}", "true", "false", "null", "[]", "0", '"x"', "{", "\ud7ff", "\ufeff{}", '{"type": "object"', "NaN", '{"const": NaN}',
    '{"const": 1e999}', '{"const": -0.0}', '{"enum": []}', '{"const": "\\ud800"}', '{"properties": {"\\udfff": {}}}',
    '{"a": 1, "a": 2}', '{"$ref": "#"}', '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}',
    '{"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}',
    '{"$ref": "http://127.0.0.1:1/x"}', '{"$ref": "file:///etc/passwd"}', '{"$ref": "#/%00"}', '{"$ref": 5}', '{"$ref": "#/~2"}',
    '{"$id": "x", "$ref": "x"}', '{"$dynamicRef": "#a", "$dynamicAnchor": "a"}', '{"type": "x"}', '{"type": []}', '{"type": {}}',
    '{"type": ["string", "string"]}', '{"pattern": "("}', '{"pattern": "(a+)+$"}', '{"pattern": "\\\\p{L}"}', '{"pattern": 3}',
    '{"minLength": 1e18}', '{"minLength": -1}', '{"minLength": 1.5}', '{"maxItems": 0, "minItems": 1}', '{"minItems": 99999999}',
    '{"type": "integer", "multipleOf": 0}', '{"type": "integer", "multipleOf": 1e-300}', '{"type": "number", "minimum": 1e308}',
    '{"type": "integer", "minimum": -9223372036854775809}', '{"type": "string", "minLength": 2147483648}',
    '{"required": ["a", "a"]}', '{"required": "a"}', '{"properties": []}', '{"properties": {"": {"properties": {"": {}}}}}',
    '{"items": [{}, {}]}', '{"additionalProperties": {"$ref": "#"}}', '{"not": {}}', '{"not": {"not": {"not": {}}}}',
    '{"if": false, "then": 3}', '{"oneOf": [{}, {}]}', '{"anyOf": []}', '{"allOf": [false]}', '{"format": "regex"}', '{"format": []}',
    '{"uniqueItems": true}', '{"contains": {}, "minContains": 1e9}', '{"dependentSchemas": {"a": {"$ref": "#"}}}', '{"enum": [{}, [], null, 1e400]}',
    json.dumps({"enum": list(range(5000))}), json.dumps({"properties": {f"p{i}": {"$ref": "#"} for i in range(300)}}),
    '{"items":' * 63 + "{}" + "}" * 63, '{"items":' * 65 + "{}" + "}" * 65, "[" * 100_000, "[" * 63 + "]" * 63, '{"const": "' + "a" * 100_000 + '"}',
    '{"const": ' + "9" * 5000 + "}", '{"minLength": ' + "9" * 5000 + "}", '{"minimum": 1' + "0" * 400 + "}",
)  # fmt: skip
_PATTERNS = (
    "", "a", "^", "$", "^$", "a*", "(", ")", "[", "[]", "[^]", "[^\\s\\S]", "[z-a]", "\\", "a{2,1}", "a{99999}", "a{1,99999999999999999999}", "a{,5}",
    "(a*)*", "(a|a)*", "(a?){500}", "((a{1,100}){1,100}){1,100}", "(?=a)", "(?!a)b", "(?<=a)", "(?P<x>a)(?P=x)", "(a)\\1", "\\b", "\\p{L}", "(?i)a",
    "\\x0", "\\xff", "\\u{110000}", "\\ud800", "\\0", "\\c", "\\Q", "(?#", "a**", "*", "|", "||", "(|)", "[[:alpha:]]", "[\\d-z]", ".", "\\A\\Z", "[^\\x00-\\U0010ffff]",
    "\U0001f600+", "\0", "(" * 1000, "(" * 200 + "a" + ")" * 200, "|".join("abcdefgh" * 500), "a" * 20_000, "[a-z]{1,100}" * 200, ".*" * 200, "(.*x){50}",
)  # fmt: skip
_GRAMMARS = (
    "", "root", "root ::=", "root ::= ", 'root ::= "a"', "root ::= root", 'root ::= root "a" | "b"', 'root ::= ""', 'root ::= a\na ::= b\nb ::= a',
    "root ::= nothing", 'x ::= "a"', 'root ::= "a"\nroot ::= "b"', 'root ::= "\\x', 'root ::= "', "root ::= [", "root ::= []", "root ::= [^]", "root ::= [z-a]",
    "root ::= (", 'root ::= "a"{2,1}', 'root ::= "a"{99999999999}', 'root ::= "a"{1000,100000}', 'root ::= ("a"*)*', 'root ::= ("a"?){1000}', 'root ::= root root | "a"',
    'root ::= a a a a a a a a\na ::= b b b b b b b b\nb ::= c c c c c c c c\nc ::= "x"?', "root ::= \ufffd", "root ::= \0", 'root ::= "\\ud800"', 'root ::= "\\U00110000"',
    "root ::= [\\x00-\\U0010ffff]*", "root ::= TagDispatch()", 'root ::= TagDispatch(("a", b))', 'root ::= TagDispatch(("", root))', 'root ::= Token(1)', "root ::= Token(999999999)",
    'root ::= ExcludeToken()', 'root ::= (?= "a")', 'root ::= "a" (= root)', 'root ::= "a" (=', "root\n::=\n" * 1000, "#", "# only a comment", 'root ::= "a" # x', "root ::= " + '"a" | ' * 5000 + '"b"',
    "root ::= " + "(" * 3000, 'r ::= "x"\n' * 3000,
)  # fmt: skip
_TAGS = (
    "", "{}", "null", "[]", '{"type": "structural_tag"}', '{"type": "structural_tag", "format": {}}', '{"type": "structural_tag", "format": 5}',
    '{"type": "structural_tag", "format": {"type": "any_text"}}', '{"type": "structural_tag", "format": {"type": "const_string", "value": ""}}',
    '{"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"$ref": "#"}}}', '{"type": "structural_tag", "format": {"type": "sequence", "elements": []}}',
    '{"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": [""], "tags": []}}',
    '{"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<"], "tags": [{"begin": "x", "content": {"type": "any_text"}, "end": ""}]}}',
    '{"type": "structural_tag", "format": {"type": "tag", "begin": "", "content": {"type": "regex", "pattern": "("}, "end": ""}}',
    '{"type": "structural_tag", "format": {"type": "sequence", "elements": [' * 60, '{"structures": [], "triggers": []}', '{"type": "structural_tag", "format": {"type": "or", "elements": [5]}}',
)  # fmt: skip
SPECIAL: Mapping[str, tuple[str, ...]] = {
    "json_schema": _SCHEMAS,
    "regex": _PATTERNS,
    "ebnf": _GRAMMARS,
    "ebnf_grammar": _GRAMMARS,
    "structural_tag": _TAGS,
    "role": ("system", "user", "assistant", "tool", "wizard", "", "User", "user\0", "user " + "x" * 5000),
}
"""What text fields of these names are given besides _TEXTS, and oftener."""
_BYTES: tuple[bytes, ...] = (
    b"",
    b"\0",
    b"\xff" * 16,
    b"\x0a\x02\xff\xff",
    b"\x89PNG\r\n\x1a\n",
    b"x" * (256 << 10),
    b"x" * ((256 << 10) + 1),
)
_COUNTS = (1, 2, 3, 17, 64, 65, 257, 1025, 4097)
_MAX_DEPTH = 7


@st.composite
def hostile(draw: st.DrawFn, base: Message, max_changes: int = 6) -> Message:
    """Give a message like base in which some fields have become hostile."""
    message = type(base)()
    message.CopyFrom(base)
    if message.DESCRIPTOR.fields:
        for _ in range(draw(st.integers(0, max_changes))):
            _change(draw, message, 0)
    return message


@st.composite
def on_the_wire(draw: st.DrawFn, message: Message) -> bytes:
    """Give a message's bytes, seldom damaged."""
    data = message.SerializeToString()
    match draw(st.integers(0, 11)):
        case 0:
            return data[: draw(st.integers(0, min(len(data), 4096)))]
        case 1:
            return data + data
        case 2 if data:
            place = draw(st.integers(0, min(len(data) - 1, 4096)))
            return data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
        case 3:
            return data + draw(st.binary(max_size=12))
        case _:
            return data


def _change(draw: st.DrawFn, message: Any, depth: int) -> None:
    field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
    if _is_map(field.message_type):
        _change_map(draw, getattr(message, field.name), field.message_type)
    elif field.is_repeated:
        _change_list(draw, getattr(message, field.name), field, depth)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        part = getattr(message, field.name)
        part.SetInParent()
        _change_deeper(draw, part, depth)
    elif draw(st.integers(0, 7)) == 0:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, draw(_scalar(field)))


def _change_deeper(draw: st.DrawFn, part: Any, depth: int) -> None:
    if part.DESCRIPTOR.fields and depth < _MAX_DEPTH:
        for _ in range(draw(st.integers(0, 3))):
            _change(draw, part, depth + 1)


def _change_list(draw: st.DrawFn, items: Any, field: FieldDescriptor, depth: int) -> None:
    count = draw(st.sampled_from(_COUNTS)) if draw(st.booleans()) else 1
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        part = items.add()
        _change_deeper(draw, part, depth)
        if part.ByteSize() * count < 1 << 20:
            items.extend([part] * (count - 1))
        return
    value = draw(_scalar(field))
    if not isinstance(value, str | bytes) or len(value) * count < 1 << 20:
        items.extend([value] * count)


def _change_map(draw: st.DrawFn, items: Any, entry: Descriptor) -> None:
    key, value = entry.fields
    for _ in range(draw(st.integers(1, 3))):
        name = draw(_scalar(key))
        if value.type != FieldDescriptor.TYPE_MESSAGE:
            items[name] = draw(_scalar(value))
        else:
            _change_deeper(draw, items[name], 1)


def _is_map(descriptor: Descriptor | None) -> bool:
    return descriptor is not None and descriptor.GetOptions().map_entry


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_STRING:
        texts = st.sampled_from(_TEXTS) | st.text(max_size=12)
        special = SPECIAL.get(field.name)
        return texts if special is None else st.sampled_from(special) | st.sampled_from(special) | texts
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.sampled_from(_BYTES)
    return st.sampled_from(_NUMBERS[field.type])
