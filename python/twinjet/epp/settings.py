"""Settings of `twinjet epp`: one TOML file, flags for the common case, and TWINJET_* for every setting.

[server]        where to listen                 [picking]   what a replica's load costs
[replicas]      which replicas there are        [index]     what is remembered of prompts
[shedding]      when requests are refused       [tokenizers] by model, for exact prefixes of text
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from twinjet.config import (
    LONGEST_S,
    Bytes,
    Duration,
    File,
    Host,
    Name,
    ServerSettings,
    Token,
    check_listening,
    load_tree,
)

Weight = Annotated[float, Field(ge=0, le=1e9)]


def check_address(text: str) -> str:
    """Give an address as Envoy spells it: IP:PORT, IPv6 in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError(
            f"{text[:80]!r} is not IP:PORT; names have many addresses and go into replicas.dns"
        ) from None
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text[:80]!r} has no port from 1 to 65535")
    return f"[{address}]:{int(port)}" if address.version == 6 else f"{address}:{int(port)}"


def _name_and_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text[:80]!r} is not NAME:PORT")
    return text


Address = Annotated[str, AfterValidator(check_address)]
NameAndPort = Annotated[str, AfterValidator(_name_and_port)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ListenSettings(_Section):
    """Where Envoy finds the picker. Times in seconds."""

    host: Host = Field("127.0.0.1", description="address or host name, IPv6 with or without brackets")
    port: int = Field(9002, ge=0, le=65535, description="0 picks a free port")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus over HTTP; 0 is off")
    grace_s: float = Field(
        10.0, ge=0, le=LONGEST_S, description="how long open streams may go on after SIGTERM"
    )
    tls_cert: File | None = Field(None, description="PEM certificate chain; with tls_key turns TLS on")
    tls_key: File | None = Field(None, description="PEM private key")
    tls_client_ca: File | None = Field(None, description="PEM bundle; Envoy must show a certificate of it")
    door: Literal["auto", "native", "grpc"] = Field(
        "auto", description="ours on nghttp2, gRPC's own library, or ours where it is built"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> ListenSettings:
        check_listening(self)
        return self

    def door_settings(self) -> ServerSettings:
        """Give the same as settings of a server's door. One connection of Envoy's carries many streams."""
        return ServerSettings(
            host=self.host, port=self.port, tls_cert=self.tls_cert, tls_key=self.tls_key,
            tls_client_ca=self.tls_client_ca, door=self.door, max_streams=0, max_connection_calls=2**20,
        )  # fmt: skip


class KubernetesSettings(_Section):
    """The endpoints of a Service, read from its EndpointSlices."""

    service: str = Field("", description="name of the Service; empty: not from Kubernetes")
    namespace: str = Field("", description="empty: the picker's own")
    port: str = Field("", description="name of the port, or its number; empty: the only one")
    api: str = Field("", description="URL of the API; empty: as every pod finds it")
    token_file: File = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    ca_file: File = Path("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")


class ReplicaSettings(_Section):
    """Which replicas there are; exactly one of addresses, file, dns and kubernetes. Times in seconds."""

    addresses: list[Address] = Field(default_factory=list, description="IP:PORT each")
    file: File | None = Field(None, description="a line IP:PORT for each replica; read again when it changes")
    dns: NameAndPort | Literal[""] = Field(
        "", description="NAME:PORT; every address of the name is a replica"
    )
    kubernetes: KubernetesSettings = KubernetesSettings()
    refresh_s: Duration = Field(1.0, description="how often file and dns are looked at")
    report_s: Annotated[float, Field(ge=0.1, le=60)] = Field(0.5, description="interval of load reports")
    facts_s: Duration = Field(10.0, description="how often models and adapters are asked for")
    admin_token: Token = Field("", description="of the replicas' AdminService, for KV events")
    tls_ca: File | None = Field(None, description="PEM bundle; turns TLS to the replicas on")
    tls_name: str = Field("", description="name in the replicas' certificates; empty: their address")

    @model_validator(mode="after")
    def _one_source(self) -> ReplicaSettings:
        given = {
            "addresses": bool(self.addresses), "file": self.file is not None, "dns": bool(self.dns),
            "kubernetes.service": bool(self.kubernetes.service),
        }  # fmt: skip
        named = [name for name, is_given in given.items() if is_given]
        if len(named) != 1:
            found = " and ".join(named) if named else "none of them"
            raise ValueError(f"set one of {', '.join(given)}; {found} is set")
        return self


class PickingSettings(_Section):
    """What a replica's load costs, in tokens of prompt; how long a decision may take, in seconds."""

    prefix_weight: int = Field(
        4,
        ge=1,
        le=100,
        description="cost of a token that must be computed, as it takes another's place in the cache",
    )
    prefill_tokens_per_s: Weight = Field(
        10_000.0,
        description="about the speed at which a replica computes prompts: its queue shrinks so between reports",
    )
    running_tokens: Weight = Field(16.0, description="cost of a request that runs at a replica")
    waiting_tokens: Weight = Field(256.0, description="the same of one that waits, beside its prompt")
    kv_penalty: Weight = Field(4.0, description="weight of a token for which the KV cache has no room")
    report_life_s: Duration = Field(5.0, description="a load report counts for so long")
    fallbacks: int = Field(1, ge=0, le=16, description="addresses behind the best one, for retries")
    decide_s: Duration = Field(1.0, description="longest wait for a request's body; then by what has come")
    max_body_bytes: Bytes = Field(4 << 20, description="of a request's body that is looked at")
    client_ipv6_prefix: int = Field(
        64, ge=1, le=128, description="bits of an IPv6 address that tell clients without a tenant apart"
    )


class IndexSettings(_Section):
    """What is remembered of prompts."""

    mode: Literal["approximate", "events", "off"] = Field(
        "approximate", description="by where prompts were sent, or by what replicas tell of their caches"
    )
    block_tokens: Literal[16, 32, 64, 128, 256] = Field(
        64, description="length of a block of the approximate index"
    )
    max_blocks: int = Field(
        4_000_000, ge=1024, le=2**31, description="blocks at replicas that are remembered, some 80 bytes each"
    )
    replica_tokens: int = Field(
        500_000, ge=0, le=10**12, description="size of a replica's KV cache where it does not tell"
    )


class SheddingSettings(_Section):
    """When requests are refused: once every replica has max_waiting requests waiting."""

    max_waiting: Weight = Field(
        32.0, description="from here on tenants with more than their share are refused"
    )
    hard_waiting: Weight = Field(256.0, description="from here on all are")
    retry_s: Duration = Field(
        1.0, description="what a refused client is told to wait, if replicas do not tell"
    )

    @model_validator(mode="after")
    def _in_order(self) -> SheddingSettings:
        if self.hard_waiting < self.max_waiting:
            raise ValueError("hard_waiting is below max_waiting")
        return self


class EppConfig(_Section):
    """All settings of the endpoint picker."""

    server: ListenSettings = ListenSettings()
    replicas: ReplicaSettings = Field(default_factory=dict, validate_default=True)
    picking: PickingSettings = PickingSettings()
    index: IndexSettings = IndexSettings()
    shedding: SheddingSettings = SheddingSettings()
    tokenizers: dict[Name, File] = Field(
        default_factory=dict, description="model folder by model; with index.mode events, for text and chat"
    )

    @model_validator(mode="after")
    def _reports_come_in_time(self) -> EppConfig:
        if self.picking.report_life_s < 2 * self.replicas.report_s:
            raise ValueError(
                "picking.report_life_s is below twice replicas.report_s: reports would not count"
            )
        return self


def load(
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> EppConfig:
    """Read the settings; overrides are nested like the file, from flags. Raises ConfigError naming the setting."""
    return load_tree(EppConfig, path, overrides, environ)
