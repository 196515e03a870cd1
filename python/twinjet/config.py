"""The server's settings: one TOML file, flags for the common case, and TWINJET_* for every setting.

    [server]                       # where to listen, limits, TLS, shutdown
    [admin]                        # who may use AdminService
    [deployments.NAME]             # one engine with one model
    [routes.PUBLIC_NAME]           # which deployments answer for a public model name
    [mirror]                       # what mirrored requests may cost, and where their answers go
    [protocols.openengine]         # whether OpenEngine v1 is spoken besides, and whom its requests are accounted to

The environment variable of a setting is its path, upper case, joined by two underscores:
server.port is TWINJET_SERVER__PORT (see twinjet.environment). Order: file, then environment, then flags; the last
one wins. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from twinjet import environment
from twinjet.errors import ConfigError, InvalidRequest
from twinjet.routing.table import Route, check_route
from twinjet.scheduler import SchedulerSettings
from twinjet.settings_tree import did_you_mean, keys_at

LONGEST_S = 1_000_000.0
"""Longest duration that can be set, in seconds: eleven days, which gRPC's milliseconds can hold."""

Bytes = Annotated[int, Field(gt=0, le=2**31 - 1)]
Duration = Annotated[float, Field(ge=0.001, le=LONGEST_S)]
Weight = Annotated[float, Field(ge=0, le=1e9)]


def _host(text: str) -> str:
    """Take the brackets off an IPv6 address. Raises ValueError for what no socket can be bound to."""
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    if not text:
        raise ValueError("is empty; 0.0.0.0 or :: listens on all interfaces")
    if text.count(":") == 1:
        raise ValueError(f"{text!r} has a port in it; that is a setting of its own, server.port")
    if re.search(r"[^\w.:%-]", text):
        raise ValueError(f"{text!r} is neither an address nor a host name")
    return text


def _name(text: str) -> str:
    if not text or text != text.strip() or not text.isprintable() or len(text.encode()) > 256:
        raise ValueError(
            f"{text[:80]!r} cannot be a name; allowed: 1 to 256 bytes of printable text, no space at its ends"
        )
    return text


def _token(text: str) -> str:
    # Metadata carries nothing else, so no client could ever send another.
    if not text.isascii() or not text.isprintable() or text != text.strip():
        raise ValueError("has other than printable ASCII characters, or space at its ends")
    return text


def _path(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("has a null character in it")
    return path


def _label(text: str) -> str:
    if len(text.encode()) > 128:
        raise ValueError("is longer than 128 bytes")
    return text


Host = Annotated[str, AfterValidator(_host)]
Label = Annotated[str, AfterValidator(_label)]
Name = Annotated[str, AfterValidator(_name)]
Token = Annotated[str, AfterValidator(_token)]
File = Annotated[Path, AfterValidator(_path)]
Settings = TypeVar("Settings", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listening(Protocol):
    """What settings of a server that listens have in common."""

    @property
    def port(self) -> int: ...
    @property
    def metrics_port(self) -> int: ...
    @property
    def tls_cert(self) -> Path | None: ...
    @property
    def tls_key(self) -> Path | None: ...
    @property
    def tls_client_ca(self) -> Path | None: ...


def check_listening(settings: Listening) -> None:
    """Raise ValueError where ports or TLS files do not fit together."""
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ValueError("tls_cert and tls_key belong together: set both or none")
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        raise ValueError("tls_client_ca needs tls_cert and tls_key")
    if settings.port == settings.metrics_port != 0:
        raise ValueError(f"port and metrics_port are both {settings.port}; each needs its own")


class ServerSettings(_Section):
    """Where to listen and what to bear. Sizes in bytes, times in seconds."""

    host: Host = Field("127.0.0.1", description="address or host name, IPv6 with or without brackets")
    port: int = Field(50051, ge=0, le=65535, description="0 picks a free port")
    grace_s: float = Field(
        30.0, ge=0, le=LONGEST_S, description="how long running streams may go on after SIGTERM"
    )
    max_request_bytes: Bytes = Field(16 << 20, description="largest message that is read at all")
    max_prompt_bytes: Bytes = Field(4 << 20, description="longest prompt text")
    max_pending_bytes: Bytes = Field(4 << 20, description="most that waits for one slow reader")
    stalled_reader_s: Duration = Field(30.0, description="longest time one write may take")
    max_streams: int = Field(16_384, ge=0, le=2**31 - 1, description="open streams in all; 0 is no limit")
    max_streams_per_connection: int = Field(
        0, ge=0, le=2**31 - 1, description="open streams on one connection; 0 is no limit"
    )
    max_streams_per_address: int = Field(
        0, ge=0, le=2**31 - 1, description="open streams from one address; 0 is no limit"
    )
    client_ipv6_prefix: int = Field(
        64, ge=1, le=128, description="bits of an IPv6 address that tell clients apart"
    )
    keepalive_s: Duration = Field(60.0, description="time between our pings on a silent connection")
    keepalive_timeout_s: Duration = Field(20.0, description="no answer to a ping: the client is gone")
    client_ping_s: Duration = Field(10.0, description="clients may ping as often as this")
    door: Literal["auto", "native", "grpc"] = Field(
        "auto", description="ours on nghttp2, gRPC's own library, or ours where it is built"
    )
    door_threads: int = Field(1, ge=1, le=64, description="of the native door")
    max_connections: int = Field(16384, ge=1, le=2**20, description="through the native door")
    max_connections_per_address: int = Field(
        0, ge=0, le=2**20, description="through the native door, from one IP address; 0 is no limit"
    )
    max_connection_calls: int = Field(
        4096, ge=1, le=2**20, description="open at once on one connection of the native door"
    )
    tls_cert: File | None = Field(None, description="PEM certificate chain; with tls_key turns TLS on")
    tls_key: File | None = Field(None, description="PEM private key")
    tls_client_ca: File | None = Field(None, description="PEM bundle; clients must show a certificate of it")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus and the console over HTTP; 0 is off")
    console: Literal["loopback", "all", "off"] = Field(
        "loopback", description="who may look at the console on metrics_port"
    )
    allow_partial: bool = Field(False, description="go on when a deployment's configuration cannot work")

    @model_validator(mode="after")
    def _parts_fit(self) -> ServerSettings:
        check_listening(self)
        return self

    @property
    def literal_host(self) -> str:
        """The host as it stands before a port: IPv6 addresses in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host


class AdminSettings(_Section):
    """Who may use AdminService and change adapters."""

    token: Token = Field("", description="bearer token; empty: callers on the loopback interface only")


class GrammarSettings(_Section):
    """What the compilation of one request's constraint may cost, and how many may run at once."""

    memory_bytes: int = Field(1 << 30, ge=64 << 20, description="address space of one compilation")
    cpu_s: float = Field(5.0, ge=1, le=3600, description="processor time of one compilation")
    wall_s: float = Field(20.0, gt=0, le=3600, description="time of one compilation, also for waiting")
    workers: int = Field(2, ge=1, le=256, description="compilations at once; one tenant gets half of them")
    waiting: int = Field(16, ge=1, le=65536, description="compilations of one tenant that may wait")
    refused_cpu_s: float = Field(
        10.0, gt=0, le=86_400, description="processor time of one tenant for constraints that are refused"
    )
    cache_bytes: int = Field(256 << 20, ge=0, description="compiled grammars that are kept, on disk")
    verify: bool = Field(True, description="check finished outputs against their JSON schema")


def _endpoint(text: str) -> str:
    if text and (not _ENDPOINT.fullmatch(text) or len(text.encode()) > 512):
        raise ValueError(f"{text[:80]!r} is no ZMQ endpoint; allowed: tcp://HOST:PORT and ipc://PATH")
    return text


_ENDPOINT = re.compile(r"(tcp://\S+:(\d{1,5}|\*)|ipc:///\S+)", re.ASCII)
Endpoint = Annotated[str, AfterValidator(_endpoint)]


class KvZmqSettings(_Section):
    """KV events over ZMQ, as vLLM publishes them. Needs kv_events."""

    endpoint: Endpoint = Field(
        "", description="listened at if it has * or :: or is ipc://, else connected to; empty is off"
    )
    replay_endpoint: Endpoint = Field("", description="listened at, for who missed batches; empty is none")
    topic: Label = Field("", description="first frame of every message")
    kept_batches: int = Field(10_000, ge=1, le=2**24, description="for replays; 64 MiB at most")
    queued_batches: int = Field(
        2_000, ge=1, le=2**31 - 1, description="for one subscriber; further ones are dropped for it"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> KvZmqSettings:
        if self.replay_endpoint and not self.endpoint:
            raise ValueError("replay_endpoint needs endpoint")
        return self


class DeploymentSettings(_Section):
    """One engine with one model."""

    engine: Literal["vllm", "tensorrt_llm", "fake"] = "vllm"
    model: str = Field("demo", description='path or name for the engine; "demo" is the small built-in model')
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the engine verbatim")
    native_sampler: bool = Field(True, description="draw tokens with Twinjet's sampler where it can")
    native_block_manager: bool = Field(
        True, description="account KV blocks with Twinjet's manager where it can"
    )
    kv_events: bool = Field(False, description="tell what the prefix cache holds, for WatchKvEvents")
    kv_zmq: KvZmqSettings = KvZmqSettings()
    max_restarts: int = Field(
        5, ge=0, le=2**31 - 1, description="restarts in a row before the deployment is given up"
    )
    stall_s: Duration = Field(120.0, description="no token for this long while requests run: restart")
    scheduler: SchedulerSettings = Field(default_factory=SchedulerSettings)

    @model_validator(mode="after")
    def _can_tell_kv_events(self) -> DeploymentSettings:
        if self.kv_zmq.endpoint and not self.kv_events:
            raise ValueError("kv_zmq.endpoint needs kv_events = true")
        return self


class RouteSettings(_Section):
    """Which deployments answer for a public model name."""

    weights: dict[str, Weight] = Field(min_length=1, description="share of requests by deployment; 0: none")
    fallback: list[str] = Field(default_factory=list, description="tried in order when none of them is ready")
    sticky: Literal["none", "tenant", "session"] = Field(
        "none", description="requests of one tenant or session stay at one deployment"
    )
    mirror: str = Field("", description="deployment that gets copies of requests; its answers are recorded")
    mirror_share: float = Field(0.0, ge=0, le=1, description="share of requests that is copied")

    def route(self) -> Route:
        """Give the route that this section stands for."""
        return Route(dict(self.weights), tuple(self.fallback), self.sticky, self.mirror, self.mirror_share)


class MirrorSettings(_Section):
    """What mirrored requests may cost and where their answers go. Sizes in bytes."""

    folder: File | None = Field(None, description="records go to files in this folder; unset: none are kept")
    max_file_bytes: Bytes = Field(64 << 20, description="a record file is followed by another at this size")
    max_files: int = Field(
        8, ge=1, le=1_000_000, description="the oldest record file beyond these is deleted"
    )
    max_streams: int = Field(16, ge=1, le=65536, description="copies at once; more are dropped")
    record_prompts: bool = Field(
        False, description="record prompts and texts too, not only token ids' digests"
    )


class OpenEngineSettings(_Section):
    """OpenEngine v1, as Dynamo's sidecars speak it."""

    enabled: bool = Field(False, description="answer openengine.v1.Inference and openengine.v1.Control")
    tenant: Label = Field("openengine", description="whom its requests are accounted to; they name nobody")
    deadline_s: float = Field(
        0.0, ge=0, le=LONGEST_S, description="of requests that bring no gRPC deadline; 0 is none"
    )


class ProtocolSettings(_Section):
    """Protocols of others that are spoken besides twinjet.v1."""

    openengine: OpenEngineSettings = OpenEngineSettings()


class Config(_Section):
    """All settings."""

    server: ServerSettings = ServerSettings()
    admin: AdminSettings = AdminSettings()
    grammar: GrammarSettings = GrammarSettings()
    deployments: dict[Name, DeploymentSettings] = Field(min_length=1)
    routes: dict[Name, RouteSettings] = Field(default_factory=dict)
    mirror: MirrorSettings = MirrorSettings()
    protocols: ProtocolSettings = ProtocolSettings()

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Config:
        for name, route in self.routes.items():
            try:
                check_route(route.route(), self.deployments, "")
            except InvalidRequest as error:
                told = "; ".join(f"{v.field}: {v.message}" for v in error.violations)
                raise ValueError(f"route {name!r}: {told}") from None
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
    return load_tree(Config, path, overrides, environ)


def load_tree(
    model: type[Settings], path: Path | None, overrides: Mapping[str, Any] | None, environ: Mapping[str, str]
) -> Settings:
    """Read the settings of any command, as load() does those of the server."""
    tree = {} if path is None else _read(path)
    origins = environment.apply(tree, environ, model)
    _merge(tree, overrides or {})
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(model, item, origins) for item in error.errors())) from None


def deployment_settings(tree: Mapping[str, Any]) -> DeploymentSettings:
    """Check the settings of one deployment. Raises ConfigError naming the setting."""
    try:
        return DeploymentSettings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        # Editors on Windows put a byte order mark first.
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deep") from error
    except ValueError as error:
        # Numbers of thousands of digits, dates that no calendar has.
        raise ConfigError(f"{path} holds a value that cannot be read: {error}") from error


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if not isinstance(value, Mapping):
            tree[key] = value
        elif isinstance(mine := tree.setdefault(key, {}), dict):
            _merge(mine, value)


def _explain(model: type[BaseModel], item: Any, origins: Mapping[tuple[str, ...], str]) -> str:
    loc = tuple(str(part) for part in item["loc"] if part != "[key]")
    path = ".".join(loc)
    # A mistake inside a value belongs to the variable that gave the value.
    source = next((origins[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in origins), "")
    if source:
        path += f" (from {source})"
    if item["type"] == "extra_forbidden":
        return f"unknown setting {path}" + did_you_mean(loc[-1], keys_at(model, loc[:-1]))
    if item["type"] == "missing" and loc == ("deployments",):
        return "no deployment is configured; add a [deployments.NAME] section"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in ("model_type", "dict_type"):
        message = "must be a table"
    elif item["type"] != "value_error" and isinstance(item["input"], str | int | float):
        message = f"{_shown(item['input'])} is refused: " + message.replace("Input should", "it should", 1)
    return f"{path}: {message}" if path else message


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:
        return "a number of too many digits"
    return text if len(text) <= 60 else text[:60] + "…"
