"""Builds the stand-in's surface from the recorded contract and checks every call against it.

The version comes from the environment variable TENSORRT_LLM_DOUBLE, "1.2" or "1.3", when the package is
imported. TENSORRT_LLM_DOUBLE_PLANT names differences to plant, for tests of `twinjet doctor`: "-Class.field"
takes a field or parameter away, "+Class.field" adds one, "~Class.field" changes its default, "behaviour=on" and
"behaviour=off" turn a recorded behaviour on or off. TENSORRT_LLM_DOUBLE_DAEMON has engines run beside a process as
Open MPI's daemon is.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

VERSION = os.environ.get("TENSORRT_LLM_DOUBLE", "1.2")
CONTRACT: dict[str, Any] = json.loads(
    resources.files("twinjet.engines.tensorrt_llm").joinpath("contract.json").read_text()
)
if VERSION not in CONTRACT["versions"]:
    raise ImportError(f"TENSORRT_LLM_DOUBLE is {VERSION!r}; known: {CONTRACT['versions']}")

_PLANTED = os.environ.get("TENSORRT_LLM_DOUBLE_PLANT", "").split()

BEHAVIOURS: dict[str, bool] = {
    name: f"{name}=on" in _PLANTED or (entry[VERSION] and f"{name}=off" not in _PLANTED)
    for name, entry in CONTRACT["behaviours"].items()
}


def has(behaviour: str) -> bool:
    """Say whether the stand-in has a recorded behaviour; tests may change BEHAVIOURS at any time."""
    return BEHAVIOURS[behaviour]


def _plant(owner: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = [dict(entry) for entry in entries if f"-{owner}.{entry['name']}" not in _PLANTED]
    for entry in out:
        if f"~{owner}.{entry['name']}" in _PLANTED:
            entry.pop("required", None)
            entry["type"], entry["default"] = "Any", "planted"
    out += [
        {"name": mark.rpartition(".")[2], "type": "Any", "default": None}
        for mark in _PLANTED
        if mark.startswith(f"+{owner}.")
    ]
    return out


def in_version(entry: dict[str, Any]) -> bool:
    """Say whether a recorded field belongs to the chosen version."""
    return bool(entry.get("since", "0") <= VERSION <= entry.get("until", "9"))


def class_fields(name: str) -> list[dict[str, Any]]:
    """List the recorded fields of a class in the chosen version."""
    return _plant(name, [entry for entry in CONTRACT["classes"][name]["fields"] if in_version(entry)])


def fits(value: Any, type_text: str) -> bool:
    """Say whether a value is of a recorded type; types of the package itself go by their class's name."""
    if value is None:
        return "None" in type_text.split("|") or type_text == "Any"
    names = [cls.__name__ for cls in type(value).__mro__]
    for part in type_text.split("|"):
        base = part.partition("[")[0]
        if base == "Any" or base in names:
            if base != "int" or not isinstance(value, bool):
                return True
        elif (
            (base == "float" and isinstance(value, int) and not isinstance(value, bool))
            or (base == "LogitsProcessor" and callable(value))
            or (base == "Mapping" and isinstance(value, Mapping))
        ):
            return True
        elif base in ("TextPrompt", "TokensPrompt", "PromptInputs") and isinstance(value, dict):
            return set(value) <= {"prompt", "prompt_token_ids", "multi_modal_data", "query_token_ids"}
        elif (base == "PromptInputs" and isinstance(value, (str, list))) or (
            base == "Path" and isinstance(value, Path)
        ):
            return True
    return False


def _default(entry: dict[str, Any], members: dict[str, Any]) -> Any:
    value = entry.get("default")
    return members[value] if isinstance(value, str) and value in members else value


def make_dataclass(name: str, **namespace: Any) -> Any:
    """Make a keyword-only dataclass with the recorded fields; wrong types raise TypeError.

    namespace: its further attributes; after_init: run last; members: enumerations' members that are defaults.
    """
    entries = class_fields(name)
    types = {entry["name"]: entry["type"] for entry in entries}
    after = namespace.pop("after_init", None)
    members = namespace.pop("members", {})

    def check(self: Any) -> None:
        for field_name, type_text in types.items():
            value = getattr(self, field_name)
            if not fits(value, type_text):
                raise TypeError(f"{name}.{field_name} is {value!r}; recorded type: {type_text}")
        if after is not None:
            after(self)

    specs: list[Any] = []
    for entry in entries:
        if entry.get("required"):
            specs.append((entry["name"], Any))
        elif isinstance(entry.get("default"), list):
            specs.append((entry["name"], Any, dataclasses.field(default_factory=list)))
        else:
            specs.append((entry["name"], Any, dataclasses.field(default=_default(entry, members))))
    module = CONTRACT["classes"][name]["module"]
    return dataclasses.make_dataclass(
        name, specs, kw_only=True, namespace={"__post_init__": check, "__module__": module, **namespace}
    )


def make_model(
    name: str, factories: dict[str, Any], members: dict[str, Any] | None = None
) -> type[BaseModel]:
    """Make a pydantic model that refuses unknown fields and wrong types with ValueError.

    factories: classes of nested models, by name. members: enumerations' members that are defaults.
    """
    entries = class_fields(name)
    types = {entry["name"]: entry["type"] for entry in entries}

    def check(self: Any) -> Any:
        for field_name, type_text in types.items():
            value = getattr(self, field_name)
            nested = type_text.partition("|")[0]
            if isinstance(value, dict) and nested in factories:
                value = factories[nested](**value)
                object.__setattr__(self, field_name, value)
            if not fits(value, type_text):
                raise ValueError(f"{name}.{field_name} is {value!r}; recorded type: {type_text}")
        return self

    fields: dict[str, Any] = {}
    for entry in entries:
        if entry.get("required"):
            fields[entry["name"]] = (Any, ...)
        elif "factory" in entry:
            fields[entry["name"]] = (Any, Field(default_factory=factories[entry["factory"]]))
        else:
            fields[entry["name"]] = (Any, _default(entry, members or {}))
    return create_model(
        name,
        __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()),
        __module__=CONTRACT["classes"][name]["module"],
        __validators__={"check_types": model_validator(mode="after")(check)},
        **fields,
    )


def signature(function: str) -> tuple[inspect.Signature, dict[str, str]]:
    """Give a method's recorded signature, self included, and its parameters' types."""
    is_init = function == "LLM.__init__"
    entries = CONTRACT["llm"]["init"] if is_init else CONTRACT["functions"][function].get(VERSION, [])
    entries = _plant(function, entries)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    for entry in entries:
        default = inspect.Parameter.empty if entry.get("required") else entry.get("default")
        parameters.append(inspect.Parameter(entry["name"], kind, default=default))
    if is_init:
        parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters), {entry["name"]: entry["type"] for entry in entries}


def recorded(function: str) -> Any:
    """Decorate a method that takes (self, arguments): callers see and must keep the recorded signature."""
    shape, types = signature(function)

    def wrap(body: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            bound = shape.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            self = arguments.pop("self")
            extra = arguments.pop("kwargs", {})
            for name, value in arguments.items():
                if not fits(value, types[name]):
                    raise TypeError(f"{function}: {name} is {value!r}; recorded type: {types[name]}")
            return body(self, {**arguments, **extra})

        method.__signature__ = shape  # type: ignore[attr-defined]
        method.__name__ = function.rpartition(".")[2]
        method.__doc__ = body.__doc__
        return method

    return wrap
