"""Settings from the environment, and which other TWINJET_* variables there are.

A setting's variable is its path in upper case, joined by two underscores, after TWINJET_. What is text in the
settings is taken as it stands; everything else is a TOML value. Whatever begins with TWINJET_ and is neither a
setting nor listed here is refused, since it is most likely misspelt.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel

from twinjet.errors import ConfigError
from twinjet.settings_tree import did_you_mean, keys_at, kinds_at

PREFIX = "TWINJET_"

OTHER_VARIABLES = frozenset(
    {
        "TWINJET_ADDRESS",  # clients of the command line
        "TWINJET_TOKEN",
        "TWINJET_CACHE_DIR",  # models.demo
        "TWINJET_CPU_TARGET",  # sampler and block hash
        "TWINJET_KV_EVENTS",  # engines.vllm, of an engine's own process
        "TWINJET_VLLM_NATIVE",  # engines.vllm
        "TWINJET_CUDA",  # the build
    }
)
"""Read elsewhere, or at build time."""

_OTHER_PREFIXES = ("TWINJET_TEST_", "TWINJET_GPU_")

_SERVICE_LINK = re.compile(
    r"TWINJET_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(r"TWINJET_(\w+_)?PORT")


def apply(
    tree: dict[str, Any], environ: Mapping[str, str], model: type[BaseModel]
) -> dict[tuple[str, ...], str]:
    """Put the variables' settings into the tree; gives the variable by path of each.

    Raises ConfigError for a variable that is unknown, is not UTF-8, or contradicts another one or the tree.
    """
    origins: dict[tuple[str, ...], str] = {}
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX) or _belongs_elsewhere(name, text):
            continue
        written = name[len(PREFIX) :].lower().split("__")
        path = tuple(_spelt_as_in(tree, written))
        kinds = kinds_at(model, path)
        if not all(path) or not kinds:
            raise ConfigError(f"unknown variable {name}" + _nearest(name, written, model))
        if path in origins:
            raise ConfigError(f"{origins[path]} and {name} set the same, {'.'.join(path)}; unset one of them")
        _set(tree, path, _value(name, text, kinds), name, origins)
        origins[path] = name
    return origins


def names_section(environ: Mapping[str, str], section: str) -> bool:
    """Whether a variable sets something of a section."""
    paths = [n.removeprefix(PREFIX).lower() for n in environ if n.startswith(PREFIX)]
    return any(path == section or path.startswith(f"{section}__") for path in paths)


def _belongs_elsewhere(name: str, text: str) -> bool:
    if name in OTHER_VARIABLES or name.startswith(_OTHER_PREFIXES):
        return True
    # Kubernetes gives every container such variables for each service of its namespace, and one of these
    # services is likely named twinjet.
    if _SERVICE_LINK.fullmatch(name):
        return True
    return _SERVICE_PORT.fullmatch(name) is not None and "://" in text


def _spelt_as_in(tree: Mapping[str, Any], written: Iterable[str]) -> Iterable[str]:
    """Give each key as the file spells it: a variable can say neither capitals nor hyphens."""
    at: Any = tree
    for part in written:
        keys = at if isinstance(at, Mapping) else {}
        same = [key for key in keys if re.sub(r"\W", "_", str(key)).lower() == part]
        key = part if part in keys or len(same) != 1 else same[0]
        yield key
        at = keys.get(key)


def _nearest(name: str, written: list[str], model: type[BaseModel]) -> str:
    if len(written) == 1:
        sections = list(model.model_fields)
        section = next((s for s in sections if written[0].startswith(f"{s}_")), None)
        if section is not None:
            rest = written[0].removeprefix(f"{section}_").upper()
            return f"; did you mean {PREFIX}{section.upper()}__{rest}?"
        wanted = [f"{PREFIX}{s.upper()}__..." for s in sections]
        return did_you_mean(name, [*wanted, *OTHER_VARIABLES])
    for length in range(len(written)):
        if written[length] not in (keys := keys_at(model, written[:length])) and keys:
            return did_you_mean(written[length], keys)
    return ""


def _set(
    tree: dict[str, Any],
    path: tuple[str, ...],
    value: Any,
    name: str,
    origins: Mapping[tuple[str, ...], str],
) -> None:
    at = tree
    for depth, key in enumerate(path[:-1], start=1):
        inner = at.setdefault(key, {})
        if not isinstance(inner, dict):
            source = origins.get(path[:depth], "the configuration file")
            raise ConfigError(
                f"{name} sets {'.'.join(path)}, but {source} makes {'.'.join(path[:depth])} a value, not a table"
            )
        at = inner
    at[path[-1]] = value


def _value(name: str, text: str, kinds: tuple[Any, ...]) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is not UTF-8") from None
    if all(kind in (str, Path) or get_origin(kind) is Literal for kind in kinds):
        return text
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A line break could otherwise smuggle in further keys.
    return document["value"] if list(document) == ["value"] else text
