"""A JSON schema made into one that the grammar compiler keeps word for word; see `normalise`.

A schema is read as sets of subschemas that all hold for one value (a conjunction). Each set becomes a node: in-place
applicators (allOf, anyOf, oneOf, not, if, $ref, dependent*) are expanded into alternatives, and within an alternative
what different subschemas say about the same type, property or item is joined. Nodes are written out with a few keywords
that the compiler is known to keep. What cannot be written is refused by keyword; what is written may allow less than
the schema (for instance no additional properties), never more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
import referencing.jsonschema
from jsonschema.protocols import Validator
from jsonschema_specifications import REGISTRY as SPECIFICATIONS  # type: ignore[import-untyped]

from twinjet.grammar import negation
from twinjet.grammar.limits import MAX_ALTERNATIVES, MAX_CONSTANTS, MAX_DEPTH, MAX_NODES, MAX_REPEAT
from twinjet.grammar.pattern import PatternRefused, enforceable, length_pattern

Json = Any
ALL_TYPES = ("object", "array", "string", "number", "boolean", "null")
FORMATS = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uri-reference",
     "uri-template", "uuid"}
)  # fmt: skip
"""Formats that the compiler's own grammars keep. The other ones that JSON Schema defines are refused."""
_STANDARD_FORMATS = FORMATS | {
    "idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex", "relative-json-pointer",
}  # fmt: skip
_PYTHON_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "number": (), "boolean": (), "null": (),
}  # fmt: skip
_MAX_PERMUTED = 5
_DECIMALS = 10**6
"""The compiler writes numbers between bounds with six decimals."""
_INT64 = 2**63 - 1


class SchemaRefused(ValueError):
    """The schema is wrong or cannot be enforced; the text names the keyword and where it stands."""

    def __init__(self, keyword: str, why: str, place: str = "") -> None:
        self.keyword = keyword
        where = f" at {place}" if place else ""
        super().__init__(f"{keyword}{where}: {why}")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One subschema that must hold. place: its JSON pointer, for messages; follows references."""

    schema: Any
    resolver: Any
    place: str
    is_entered: bool = False

    def at(self, *keys: str | int) -> Part:
        """A subschema further in."""
        schema = self.schema
        for key in keys:
            schema = schema[key]
        return self.of(schema, *keys)

    def of(self, schema: Any, *keys: str | int) -> Part:
        """Any schema, read where this one stands."""
        return Part(schema, self.resolver, self.place + "".join(f"/{key}" for key in keys))

    def refuse(self, keyword: str, why: str) -> SchemaRefused:
        return SchemaRefused(keyword, why, self.place or "/")


Parts = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Members:
    """What one subschema says about an object's properties; names beyond its own get `rest`."""

    named: dict[str, Parts] = field(default_factory=dict)
    patterns: tuple[tuple[str, Parts], ...] = ()
    rest: Parts = ()

    def of(self, name: str) -> Parts:
        import re

        found = list(self.named.get(name, ()))
        is_known = name in self.named
        for pattern, parts in self.patterns:
            if re.search(pattern, name):
                is_known = True
                found += parts
        return tuple(found) if is_known else self.rest


@dataclass(frozen=True, slots=True)
class Items:
    """What one subschema says about an array's items."""

    prefix: tuple[Parts, ...] = ()
    rest: Parts = ()

    def of(self, index: int) -> Parts:
        return self.prefix[index] if index < len(self.prefix) else self.rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One alternative: a value of one of the types that meets everything here."""

    types: frozenset[str] = frozenset(ALL_TYPES)
    is_integer: bool = False
    has_values: bool = False
    values: tuple[Json, ...] = ()
    low: Fraction | None = None
    is_low_open: bool = False
    high: Fraction | None = None
    is_high_open: bool = False
    multiples: tuple[Fraction, ...] = ()
    excluded: tuple[Json, ...] = ()
    unwritten: tuple[str, ...] = ()
    min_length: int = 0
    max_length: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    items: tuple[Items, ...] = ()
    min_items: int = 0
    max_items: int | None = None
    is_unique: bool = False
    members: tuple[Members, ...] = ()
    names: Parts = ()
    required: tuple[str, ...] = ()
    min_properties: int = 0
    max_properties: int | None = None
    evaluated_names: frozenset[str] = frozenset()
    evaluated_patterns: frozenset[str] = frozenset()
    evaluates_all_names: bool = False
    num_evaluated_items: int = 0
    evaluates_all_items: bool = False
    place: Part | None = None


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _join(a: Shape, b: Shape) -> Shape | None:
    """What meets both; None if nothing does."""
    types = a.types & b.types
    if not types:
        return None
    low, is_low_open = a.low, a.is_low_open
    if b.low is not None and (low is None or b.low > low or (b.low == low and b.is_low_open)):
        low, is_low_open = b.low, b.is_low_open
    high, is_high_open = a.high, a.is_high_open
    if b.high is not None and (high is None or b.high < high or (b.high == high and b.is_high_open)):
        high, is_high_open = b.high, b.is_high_open
    return Shape(
        types=types,
        is_integer=a.is_integer or b.is_integer,
        has_values=a.has_values or b.has_values,
        values=a.values if a.has_values else b.values,
        low=low,
        is_low_open=is_low_open,
        high=high,
        is_high_open=is_high_open,
        multiples=tuple(dict.fromkeys(a.multiples + b.multiples)),
        excluded=a.excluded + b.excluded,
        unwritten=a.unwritten + b.unwritten,
        min_length=max(a.min_length, b.min_length),
        max_length=_least(a.max_length, b.max_length),
        patterns=tuple(dict.fromkeys(a.patterns + b.patterns)),
        formats=tuple(dict.fromkeys(a.formats + b.formats)),
        items=a.items + b.items,
        min_items=max(a.min_items, b.min_items),
        max_items=_least(a.max_items, b.max_items),
        is_unique=a.is_unique or b.is_unique,
        members=a.members + b.members,
        names=a.names + b.names,
        required=tuple(dict.fromkeys(a.required + b.required)),
        min_properties=max(a.min_properties, b.min_properties),
        max_properties=_least(a.max_properties, b.max_properties),
        evaluated_names=a.evaluated_names | b.evaluated_names,
        evaluated_patterns=a.evaluated_patterns | b.evaluated_patterns,
        evaluates_all_names=a.evaluates_all_names or b.evaluates_all_names,
        num_evaluated_items=max(a.num_evaluated_items, b.num_evaluated_items),
        evaluates_all_items=a.evaluates_all_items or b.evaluates_all_items,
        place=a.place or b.place,
    )


@dataclass(slots=True)
class Node:
    """A conjunction, expanded. alternatives: what it may be; each is a written schema with Nodes for children."""

    number: int
    alternatives: list[Alternative] = field(default_factory=list)
    is_open: bool = True
    num_uses: int = 0


@dataclass(slots=True)
class Alternative:
    """keywords: written as they are. The other fields hold children."""

    keywords: dict[str, Any]
    properties: dict[str, Node] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    additional: Node | None = None
    by_pattern: tuple[str, Node] | None = None
    prefix: list[Node] = field(default_factory=list)
    rest: Node | None = None
    min_items: int = 0
    max_items: int | None = None
    min_properties: int = 0

    def children(self) -> Iterator[Node]:
        yield from self.properties.values()
        yield from self.prefix
        if self.additional is not None:
            yield self.additional
        if self.by_pattern is not None:
            yield self.by_pattern[1]
        if self.rest is not None:
            yield self.rest


def parse(text: str) -> Json:
    """Read a schema's text. Raises SchemaRefused for what is no JSON, or nested deeper than MAX_DEPTH."""
    depth = _depth(text)
    if depth > MAX_DEPTH:
        raise SchemaRefused("schema", f"is nested {depth} deep; at most {MAX_DEPTH} are allowed")

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not allowed")

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits[:40]} is too large")
        return value

    try:
        schema = json.loads(text, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise SchemaRefused("schema", f"is not JSON: {error}") from None
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise SchemaRefused("schema", "has half of a surrogate pair, which is no character") from None
    return schema


def _depth(text: str) -> int:
    """How deep brackets are nested outside of strings; linear in the text."""
    deepest = depth = 0
    in_string = is_escaped = False
    for char in text:
        if in_string:
            if is_escaped:
                is_escaped = False
            elif char == "\\":
                is_escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def validator(schema: Json) -> Validator:
    """Make a validator for a schema, which is checked first. Raises SchemaRefused."""
    if not isinstance(schema, dict | bool):
        raise SchemaRefused("schema", "must be a JSON object")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    if kind in (jsonschema.Draft3Validator, jsonschema.Draft4Validator):
        raise SchemaRefused("$schema", "drafts 3 and 4 are not supported; use draft 6 or later")
    try:
        kind.check_schema(schema)  # type: ignore[arg-type]
    except jsonschema.SchemaError as error:
        place = "/".join(str(p) for p in error.absolute_path)
        raise SchemaRefused("schema", f"is not a JSON schema: {error.message[:200]} (at /{place})") from None
    made: Validator = kind(schema, registry=SPECIFICATIONS)
    return made


def normalise(text: str) -> dict[str, Any]:
    """Give an equal or narrower schema for the grammar compiler. text: a JSON schema.

    Raises SchemaRefused, naming the keyword, for a schema that is wrong, cannot be met by any value or cannot be
    enforced.
    """
    schema = parse(text)
    try:
        return _Normaliser(schema, validator(schema)).run()
    except RecursionError:
        raise SchemaRefused("$ref", "references lead too deep") from None


class _Normaliser:
    def __init__(self, schema: Json, root_validator: Validator) -> None:
        self._validator = root_validator
        self._is_old = not isinstance(
            root_validator, jsonschema.Draft202012Validator | jsonschema.Draft201909Validator
        )
        dialect = schema.get("$schema") if isinstance(schema, dict) else None
        newest = referencing.jsonschema.DRAFT202012
        specification = referencing.jsonschema.specification_with(dialect or "", default=newest)
        self._specification = specification
        resource = specification.create_resource(schema)
        base = resource.id() or ""
        registry = SPECIFICATIONS.with_resource(base, resource)
        self._registry = registry.crawl()
        self._root = Part(schema, self._registry.resolver(base), "")
        self._nodes: dict[frozenset[int], Node] = {}
        # Nodes are known by the identity of their schemas' objects, which must therefore stay.
        self._kept: list[Any] = []
        self._negations: dict[int, list[Any]] = {}
        self._made: dict[tuple[Any, ...], Any] = {}
        self._dynamic_anchors = _count_dynamic_anchors(schema)

    def run(self) -> dict[str, Any]:
        root = self._node((self._root,))
        _prune(list(self._nodes.values()))
        if not root.alternatives:
            raise SchemaRefused("schema", "no JSON value can satisfy it")
        return _Writer(root).schema()

    # Nodes

    def _node(self, parts: Sequence[Part]) -> Node:
        parts = tuple(p for p in parts if p.schema is not True and p.schema != {})
        key = frozenset(id(p.schema) for p in parts)
        if key in self._nodes:
            return self._nodes[key]
        if len(self._nodes) >= MAX_NODES:
            raise SchemaRefused("schema", f"has more than {MAX_NODES} different parts once written out")
        node = self._nodes[key] = Node(len(self._nodes))
        self._kept.append(parts)
        seen = set()
        constants: list[Json] = []
        unwritten = []
        for shape in self._expand(parts, ()):
            if shape.unwritten and not shape.has_values:
                unwritten.append(shape)
                continue
            for made in self._write(shape, parts):
                if isinstance(made, list):
                    constants += [v for v in made if not _contains(constants, v)]
                    continue
                mark = _mark(made)
                if mark not in seen:
                    seen.add(mark)
                    node.alternatives.append(made)
        if constants:
            if len(constants) > MAX_CONSTANTS:
                raise parts[0].refuse("enum", f"more than {MAX_CONSTANTS} values")
            node.alternatives.append(Alternative({"enum": constants}))
        if unwritten and not node.alternatives:
            keyword, _, why = unwritten[0].unwritten[0].partition(": ")
            raise (unwritten[0].place or self._root).refuse(keyword, f"{why} cannot be enforced")
        node.is_open = False
        return node

    def _expand(self, parts: Sequence[Part], active: tuple[int, ...]) -> list[Shape]:
        """All shapes of a conjunction."""
        shapes = [Shape()]
        for part in parts:
            shapes = self._product(shapes, self._expand_one(part, active), part)
        return shapes

    def _product(self, left: list[Shape], right: list[Shape], part: Part) -> list[Shape]:
        joined = [made for a in left for b in right if (made := _join(a, b)) is not None]
        if len(joined) > MAX_ALTERNATIVES:
            keyword = next((k for k in ("oneOf", "anyOf", "if", "not") if k in part.schema), "schema")
            raise part.refuse(keyword, f"combines to more than {MAX_ALTERNATIVES} alternatives")
        return joined

    def _expand_one(self, part: Part, active: tuple[int, ...]) -> list[Shape]:
        schema = part.schema
        if schema is True:
            return [Shape()]
        if schema is False:
            return []
        if id(schema) in active:
            raise part.refuse("$ref", "leads back to itself without anything between")
        active = (*active, id(schema))
        part = self._entered(part)
        if self._is_old and "$ref" in schema:
            return self._expand_one(self._target(part, "$ref"), active)
        shapes = [self._local(part)]
        for group in self._in_place(part, active):
            shapes = self._product(shapes, group, part)
        return [self._unevaluated(part, shape) for shape in shapes]

    def _entered(self, part: Part) -> Part:
        """The part with a resolver for its own $id, if it has one."""
        if (
            part.is_entered
            or not isinstance(part.schema, dict)
            or not isinstance(part.schema.get("$id"), str)
        ):
            return part
        resource = self._specification.create_resource(part.schema)
        return replace(part, resolver=part.resolver.in_subresource(resource), is_entered=True)

    def _target(self, part: Part, keyword: str) -> Part:
        reference = part.schema[keyword]
        try:
            found = part.resolver.lookup(reference)
        except referencing.exceptions.Unresolvable:
            raise part.refuse(keyword, f"{reference!r} is not within this schema") from None
        if not isinstance(found.contents, dict | bool):
            raise part.refuse(keyword, f"{reference!r} is no schema")
        place = reference if reference.startswith("#") else f"{part.place}/{keyword}"
        return Part(found.contents, found.resolver, place.removeprefix("#"), is_entered=True)

    def _in_place(self, part: Part, active: tuple[int, ...]) -> Iterator[list[Shape]]:
        """For each in-place applicator the shapes that it allows."""
        schema = part.schema
        if "$ref" in schema:
            yield self._expand_one(self._target(part, "$ref"), active)
        if "$dynamicRef" in schema:
            anchor = schema["$dynamicRef"].partition("#")[2]
            if self._dynamic_anchors.get(anchor, 0) > 1:
                raise part.refuse("$dynamicRef", "several anchors of that name cannot be told apart")
            yield self._expand_one(self._target(part, "$dynamicRef"), active)
        if "$recursiveRef" in schema:
            raise part.refuse("$recursiveRef", "cannot be enforced; use $ref")
        for i in range(len(schema.get("allOf", ()))):
            yield self._expand_one(part.at("allOf", i), active)
        if "anyOf" in schema:
            yield [
                shape
                for i in range(len(schema["anyOf"]))
                for shape in self._expand_one(part.at("anyOf", i), active)
            ]
        if "oneOf" in schema:
            yield self._one_of(part, active)
        if "not" in schema:
            yield self._negated(part.at("not"), part, "not", active)
        if "if" in schema:
            yield self._conditional(part, active)
        yield from self._dependencies(part, active)

    def _one_of(self, part: Part, active: tuple[int, ...]) -> list[Shape]:
        """Exactly one of them: each, without those others that it could also be."""
        branches = [part.at("oneOf", i) for i in range(len(part.schema["oneOf"]))]
        shapes = []
        for i, branch in enumerate(branches):
            own = self._expand_one(branch, active)
            for j, other in enumerate(branches):
                if i == j or not own or self._are_disjoint(own, other, (branch, other), active):
                    continue
                own = self._product(own, self._negated(other, part, "oneOf", active), part)
            shapes += own
        return shapes

    def _are_disjoint(
        self, own: list[Shape], other: Part, parts: Parts, active: tuple[int, ...], depth: int = 3
    ) -> bool:
        joined = self._product(own, self._expand_one(other, active), other)
        return all(self._is_surely_empty(shape, parts, depth) for shape in joined)

    def _is_surely_empty(self, shape: Shape, parts: Sequence[Part], depth: int) -> bool:
        if shape.has_values:
            return not self._valid_values(shape, parts)
        if shape.types == {"object"} and depth:
            for name in shape.required:
                children = tuple(p for members in shape.members for p in members.of(name))
                if all(
                    self._is_surely_empty(child, children, depth - 1) for child in self._expand(children, ())
                ):
                    return True
        if shape.types == {"number"}:
            return _is_empty_range(shape)
        return False

    def _negated(self, inner: Part, outer: Part, keyword: str, active: tuple[int, ...]) -> list[Shape]:
        """The shapes of what does not satisfy `inner`."""
        shapes = []
        for made in self._negation(inner):
            if isinstance(made, negation.Unwritten):
                why = f"{keyword}: the opposite of {made.keyword}"
                shapes.append(Shape(types=frozenset({made.kind}), unwritten=(why,), place=outer))
            else:
                shapes += self._expand([inner.of(made)], active)
        target = inner.schema.get("$ref") if isinstance(inner.schema, dict) else None
        if target is not None and (not self._is_old or len(inner.schema) == 1):
            if id(inner.schema) in active:
                raise outer.refuse("$ref", "leads back to itself without anything between")
            shapes += self._negated(self._target(inner, "$ref"), outer, keyword, (*active, id(inner.schema)))
        # What a negated schema says of properties and items does not count as evaluated.
        return [
            replace(
                shape,
                evaluated_names=frozenset(),
                evaluated_patterns=frozenset(),
                evaluates_all_names=False,
                num_evaluated_items=0,
                evaluates_all_items=False,
            )
            for shape in shapes
        ]

    def _negation(self, part: Part) -> list[Any]:
        key = id(part.schema)
        if key not in self._negations:
            self._kept.append(part.schema)
            self._negations[key] = negation.opposites(part.schema)
        return self._negations[key]

    def _conditional(self, part: Part, active: tuple[int, ...]) -> list[Shape]:
        schema = part.schema
        shapes = self._expand_one(part.at("if"), active)
        if "then" in schema:
            shapes = self._product(shapes, self._expand_one(part.at("then"), active), part)
        if schema.get("else", True) is False:
            return shapes
        others = self._negated(part.at("if"), part, "if", active)
        if "else" in schema:
            others = self._product(others, self._expand_one(part.at("else"), active), part)
        return shapes + others

    def _dependencies(self, part: Part, active: tuple[int, ...]) -> Iterator[list[Shape]]:
        schema = part.schema
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, needed in schema.get(keyword, {}).items():
                absent = self._synthetic({"properties": {name: False}}, part, keyword, name, "absent")
                if isinstance(needed, list):
                    present: Any = {"type": "object", "required": [name, *needed]}
                    with_it = self._expand_one(
                        self._synthetic(present, part, keyword, name, "present"), active
                    )
                else:
                    here: Any = {"type": "object", "required": [name]}
                    with_it = self._product(
                        self._expand_one(self._synthetic(here, part, keyword, name, "present"), active),
                        self._expand_one(part.at(keyword, name), active),
                        part,
                    )
                yield [*self._expand_one(absent, active), *with_it]

    def _synthetic(self, schema: Any, part: Part, *key: str) -> Part:
        """A schema of ours, the same object each time that it is asked for."""
        return part.of(self._made.setdefault((id(part.schema), *key), schema), *key[:2])

    # What one subschema says itself

    def _local(self, part: Part) -> Shape:
        schema, types = part.schema, frozenset(ALL_TYPES)
        is_integer = False
        if "type" in schema:
            named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            is_integer = "integer" in named and "number" not in named
            types = frozenset("number" if t == "integer" else t for t in named)
        shape = Shape(types=types, is_integer=is_integer, place=part)
        if "const" in schema:
            shape = replace(shape, has_values=True, values=(schema["const"],))
        elif "enum" in schema:
            if len(schema["enum"]) > MAX_CONSTANTS:
                raise part.refuse(
                    "enum", f"{len(schema['enum'])} values; at most {MAX_CONSTANTS} are allowed"
                )
            shape = replace(shape, has_values=True, values=tuple(schema["enum"]))
        low, is_low_open = _bound(schema, "minimum", "exclusiveMinimum", max)
        high, is_high_open = _bound(schema, "maximum", "exclusiveMaximum", min)
        multiples = (Fraction(str(schema["multipleOf"])),) if "multipleOf" in schema else ()
        excluded = tuple(schema.get(negation.EXCLUDED, ()))
        formats = (schema["format"],) if schema.get("format") in _STANDARD_FORMATS else ()
        return replace(
            shape,
            low=low,
            is_low_open=is_low_open,
            high=high,
            is_high_open=is_high_open,
            multiples=multiples,
            excluded=excluded,
            min_length=self._count(part, "minLength") or 0,
            max_length=self._count(part, "maxLength"),
            patterns=(schema["pattern"],) if "pattern" in schema else (),
            formats=formats,
            max_items=self._count(part, "maxItems"),
            is_unique=schema.get("uniqueItems") is True,
            min_properties=self._count(part, "minProperties") or 0,
            max_properties=self._count(part, "maxProperties"),
            required=tuple(schema.get("required", ())),
            names=(part.at("propertyNames"),) if "propertyNames" in schema else (),
            **self._members(part),
            **self._items(part),
        )

    def _count(self, part: Part, keyword: str) -> int | None:
        if keyword not in part.schema:
            return None
        value = part.schema[keyword]
        if value > MAX_REPEAT:
            if keyword.startswith("max"):
                return MAX_REPEAT
            raise part.refuse(keyword, f"{value:g} is too large; at most {MAX_REPEAT} is allowed")
        return int(value)

    def _members(self, part: Part) -> dict[str, Any]:
        schema = part.schema
        named: dict[str, Parts] = {
            name: (part.at("properties", name),) for name in schema.get("properties", {})
        }
        patterns = tuple((p, (part.at("patternProperties", p),)) for p in schema.get("patternProperties", {}))
        rest: Parts = ()
        is_stated = "additionalProperties" in schema
        if is_stated:
            rest = (part.at("additionalProperties"),)
        if not (named or patterns or is_stated):
            return {}
        return {
            "members": (Members(named, patterns, rest),),
            "evaluated_names": frozenset(named),
            "evaluated_patterns": frozenset(p for p, _ in patterns),
            "evaluates_all_names": is_stated,
        }

    def _items(self, part: Part) -> dict[str, Any]:
        schema = part.schema
        prefix_key, rest_key = "prefixItems", "items"
        if isinstance(schema.get("items"), list):
            prefix_key, rest_key = "items", "additionalItems"
        prefix = tuple((part.at(prefix_key, i),) for i in range(len(schema.get(prefix_key, ()))))
        has_rest = rest_key in schema
        rest: Parts = (part.at(rest_key),) if has_rest else ()
        groups = [Items(prefix, rest)] if prefix or has_rest else []
        if "contains" in schema:
            groups.append(self._contains(part, len(prefix)))
        least = self._count(part, "minItems") or 0
        if not groups:
            return {"min_items": least}
        made: dict[str, Any] = {
            "min_items": max(least, len(groups[-1].prefix)) if "contains" in schema else least,
            "items": tuple(groups),
            "num_evaluated_items": len(prefix),
            "evaluates_all_items": has_rest,
        }
        return made

    def _contains(self, part: Part, first: int) -> Items:
        """Let the items that must be contained stand right after the prefix, and with maxContains no other."""
        least = self._count(part, "minContains")
        least = 1 if least is None else least
        most = self._count(part, "maxContains")
        inner = part.at("contains")
        others: Parts = ()
        if most is not None:
            opposite = self._synthetic({"not": part.schema["contains"]}, part, "contains", "not")
            others = (opposite,)
        if most is not None and most < least:
            return Items((), (part.of(False, "maxContains"),))
        return Items((others,) * first + ((inner,),) * least, others)

    def _unevaluated(self, part: Part, shape: Shape) -> Shape:
        schema = part.schema
        if "unevaluatedProperties" in schema:
            if not shape.evaluates_all_names:
                members = Members(
                    dict.fromkeys(shape.evaluated_names, ()),
                    tuple((p, ()) for p in shape.evaluated_patterns),
                    (part.at("unevaluatedProperties"),),
                )
                shape = replace(shape, members=(*shape.members, members))
            shape = replace(shape, evaluates_all_names=True)
        if "unevaluatedItems" in schema:
            if not shape.evaluates_all_items:
                items = Items(((),) * shape.num_evaluated_items, (part.at("unevaluatedItems"),))
                shape = replace(shape, items=(*shape.items, items))
            shape = replace(shape, evaluates_all_items=True)
        return shape

    # Writing a shape's alternatives

    def _write(self, shape: Shape, parts: Sequence[Part]) -> Iterator[Alternative | list[Json]]:
        """Give an alternative for each type, or a list of constants."""
        if shape.has_values:
            yield self._valid_values(shape, parts)
            return
        place = shape.place or self._root
        if shape == Shape(place=shape.place):
            yield Alternative({})
            return
        for kind in ALL_TYPES:
            if kind not in shape.types:
                continue
            excluded = [v for v in shape.excluded if isinstance(v, _PYTHON_TYPES[kind])]
            if kind == "string" and excluded and not any(excluded):
                shape = replace(shape, min_length=max(1, shape.min_length))
            elif excluded:
                raise place.refuse("not", f"excluding a {kind} cannot be enforced")
            if kind == "null":
                yield self._valid_constants([None], parts)
            elif kind == "boolean":
                yield self._valid_constants([True, False], parts)
            elif kind == "number":
                yield from self._write_number(shape, place, parts)
            elif kind == "string":
                yield from self._write_string(shape, place)
            elif kind == "array":
                yield from self._write_array(shape, place, parts)
            else:
                yield from self._write_object(shape, place)

    def _valid_values(self, shape: Shape, parts: Sequence[Part]) -> list[Json]:
        return self._valid_constants(list(shape.values), parts)

    def _valid_constants(self, values: list[Json], parts: Sequence[Part]) -> list[Json]:
        """Those that satisfy every part, as the validator says."""
        if any(isinstance(v, int) and not isinstance(v, bool) and abs(v) > _INT64 for v in values):
            raise (parts[0] if parts else self._root).refuse(
                "enum", "integers beyond 64 bits cannot be enforced"
            )
        for part in parts:
            part = self._entered(part)
            check = self._validator.evolve(schema=part.schema, _resolver=part.resolver)
            values = [v for v in values if check.is_valid(v)]
        return values

    def _write_number(
        self, shape: Shape, place: Part, parts: Sequence[Part]
    ) -> Iterator[Alternative | list[Json]]:
        is_integer = shape.is_integer or any(m.denominator == 1 for m in shape.multiples)
        if _is_empty_range(replace(shape, is_integer=is_integer)):
            return
        steps = [m for m in shape.multiples if not (is_integer and (1 / m).denominator == 1)]
        if steps:
            yield self._valid_constants(self._multiples(shape, steps, place, is_integer), parts)
            return
        keywords: dict[str, Any] = {"type": "integer" if is_integer else "number"}
        low, high = shape.low, shape.high
        if is_integer:
            if low is not None:
                keywords["minimum"] = _first_integer(low, shape.is_low_open)
            if high is not None:
                keywords["maximum"] = -_first_integer(-high, shape.is_high_open)
            for name in ("minimum", "maximum"):
                if abs(keywords.get(name, 0)) > _INT64:
                    raise place.refuse(name, "is beyond 64 bits")
        else:
            for bound, is_open, names in (
                (low, shape.is_low_open, ("minimum", "exclusiveMinimum")),
                (high, shape.is_high_open, ("maximum", "exclusiveMaximum")),
            ):
                if bound is None:
                    continue
                if abs(bound) > 10**15:
                    raise place.refuse(names[0], "of a number must lie within -1e15 and 1e15")
                inward = math.ceil if names[0] == "minimum" else math.floor
                exact = Fraction(inward(bound * _DECIMALS), _DECIMALS)
                is_open = is_open and exact == bound
                keywords[names[is_open]] = int(exact) if exact.denominator == 1 else float(exact)
            ends = [
                keywords[n]
                for n in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
                if n in keywords
            ]
            if len(ends) == 2 and (
                ends[0] > ends[1]
                or (ends[0] == ends[1] and len(keywords.keys() & {"minimum", "maximum"}) < 2)
            ):
                raise place.refuse("minimum", "and maximum lie closer together than six decimals")
        yield Alternative(keywords)

    def _multiples(
        self, shape: Shape, steps: list[Fraction], place: Part, is_integer: bool
    ) -> list[int | float]:
        step = Fraction(
            math.lcm(*(s.numerator for s in steps)) if len(steps) > 1 else steps[0].numerator,
            math.gcd(*(s.denominator for s in steps)),
        )
        if is_integer:
            step = Fraction(math.lcm(step.numerator, step.denominator), step.denominator)
        if shape.low is None or shape.high is None:
            raise place.refuse("multipleOf", "needs both minimum and maximum to be enforced")
        first, last = math.ceil(shape.low / step), math.floor(shape.high / step)
        if last - first >= MAX_CONSTANTS:
            raise place.refuse("multipleOf", f"allows more than {MAX_CONSTANTS} numbers")
        values = [k * step for k in range(first, last + 1)]
        return [int(v) if v.denominator == 1 else float(v) for v in values]

    def _write_string(self, shape: Shape, place: Part) -> Iterator[Alternative]:
        low, high = shape.min_length, shape.max_length
        if high is not None and low > high:
            return
        if len(shape.patterns) > 1:
            raise place.refuse("pattern", "several patterns for one string cannot be enforced together")
        if shape.formats:
            yield self._write_format(shape, place)
            return
        if not shape.patterns:
            if low or high is not None:
                yield Alternative({"type": "string", "pattern": f"^{length_pattern(low, high)}$"})
            else:
                yield Alternative({"type": "string"})
            return
        try:
            text = enforceable(shape.patterns[0], low, high)
        except PatternRefused as error:
            raise place.refuse("pattern", f"{shape.patterns[0][:80]!r} {error}") from None
        yield Alternative({"type": "string", "pattern": f"^({text})$"})

    @staticmethod
    def _write_format(shape: Shape, place: Part) -> Alternative:
        refused = next((f for f in shape.formats if f not in FORMATS), None)
        if refused is not None or len(shape.formats) > 1:
            raise place.refuse("format", f"{refused or shape.formats[1]!r} cannot be enforced")
        least = 0 if shape.formats[0] in ("uri-reference", "uri-template") else 1
        if shape.patterns or shape.min_length > least or shape.max_length is not None:
            raise place.refuse("format", "cannot be combined with pattern, minLength or maxLength")
        return Alternative({"type": "string", "format": shape.formats[0]})

    def _write_array(
        self, shape: Shape, place: Part, parts: Sequence[Part]
    ) -> Iterator[Alternative | list[Json]]:
        length = max((len(group.prefix) for group in shape.items), default=0)
        least, most = shape.min_items, shape.max_items
        prefix = [self._node([p for group in shape.items for p in group.of(i)]) for i in range(length)]
        rest = self._node([p for group in shape.items for p in group.rest])
        if most is not None and least > most:
            return
        if shape.is_unique and (most is None or most > 1):
            yield self._unique(prefix, rest, place, parts)
            return
        yield Alternative({"type": "array"}, prefix=prefix, rest=rest, min_items=least, max_items=most)

    def _unique(self, prefix: list[Node], rest: Node, place: Part, parts: Sequence[Part]) -> list[Json]:
        """All arrays of different items, where there are few items to choose from."""
        values = rest.alternatives[0].keywords.get("enum") if len(rest.alternatives) == 1 else None
        if prefix or rest.is_open or not values or len(values) > _MAX_PERMUTED:
            raise place.refuse(
                "uniqueItems", f"can be enforced only for items of an enum of at most {_MAX_PERMUTED} values"
            )
        arrays: list[list[Json]] = [[]]
        found: list[list[Json]] = [[]]
        for _ in values:
            arrays = [[*a, v] for a in arrays for v in values if not _contains(a, v)]
            found += arrays
        return self._valid_constants(found, parts)

    def _write_object(self, shape: Shape, place: Part) -> Iterator[Alternative]:
        names = list(dict.fromkeys([n for m in shape.members for n in m.named] + list(shape.required)))
        properties: dict[str, Node] = {}
        forbids = False
        for name in names:
            node = self._node([p for m in shape.members for p in m.of(name)])
            if shape.names and not self._valid_constants([name], shape.names):
                if name in shape.required:
                    return
                forbids = True
                continue
            properties[name] = node
        made = Alternative(
            {"type": "object"}, properties, shape.required, min_properties=shape.min_properties
        )
        if not properties and not forbids:
            yield from self._write_map(shape, place, made)
            return
        most = shape.max_properties
        if most is not None and most < len(shape.required):
            return
        # Undeclared names are left out: they are optional, and could repeat a declared one.
        if made.min_properties > len(shape.required):
            made.keywords["minProperties"] = made.min_properties
        if most is not None and most < len(properties):
            made.keywords["maxProperties"] = most
        yield made

    def _write_map(self, shape: Shape, place: Part, made: Alternative) -> Iterator[Alternative]:
        """An object whose names are free."""
        rest = self._node([p for m in shape.members for p in m.rest])
        patterns = dict.fromkeys(p for m in shape.members for p, _ in m.patterns)
        if shape.max_properties == 0:
            yield made
            return
        if len(patterns) > 1 or (patterns and shape.names):
            raise place.refuse("patternProperties", "several patterns cannot be enforced together")
        if shape.min_properties > 1:
            raise place.refuse("minProperties", "above 1 needs properties, since free names may repeat")
        if shape.min_properties:
            made.keywords["minProperties"] = shape.min_properties
        if shape.max_properties is not None:
            made.keywords["maxProperties"] = shape.max_properties
        if patterns:
            pattern = next(iter(patterns))
            parts = [p for m in shape.members for q, ps in m.patterns if q == pattern for p in ps]
            # Members that do not name the pattern see such a name as one of the rest.
            parts += [p for m in shape.members if not m.patterns for p in m.rest]
            made.by_pattern = (self._name_pattern(pattern, 0, None, place), self._node(parts))
        elif shape.names:
            yield from self._named_by_schema(shape, place, made, rest)
            return
        else:
            made.additional = rest
        yield made

    def _named_by_schema(
        self, shape: Shape, place: Part, made: Alternative, rest: Node
    ) -> Iterator[Alternative]:
        names = self._node(shape.names)
        strings = [a for a in names.alternatives if not a.keywords or _is_about_strings(a)]
        if any(a.keywords in ({}, {"type": "string"}) for a in strings):
            made.additional = rest
            yield made
            return
        constants = [a for a in strings if "enum" in a.keywords]
        if constants:
            choices = [v for a in constants for v in a.keywords["enum"] if isinstance(v, str)]
            made.properties = dict.fromkeys(choices, rest)
            if shape.min_properties:
                made.keywords["minProperties"] = shape.min_properties
            yield made
            return
        if len(strings) > 1 or any("format" in a.keywords for a in strings):
            raise place.refuse("propertyNames", "can be enforced only as a pattern, a length or an enum")
        if strings:
            made.by_pattern = (strings[0].keywords["pattern"], rest)
        yield made

    def _name_pattern(self, pattern: str, low: int, high: int | None, place: Part) -> str:
        try:
            return f"^({enforceable(pattern, low, high)})$"
        except PatternRefused as error:
            raise place.refuse("patternProperties", f"{pattern[:80]!r} {error}") from None


def _is_about_strings(alternative: Alternative) -> bool:
    values = alternative.keywords.get("enum")
    if values is not None:
        return any(isinstance(v, str) for v in values)
    return alternative.keywords.get("type") == "string"


def _bound(schema: Any, closed: str, opened: str, tighter: Any) -> tuple[Fraction | None, bool]:
    bounds = []
    if closed in schema:
        bounds.append((Fraction(str(schema[closed])), False))
    if opened in schema:
        bounds.append((Fraction(str(schema[opened])), True))
    if not bounds:
        return None, False
    value = tighter(b for b, _ in bounds)
    return value, any(is_open for b, is_open in bounds if b == value)


def _first_integer(bound: Fraction, is_open: bool) -> int:
    value = math.ceil(bound)
    return value + 1 if is_open and value == bound else value


def _is_empty_range(shape: Shape) -> bool:
    if shape.low is None or shape.high is None:
        return False
    if shape.is_integer:
        return _first_integer(shape.low, shape.is_low_open) > -_first_integer(-shape.high, shape.is_high_open)
    return shape.low > shape.high or (shape.low == shape.high and (shape.is_low_open or shape.is_high_open))


def _same(a: Json, b: Json) -> bool:
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    return bool(a == b)


def _contains(values: list[Json], value: Json) -> bool:
    return any(_same(v, value) for v in values)


def _count_dynamic_anchors(schema: Json) -> dict[str, int]:
    found: dict[str, int] = {}
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            anchor = value.get("$dynamicAnchor")
            if isinstance(anchor, str):
                found[anchor] = found.get(anchor, 0) + 1
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def _mark(alternative: Alternative) -> str:
    """A text that is the same for alternatives that are written alike."""
    return json.dumps(
        [
            alternative.keywords,
            {name: node.number for name, node in alternative.properties.items()},
            sorted(alternative.required),
            [node.number for node in alternative.prefix],
            [None if n is None else n.number for n in (alternative.additional, alternative.rest)],
            None
            if alternative.by_pattern is None
            else [alternative.by_pattern[0], alternative.by_pattern[1].number],
            [alternative.min_items, alternative.max_items, alternative.min_properties],
        ]
    )


def _prune(nodes: list[Node]) -> None:
    """Take out what no finite value satisfies: what needs itself, or needs something impossible."""
    possible: set[int] = set()
    while True:
        before = len(possible)
        for node in nodes:
            if node.number not in possible and any(_is_possible(a, possible) for a in node.alternatives):
                possible.add(node.number)
        if len(possible) == before:
            break
    for node in nodes:
        node.alternatives = [kept for a in node.alternatives if (kept := _without(a, possible)) is not None]


def _is_possible(alternative: Alternative, possible: set[int]) -> bool:
    return _without(alternative, possible) is not None


def _without(alternative: Alternative, possible: set[int]) -> Alternative | None:
    """The alternative without children that are impossible; None if it needs one of them."""
    made = replace(alternative, keywords=dict(alternative.keywords))
    made.properties = {n: node for n, node in made.properties.items() if node.number in possible}
    if any(name not in made.properties for name in made.required):
        return None
    if made.additional is not None and made.additional.number not in possible:
        made.additional = None
    if made.by_pattern is not None and made.by_pattern[1].number not in possible:
        made.by_pattern = None
    is_map = made.additional is not None or made.by_pattern is not None
    if made.keywords.get("type") == "object" and not is_map and made.min_properties > len(made.properties):
        return None
    if made.keywords.get("type") != "array":
        return made
    longest = next((i for i, n in enumerate(made.prefix) if n.number not in possible), None)
    if longest is None and made.rest is not None and made.rest.number not in possible:
        longest = len(made.prefix)
    if longest is not None:
        made.max_items = _least(made.max_items, longest)
    if made.max_items is not None:
        if made.min_items > made.max_items:
            return None
        made.prefix = made.prefix[: made.max_items]
        if len(made.prefix) == made.max_items:
            made.rest = None
    return made


class _Writer:
    """Writes nodes as a schema: those used once in place, the others as definitions."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self._definitions: dict[str, Any] = {}
        self._started: set[int] = set()
        self._count_uses()

    def schema(self) -> dict[str, Any]:
        body = self._ref(self._root, 0)
        if self._definitions:
            return {**body, "$defs": self._definitions}
        return body

    def _count_uses(self) -> None:
        waiting, seen = [self._root], {self._root.number}
        self._root.num_uses = 1
        while waiting:
            for alternative in waiting.pop().alternatives:
                for child in alternative.children():
                    child.num_uses += 1
                    if child.number not in seen:
                        seen.add(child.number)
                        waiting.append(child)

    def _ref(self, node: Node, depth: int) -> dict[str, Any]:
        if node.num_uses == 1 and depth < MAX_DEPTH // 2:
            return self._body(node, depth + 1)
        name = f"n{node.number}"
        if node.number not in self._started:
            self._started.add(node.number)
            self._definitions[name] = {}
            self._definitions[name] = self._body(node, 0)
        return {"$ref": f"#/$defs/{name}"}

    def _body(self, node: Node, depth: int) -> dict[str, Any]:
        written = [self._alternative(a, depth) for a in node.alternatives]
        if {} in written:
            return {}
        return written[0] if len(written) == 1 else {"anyOf": written}

    def _alternative(self, a: Alternative, depth: int) -> dict[str, Any]:
        made = dict(a.keywords)
        if made.get("type") == "object":
            if a.properties:
                made["properties"] = {name: self._ref(node, depth) for name, node in a.properties.items()}
            if a.required:
                made["required"] = list(a.required)
            if a.by_pattern is not None:
                made["patternProperties"] = {a.by_pattern[0]: self._ref(a.by_pattern[1], depth)}
            made["additionalProperties"] = False if a.additional is None else self._ref(a.additional, depth)
        elif made.get("type") == "array":
            if a.prefix:
                made["prefixItems"] = [self._ref(node, depth) for node in a.prefix]
            made["items"] = False if a.rest is None else self._ref(a.rest, depth)
            if a.min_items:
                made["minItems"] = a.min_items
            if a.max_items is not None and a.max_items > len(a.prefix):
                made["maxItems"] = a.max_items
        return made
