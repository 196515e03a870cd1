"""The server's settings: one TOML file, flags for the common case, and TWINJET_* for every setting.

    [server]                       # where to listen, limits, TLS, shutdown
    [admin]                        # who may use AdminService
    [deployments.NAME]             # one engine with one model
    [routes.PUBLIC_NAME]           # which deployments answer for a public model name

The environment variable of a setting is its path, upper case, joined by two underscores:
server.port is TWINJET_SERVER__PORT. Order: file, then environment, then flags; the last one wins.
An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from twinjet.errors import ConfigError
from twinjet.scheduler import SchedulerSettings

_SECTIONS = ("server", "admin", "grammar", "deployments", "routes")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(_Section):
    """Where to listen and what to bear. Sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535, description="0 picks a free port")
    grace_s: float = Field(30.0, ge=0, description="how long running streams may go on after SIGTERM")
    max_request_bytes: PositiveInt = Field(16 << 20, description="largest message that is read at all")
    max_prompt_bytes: PositiveInt = Field(4 << 20, description="longest prompt text")
    max_pending_bytes: PositiveInt = Field(4 << 20, description="most that waits for one slow reader")
    stalled_reader_s: PositiveFloat = Field(30.0, description="longest time one write may take")
    keepalive_s: PositiveFloat = Field(60.0, description="time between our pings on a silent connection")
    keepalive_timeout_s: PositiveFloat = Field(20.0, description="no answer to a ping: the client is gone")
    client_ping_s: PositiveFloat = Field(10.0, description="clients may ping as often as this")
    tls_cert: Path | None = Field(None, description="PEM certificate chain; with tls_key turns TLS on")
    tls_key: Path | None = Field(None, description="PEM private key")
    tls_client_ca: Path | None = Field(None, description="PEM bundle; clients must show a certificate of it")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus over HTTP; 0 is off")
    allow_partial: bool = Field(False, description="go on when a deployment's configuration cannot work")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: set both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self


class AdminSettings(_Section):
    """Who may use AdminService."""

    token: str = Field("", description="bearer token; empty: callers on the loopback interface only")


class GrammarSettings(_Section):
    """What the compilation of one request's constraint may cost, and how many may run at once."""

    memory_bytes: int = Field(1 << 30, ge=64 << 20, description="address space of one compilation")
    cpu_s: float = Field(5.0, ge=1, le=3600, description="processor time of one compilation")
    wall_s: float = Field(20.0, gt=0, le=3600, description="time of one compilation, also for waiting")
    workers: int = Field(2, ge=1, le=256, description="compilations at once; one tenant gets half of them")
    waiting: int = Field(16, ge=1, le=65536, description="compilations of one tenant that may wait")
    cache_bytes: int = Field(256 << 20, ge=0, description="compiled grammars that are kept, on disk")
    verify: bool = Field(True, description="check finished outputs against their JSON schema")


class DeploymentSettings(_Section):
    """One engine with one model."""

    engine: Literal["vllm", "tensorrt_llm", "fake"] = "vllm"
    model: str = Field("demo", description='path or name for the engine; "demo" is the small built-in model')
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the engine verbatim")
    native_sampler: bool = Field(True, description="draw tokens with Twinjet's sampler where it can")
    native_block_manager: bool = Field(
        True, description="account KV blocks with Twinjet's manager where it can"
    )
    max_restarts: int = Field(5, ge=0, description="restarts in a row before the deployment is given up")
    stall_s: PositiveFloat = Field(120.0, description="no token for this long while requests run: restart")
    scheduler: SchedulerSettings = Field(default_factory=SchedulerSettings)


class RouteSettings(_Section):
    """Which deployments answer for a public model name."""

    weights: dict[str, PositiveFloat] = Field(min_length=1, description="share of requests by deployment")
    fallback: list[str] = Field(default_factory=list, description="tried in order when none of them is ready")


class Config(_Section):
    """All settings."""

    server: ServerSettings = ServerSettings()
    admin: AdminSettings = AdminSettings()
    grammar: GrammarSettings = GrammarSettings()
    deployments: dict[str, DeploymentSettings] = Field(min_length=1)
    routes: dict[str, RouteSettings] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Config:
        for name, route in self.routes.items():
            for target in [*route.weights, *route.fallback]:
                if target not in self.deployments:
                    raise ValueError(
                        f"route {name!r} names deployment {target!r}, which does not exist"
                        + _did_you_mean(target, self.deployments)
                    )
        return self

    def public_routes(self) -> dict[str, RouteSettings]:
        """Routes by public name; without any, each deployment is public under its own name."""
        return self.routes or {name: RouteSettings(weights={name: 1.0}) for name in self.deployments}


def load(
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Read the settings. overrides: nested like the file, from flags.

    Raises ConfigError naming the setting, and the nearest known key for an unknown one.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for keys, value in _from_environment(environ):
        _set(tree, keys, value)
    _merge(tree, overrides or {})
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[list[str], Any]]:
    for name, text in sorted(environ.items()):
        keys = name.removeprefix("TWINJET_").lower().split("__")
        if name.startswith("TWINJET_") and len(keys) > 1 and keys[0] in _SECTIONS:
            yield keys, _parse(text)


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown setting {path}" + _did_you_mean(str(item["loc"][-1]), _known_keys(item["loc"][:-1]))
    if item["type"] == "missing" and path == "deployments":
        return "no deployment is configured; add a [deployments.NAME] section"
    message = item["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    kind: Any = Config
    for part in loc:
        # A mapping's own keys are names that the user chose; what they lead to is its value type.
        kind = get_args(kind)[1] if get_origin(kind) is dict else kind.model_fields[part].annotation
    return list(kind.model_fields)


def _did_you_mean(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}" if known else ""
