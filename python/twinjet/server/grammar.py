"""Checks a constraint as far as no engine is needed; the engine's compiler has the last word."""

from __future__ import annotations

import json

import jsonschema

from twinjet.errors import InvalidRequest
from twinjet.request import Constraint


def check_constraint(constraint: Constraint | None) -> None:
    """Raise InvalidRequest if a JSON schema is no JSON or no schema."""
    if constraint is None or constraint.kind != "json_schema":
        return
    field = "sampling.constraint.json_schema"
    try:
        schema = json.loads(constraint.value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest.of(field, f"is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidRequest.of(field, "is not a JSON object")
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InvalidRequest.of(field, f"is not a JSON schema: {error.message}") from None
