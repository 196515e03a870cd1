"""Mirrors what replicas tell of their prefix caches (WatchKvEvents) into the picker's index.

Replicas' block hashes mean nothing outside of them: keys of our own are made from the tokens. A stream that breaks is
taken up where it ended; what does not fit together is forgotten and begun anew from a snapshot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import grpc

from twinjet.epp.picking import EndpointPicker, Replica, prefix_root
from twinjet.v1 import admin_pb2, service_pb2_grpc

if TYPE_CHECKING:
    from twinjet._core import BlockHasher

logger = logging.getLogger("twinjet.epp")

_LOOK_S: Final = 0.5
_PAUSE_S: Final = 1.0
_MAX_BLOCK_SIZE: Final = 65536
_KEY_BYTES: Final = 16

_NEVER: Final = (
    grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
)  # fmt: skip
"""Not asked again before the next connection."""


class EventError(ValueError):
    """Events that do not fit together."""


class Mirrored:
    """What one model of one replica holds, as far as told. Pure but for the index that it writes to."""

    def __init__(self, picker: EndpointPicker, replica: Replica, model: str, max_blocks: int) -> None:
        self._picker = picker
        self._replica = replica
        self._model = model
        self._max_blocks = max_blocks
        self._keys: dict[bytes, bytes] = {}
        self._hasher: BlockHasher | None = None
        self.epoch = ""
        self.sequence = 0
        self._is_in_snapshot = False

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def can_go_on(self) -> bool:
        """Whether a new stream may begin behind what has been taken in."""
        return bool(self.epoch) and not self._is_in_snapshot

    def take(self, message: admin_pb2.WatchKvEventsResponse) -> None:
        """Take in one message. Raises EventError if it does not follow what came before, or cannot be."""
        is_snapshot = message.kind in (
            admin_pb2.KV_BATCH_KIND_SNAPSHOT,
            admin_pb2.KV_BATCH_KIND_SNAPSHOT_END,
        )
        if is_snapshot and not self._is_in_snapshot:
            self.forget()
            self.epoch = message.epoch
        if message.epoch != self.epoch:
            raise EventError(f"epoch {message.epoch!r} follows {self.epoch!r} without a snapshot")
        self._is_in_snapshot = message.kind == admin_pb2.KV_BATCH_KIND_SNAPSHOT
        if message.kind == admin_pb2.KV_BATCH_KIND_DELTA:
            if message.sequence != self.sequence + 1:
                raise EventError(f"delta {message.sequence} follows {self.sequence}")
        elif message.kind == admin_pb2.KV_BATCH_KIND_HEARTBEAT and message.sequence != self.sequence:
            raise EventError(f"a heartbeat tells of delta {message.sequence}, {self.sequence} came")
        self.sequence = message.sequence
        for event in message.events:
            match event.WhichOneof("kind"):
                case "stored":
                    self._store(event.stored)
                case "removed":
                    keys = [self._keys.pop(block, b"") for block in event.removed.block_hashes]
                    self._picker.told.erase(self._replica.number, b"".join(keys))
                case "cleared":
                    self._clear()
        if not self._is_in_snapshot and self._hasher is not None:
            self._picker.set_event_block_size(self._replica, self._model, self._hasher.block_size)

    def forget(self) -> None:
        """Hold nothing, and go on from nothing."""
        self._clear()
        self.epoch, self.sequence, self._is_in_snapshot = "", 0, False
        self._picker.set_event_block_size(self._replica, self._model, 0)

    def _clear(self) -> None:
        if self._keys and not self._replica.is_gone:
            self._picker.told.erase(self._replica.number, b"".join(self._keys.values()))
        self._keys.clear()

    def _store(self, stored: admin_pb2.KvBlocksStored) -> None:
        size = stored.block_size
        if not 0 < size <= _MAX_BLOCK_SIZE or size & (size - 1):
            raise EventError(f"a block cannot have {size} tokens")
        if len(stored.token_ids) != size * len(stored.block_hashes):
            raise EventError(
                f"{len(stored.block_hashes)} blocks of {size} tokens have {len(stored.token_ids)}"
            )
        if len(self._keys) + len(stored.block_hashes) > self._max_blocks:
            raise EventError(f"it tells of more than {self._max_blocks} blocks")
        if self._hasher is None or self._hasher.block_size != size:
            self._hasher = self._picker.hasher(size)
        parent = None
        if stored.parent_hash:
            parent = self._keys.get(stored.parent_hash)
            if parent is None:
                # Its beginning is gone, so no prompt can find it.
                return
        root = prefix_root(self._model, stored.adapter, stored.salt)
        keys = self._hasher.hash_bytes(list(stored.token_ids), salt=root, parent=parent)
        # One name has one block: what it stood for before is gone.
        gone = [self._keys[block] for block in stored.block_hashes if block in self._keys]
        self._picker.told.erase(self._replica.number, b"".join(gone))
        for place, block in enumerate(stored.block_hashes):
            self._keys[block] = keys[_KEY_BYTES * place : _KEY_BYTES * (place + 1)]
        self._picker.told.store(self._replica.number, keys)


class KvMirror:
    """Follows the KV events of replicas. token: of their AdminService. count_gap: called with a replica's address
    when what it told did not fit together."""

    def __init__(
        self, picker: EndpointPicker, token: str, max_blocks: int, count_gap: Callable[[str], None]
    ) -> None:
        self._picker = picker
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        self._max_blocks = max_blocks
        self._count_gap = count_gap
        self._held: dict[Replica, dict[str, Mirrored]] = {}

    async def follow(self, replica: Replica, channel: grpc.aio.Channel) -> None:
        """Follow all models of a replica until cancelled; what is held stays for the next connection."""
        held = self._held.setdefault(replica, {})
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for model, facts in replica.models.items():
                    if model not in tasks and facts.is_ready:
                        mirrored = held.setdefault(
                            model, Mirrored(self._picker, replica, model, self._max_blocks)
                        )
                        tasks[model] = asyncio.create_task(self._watch(replica, channel, model, mirrored))
                await asyncio.sleep(_LOOK_S)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            if replica.is_gone:
                del self._held[replica]

    async def _watch(
        self, replica: Replica, channel: grpc.aio.Channel, model: str, mirrored: Mirrored
    ) -> None:
        while True:
            try:
                await self._watch_once(replica, channel, model, mirrored)
            except grpc.aio.AioRpcError as error:
                if error.code() in _NEVER:
                    logger.warning(
                        "replica %s tells no KV events of %s: %s", replica.address, model, error.details()
                    )
                    mirrored.forget()
                    return
                logger.info("the KV events of replica %s end: %s", replica.address, error.code().name)
            except EventError as error:
                logger.warning("the KV events of replica %s do not fit together: %s", replica.address, error)
                mirrored.forget()
                self._count_gap(replica.address)
            await asyncio.sleep(_PAUSE_S)

    async def _watch_once(
        self, replica: Replica, channel: grpc.aio.Channel, model: str, mirrored: Mirrored
    ) -> None:
        facts = replica.models.get(model)
        deployment = facts.deployment if facts else ""
        request = admin_pb2.WatchKvEventsRequest(model=model, deployment=deployment)
        if mirrored.can_go_on:
            request.epoch, request.start_sequence = mirrored.epoch, mirrored.sequence + 1
        stub: Any = service_pb2_grpc.AdminServiceStub(channel)
        call = stub.WatchKvEvents(request, metadata=self._metadata)
        try:
            async for message in call:
                mirrored.take(message)
        finally:
            call.cancel()
