"""Walks the settings' models by path, for messages and for environment variables; knows no setting itself."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def kinds_at(model: type[BaseModel], path: Iterable[str]) -> tuple[Any, ...]:
    """Give the types that a setting may have, without Annotated and None; () if there is no such setting.

    What lies below a mapping of anything, such as an engine's options, is (Any,).
    """
    kinds: tuple[Any, ...] = (model,)
    for part in path:
        kinds = tuple(inner for kind in kinds for inner in _inside(kind, part))
    return kinds


def keys_at(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Give the keys that a table of the settings has; [] where the user chooses them."""
    return [
        name
        for kind in kinds_at(model, path)
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for name in kind.model_fields
    ]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Give the end of a message about an unknown name: the nearest known one, else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}" if known else ""


def _inside(kind: Any, part: str) -> tuple[Any, ...]:
    if kind is Any:
        return (Any,)
    if get_origin(kind) is dict:
        return _plain(get_args(kind)[1])
    if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
        return _plain(kind.model_fields[part].annotation)
    return ()


def _plain(kind: Any) -> tuple[Any, ...]:
    origin = get_origin(kind)
    if origin is Annotated:
        return _plain(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return tuple(plain for arm in get_args(kind) if arm is not type(None) for plain in _plain(arm))
    return (kind,)
