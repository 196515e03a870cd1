"""Answers of the calls that are no streams of tokens, as frozen dataclasses. Times in seconds.

The meaning of each field is that of the message of the same name in proto/twinjet/v1; None is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from twinjet.client._errors import IncompleteStream
from twinjet.client._events import Usage
from twinjet.client._requests import Sampling
from twinjet.v1 import admin_pb2, model_pb2, sampling_pb2

State = Literal["loading", "ready", "restarting", "failed", "draining", "unknown"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text. text: what was tokenized. max_context_tokens: to compare the count with."""

    token_ids: tuple[int, ...]
    text: str
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each input, in their order."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class LoadingProgress:
    """How far the start-up is. done: 0 to 1."""

    phase: str
    done: float
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What runs a model."""

    name: str
    version: str
    device: str
    source: str


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Effective limits of a deployment."""

    max_context_tokens: int
    vocab_size: int
    max_outputs: int
    max_logprobs: int
    max_concurrent_sequences: int


@dataclass(frozen=True, slots=True)
class ComponentInfo:
    """Which implementation of a component is in use: "twinjet" or "engine". reason: why not ours."""

    implementation: str
    version: str
    target: str
    reason: str
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class KvCacheInfo:
    """Size of a KV cache."""

    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served. What the engine says is None or empty until it is ready.

    state: "unknown" is one of a newer contract. capabilities: lower case, without prefix ("json_schema").
    """

    name: str
    deployment: str
    state: State
    loading: LoadingProgress | None
    failure: str
    engine: EngineInfo
    limits: ModelLimits | None
    capabilities: frozenset[str]
    default_sampling: Sampling
    sampler: ComponentInfo | None
    block_manager: ComponentInfo | None
    kv_cache: KvCacheInfo | None
    eos_token_ids: tuple[int, ...]
    settings: Mapping[str, str]

    @classmethod
    def of(cls, message: model_pb2.Model) -> Model:
        """Translate the contract's message, as get_model() does."""
        return cls(
            name=message.name,
            deployment=message.deployment,
            state=_state(message.state),
            loading=_loading(message.loading) if message.HasField("loading") else None,
            failure=message.failure,
            engine=EngineInfo(**_plain(EngineInfo, message.engine)),
            limits=ModelLimits(**_plain(ModelLimits, message.limits)) if message.HasField("limits") else None,
            capabilities=frozenset(_capability(c) for c in message.capabilities),
            default_sampling=_sampling(message.default_sampling),
            sampler=_component(message.sampler) if message.HasField("sampler") else None,
            block_manager=_component(message.block_manager) if message.HasField("block_manager") else None,
            kv_cache=KvCacheInfo(**_plain(KvCacheInfo, message.kv_cache))
            if message.HasField("kv_cache")
            else None,
            eos_token_ids=tuple(message.eos_token_ids),
            settings=dict(message.settings),
        )


@dataclass(frozen=True, slots=True)
class TenantLoad:
    """Load of one tenant of a model; "" is the anonymous one."""

    tenant: str
    waiting: int
    running: int
    served_tokens: float


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """Load of one model."""

    model: str
    deployment: str
    waiting: int | None
    running: int | None
    engine_waiting: int | None
    engine_running: int | None
    kv_blocks_total: int | None
    kv_blocks_used: int | None
    output_tokens_per_second: float | None
    prompt_tokens_per_second: float | None
    preemptions: int | None
    waiting_tokens: int | None
    tenants: tuple[TenantLoad, ...]
    request_ids: tuple[str, ...]
    restarts: int | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded LoRA adapter. path: on the server."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Drained:
    """What became of the running streams."""

    finished: int
    ended: int


@dataclass(frozen=True, slots=True)
class KvStored:
    """Blocks that can now be shared, each continuing the one before. parent_hash: b"" for a first block.

    salt, adapter: of the requests that can share them. medium: "device", "host", "disk"; "" is not known.
    """

    block_hashes: tuple[bytes, ...]
    parent_hash: bytes
    token_ids: tuple[int, ...]
    block_size: int
    salt: str = ""
    adapter: str = ""
    medium: str = ""


@dataclass(frozen=True, slots=True)
class KvRemoved:
    """Blocks that are gone."""

    block_hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KvCleared:
    """All blocks are gone."""


KvEvent = KvStored | KvRemoved | KvCleared


KvBatchKind = Literal["delta", "snapshot", "snapshot_end", "heartbeat"]


@dataclass(frozen=True, slots=True)
class KvEvents:
    """One batch, in order; apply the events whatever its kind. time_s: Unix time.

    kind: a watch can go on after sequence in epoch from any but a "snapshot", which has more parts to come.
    """

    sequence: int
    time_s: float
    events: tuple[KvEvent, ...]
    epoch: str = ""
    kind: KvBatchKind = "delta"
    deployment: str = ""


class KvOrder:
    """Checks that a watch misses no delta."""

    def __init__(self, epoch: str, start_sequence: int) -> None:
        self._epoch = epoch
        self._sequence = start_sequence - 1

    def check(self, batch: KvEvents) -> KvEvents:
        """Give the batch. Raises IncompleteStream if it does not continue what came before."""
        is_snapshot = batch.kind in ("snapshot", "snapshot_end")
        expected = self._sequence + (batch.kind == "delta")
        if not is_snapshot and (batch.epoch, batch.sequence) != (self._epoch, expected):
            raise IncompleteStream(
                f"{batch.kind} {batch.sequence} of epoch {batch.epoch!r} came instead of "
                f"{expected} of {self._epoch!r}"
            )
        self._epoch, self._sequence = batch.epoch, batch.sequence
        return batch


def load_of(load: admin_pb2.ModelLoad) -> ModelLoad:
    """Translate a load."""
    values = _plain(ModelLoad, load)
    values["tenants"] = tuple(TenantLoad(**_plain(TenantLoad, tenant)) for tenant in load.tenants)
    return ModelLoad(**values)


def adapter_of(adapter: model_pb2.Adapter) -> Adapter:
    """Translate an adapter."""
    return Adapter(adapter.name, adapter.path)


def kv_events_of(batch: admin_pb2.WatchKvEventsResponse) -> KvEvents:
    """Translate a batch; events of a newer contract are left out."""
    events = tuple(event for e in batch.events if (event := _kv_event(e)) is not None)
    return KvEvents(
        sequence=batch.sequence,
        time_s=batch.time.ToNanoseconds() / 1e9,
        events=events,
        epoch=batch.epoch,
        kind=_KV_KINDS[batch.kind],
        deployment=batch.deployment,
    )


_KV_KINDS: dict[int, KvBatchKind] = {
    admin_pb2.KV_BATCH_KIND_DELTA: "delta",
    admin_pb2.KV_BATCH_KIND_SNAPSHOT: "snapshot",
    admin_pb2.KV_BATCH_KIND_SNAPSHOT_END: "snapshot_end",
    admin_pb2.KV_BATCH_KIND_HEARTBEAT: "heartbeat",
}
_KV_MEDIA = {
    admin_pb2.KV_MEDIUM_DEVICE: "device",
    admin_pb2.KV_MEDIUM_HOST: "host",
    admin_pb2.KV_MEDIUM_DISK: "disk",
}


def _kv_event(event: admin_pb2.KvEvent) -> KvEvent | None:
    if event.HasField("stored"):
        values = _plain(KvStored, event.stored)
        return KvStored(**{**values, "medium": _KV_MEDIA.get(event.stored.medium, "")})
    if event.HasField("removed"):
        return KvRemoved(tuple(event.removed.block_hashes))
    return KvCleared() if event.HasField("cleared") else None


def _plain(kind: type, message: Any) -> dict[str, Any]:
    """Give a dataclass's values from the fields of the same names: unset optional ones as None."""
    values: dict[str, Any] = {}
    for f in fields(kind):
        value = getattr(message, f.name)
        if message.DESCRIPTOR.fields_by_name[f.name].has_presence and not message.HasField(f.name):
            value = None
        elif hasattr(value, "extend"):
            value = tuple(value)
        values[f.name] = value
    return values


def _state(state: int) -> State:
    name = model_pb2.ModelState.Name(state) if state in model_pb2.ModelState.values() else ""  # type: ignore[arg-type]
    word = name.removeprefix("MODEL_STATE_").lower()
    return "unknown" if word in ("", "unspecified") else cast("State", word)


def _capability(capability: int) -> str:
    if capability not in model_pb2.Capability.values():
        return f"unknown_{capability}"
    return model_pb2.Capability.Name(capability).removeprefix("CAPABILITY_").lower()  # type: ignore[arg-type]


def _loading(loading: model_pb2.LoadingProgress) -> LoadingProgress:
    return LoadingProgress(loading.phase, loading.done, loading.elapsed.ToNanoseconds() / 1e9)


def _component(component: model_pb2.ComponentInfo) -> ComponentInfo:
    return ComponentInfo(
        component.implementation, component.version, component.target, component.reason,
        dict(component.counters),
    )  # fmt: skip


def _sampling(sampling: sampling_pb2.SamplingParams) -> Sampling:
    """Translate a model's defaults, which have no constraint."""
    values: dict[str, Any] = {}
    for f in fields(Sampling):
        value = getattr(sampling, f.name)
        if f.name == "constraint":
            continue
        if f.name == "logit_bias":
            values[f.name] = dict(value)
        elif hasattr(value, "extend"):
            values[f.name] = tuple(value)
        elif sampling.HasField(f.name):  # type: ignore[arg-type]
            values[f.name] = value
    return Sampling(**values)
