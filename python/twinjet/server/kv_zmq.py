"""Publishes a deployment's KV events as vLLM does, over ZMQ: for indexers that know vLLM and not WatchKvEvents.

Messages are [topic, sequence as 8 bytes, most significant first, msgpack]. Sequences go on over restarts of the engine: what
it held is told as cleared. Front end; used on the server's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from twinjet.engines.base import KvCleared, KvEvent, KvEventEngine, KvMedium, KvRemoved, KvStored
from twinjet.engines.kv_journal import KvCursor
from twinjet.engines.supervisor import State
from twinjet.errors import ConfigError

if TYPE_CHECKING:
    import zmq.asyncio

    from twinjet.config import KvZmqSettings
    from twinjet.engines.kv_journal import KvJournal
    from twinjet.engines.supervisor import Supervisor

logger = logging.getLogger("twinjet.server")

_END = (-1).to_bytes(8, "big", signed=True)
_HASH_MASK = (1 << 64) - 1
_MEDIA = {None: None, "device": "GPU", "host": "CPU", "disk": "STORAGE"}
_RANK = 0
_MAX_KEPT_BYTES = 64 << 20
_MAX_REQUEST_BYTES = 1024

Event = dict[str, Any]


class Translator:
    """Gives events as vLLM writes them. cache_kind: what vLLM calls the kind of the cache's one group; None: not known."""

    def __init__(self, cache_kind: str | None) -> None:
        self._group: Event = {} if cache_kind is None else {"group_idx": 0}
        self._kind: Event = {} if cache_kind is None else {"kv_cache_spec_kind": cache_kind}
        # There a block is told for each medium, here it is on one, and told again where it moves.
        self._media: dict[bytes, KvMedium | None] = {}

    def batch(self, time_s: float, events: Sequence[KvEvent]) -> list[Any]:
        """Give the batch of some events. time_s: Unix time."""
        return [time_s, [told for event in events for told in self._told(event)], _RANK]

    def snapshot_batch(self, time_s: float, events: Sequence[KvEvent]) -> list[Any]:
        """The same of blocks that were told before, for somebody who was not there."""
        told = [self._stored(e) if isinstance(e, KvStored) else {"type": "AllBlocksCleared"} for e in events]
        return [time_s, told, _RANK]

    def _told(self, event: KvEvent) -> Iterator[Event]:
        match event:
            case KvStored():
                medium = event.facts.medium
                moved = [h for h in event.block_hashes if self._media.get(h, medium) != medium]
                yield from self._removed(moved)
                self._media.update(dict.fromkeys(event.block_hashes, medium))
                yield self._stored(event)
            case KvRemoved():
                yield from self._removed([h for h in event.block_hashes if h in self._media])
            case KvCleared():
                self._media.clear()
                yield {"type": "AllBlocksCleared"}

    def _stored(self, event: KvStored) -> Event:
        salt, adapter = event.facts.salt, event.facts.adapter
        keys = (adapter,) if adapter else None
        per_block: list[tuple[str, ...] | None] = [keys] * len(event.block_hashes)
        if salt and not event.parent_hash:
            per_block[0] = (*(keys or ()), salt)
        return {
            "type": "BlockStored",
            "block_hashes": [_number(h) for h in event.block_hashes],
            "parent_block_hash": _number(event.parent_hash) if event.parent_hash else None,
            "token_ids": event.token_ids,
            "block_size": event.block_size,
            "lora_id": None,
            "medium": _MEDIA[event.facts.medium],
            "lora_name": adapter or None,
            "extra_keys": per_block,
            # Not vLLM's; Dynamo tells blocks of equal tokens apart by it and not by extra_keys.
            **({"cache_salt": salt} if salt else {}),
            **self._group,
            **self._kind,
        }

    def _removed(self, block_hashes: Sequence[bytes]) -> Iterator[Event]:
        by_medium: dict[KvMedium | None, list[int]] = {}
        for block_hash in block_hashes:
            by_medium.setdefault(self._media.pop(block_hash), []).append(_number(block_hash))
        for medium, numbers in by_medium.items():
            yield {
                "type": "BlockRemoved", "block_hashes": numbers, "medium": _MEDIA[medium], **self._group
            }  # fmt: skip


def _number(block_hash: bytes) -> int:
    return int.from_bytes(block_hash, "big") & _HASH_MASK


class KvPublisher:
    """Publishes what a deployment's engines hold, one after the other."""

    def __init__(self, deployment: str, settings: KvZmqSettings, cache_kind: str | None) -> None:
        self._deployment = deployment
        self.settings = settings
        self._translator = Translator(cache_kind)
        self._topic = settings.topic.encode()
        self._sequence = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._num_kept_bytes = 0
        self._journal: KvJournal | None = None
        self._cursor: KvCursor | None = None
        self._following: asyncio.Task[None] | None = None
        self._replaying: asyncio.Task[None] | None = None
        self._sockets: list[zmq.Socket[Any]] = []
        self._listens = "*" in settings.endpoint or "::" in settings.endpoint
        self.endpoint = ""
        self.replay_endpoint = ""

    def open(self) -> None:
        """Bind or connect the sockets. Raises ConfigError."""
        try:
            import msgspec
            import zmq.asyncio
        except ImportError as error:
            raise ConfigError(
                f"{self._key} needs pyzmq and msgspec ({error}): pip install 'twinjet[kv-zmq]'"
            ) from None
        # Sequences of any kind are lists on the wire.
        self._encode = msgspec.msgpack.Encoder(enc_hook=list).encode
        context: zmq.Context[Any] = zmq.Context.instance()
        settings = self.settings
        # Never blocks: what a subscriber does not take beyond the limit is dropped for it alone.
        self._publish = self._socket(context, zmq.PUB, settings.queued_batches)
        self.endpoint = self._at(self._publish, settings.endpoint, "endpoint")
        if settings.replay_endpoint:
            # One whole answer to a subscriber that does not read it yet.
            replay = self._socket(
                zmq.asyncio.Context.shadow(context), zmq.ROUTER, settings.kept_batches + 1024
            )
            replay.setsockopt(zmq.MAXMSGSIZE, _MAX_REQUEST_BYTES)
            self.replay_endpoint = self._at(replay, settings.replay_endpoint, "replay_endpoint")
            self._replaying = asyncio.create_task(self._replay(replay))
            self._replaying.add_done_callback(self._ended)
        logger.info("KV events of %s at %s", self._deployment, self.endpoint)

    def changed(self, supervisor: Supervisor) -> None:
        """Follow the deployment's engine, which may be another one or none now."""
        journal = None
        if supervisor.state is State.READY:
            engine = supervisor.engine
            if "kv_events" in engine.describe().capabilities:
                journal = cast("KvEventEngine", engine).kv_journal
            elif self._following is None:
                logger.warning("%s tells no KV events: there is nothing to publish", self._deployment)
        if journal is self._journal:
            return
        self._end()
        if journal is not None:
            self._journal, self._cursor = journal, KvCursor(journal)
            self._following = asyncio.create_task(self._follow(journal))
            self._following.add_done_callback(self._ended)

    def close(self) -> None:
        """Take the sockets down. Idempotent."""
        if self._replaying is not None:
            self._replaying.cancel()
        self._end()
        for socket in self._sockets:
            # What was sent may still go out, for a little while.
            socket.close(linger=200)
        self._sockets.clear()

    @property
    def listens_at(self) -> tuple[str, int] | None:
        """Host and port where subscribers connect, the host "" for every address; None if they do not."""
        host, _, port = self.endpoint.removeprefix("tcp://").rpartition(":")
        if not self._listens or not self.endpoint.startswith("tcp://"):
            return None
        return ("" if host in ("0.0.0.0", "[::]", "*") else host.strip("[]")), int(port)

    @property
    def _key(self) -> str:
        return f"deployments.{self._deployment}.kv_zmq"

    def _socket(self, context: zmq.Context[Any], kind: int, most: int) -> Any:
        import zmq

        socket = context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, most)
        self._sockets.append(socket)
        return socket

    def _at(self, socket: Any, endpoint: str, key: str) -> str:
        """Listen, or connect to who listens; gives the endpoint."""
        import zmq

        listens = self._listens or key == "replay_endpoint"
        if "[" in endpoint or "://*" in endpoint:
            socket.setsockopt(zmq.IPV6, 1)
        try:
            # vLLM tells the two apart so.
            if not listens and not endpoint.startswith("ipc://"):
                socket.connect(endpoint)
                return endpoint
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"{self._key}.{key}: cannot use {endpoint}: {error.strerror}") from None
        return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def _end(self) -> None:
        """Tell of nothing any more, and that all is gone if something was."""
        if self._following is not None:
            self._following.cancel()
            self._following = None
        if self._cursor is not None and self._sockets:
            self._send(self._translator.batch(time.time(), [KvCleared()]))
        self._journal = self._cursor = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("KV events of %s are not published any more", self._deployment, exc_info=error)

    async def _follow(self, journal: KvJournal) -> None:
        while not journal.is_closed:
            self._catch_up()
            await journal.wait(None)

    def _catch_up(self) -> None:
        while self._cursor is not None and (batch := self._cursor.next()) is not None:
            self._send(self._translator.batch(batch.time_s, batch.events))

    def _send(self, batch: list[Any]) -> None:
        data = self._encode(batch)
        self._keep(data)
        self._publish.send_multipart((self._topic, _sequence(self._sequence), data))
        self._sequence += 1

    def _keep(self, data: bytes) -> None:
        self._kept.append((self._sequence, data))
        self._num_kept_bytes += len(data)
        while len(self._kept) > self.settings.kept_batches or self._num_kept_bytes > _MAX_KEPT_BYTES:
            self._num_kept_bytes -= len(self._kept.popleft()[1])

    async def _replay(self, socket: Any) -> None:
        """Answer who asks for the batches from a sequence on; where they are not kept, by all there is."""
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
                logger.warning("a request for KV events' replay is not [id, empty, 8 bytes of a sequence]")
                continue
            who, first = frames[0], int.from_bytes(frames[2], "big")
            for sequence, data in self._answer(first):
                await socket.send_multipart((who, b"", self._topic, _sequence(sequence), data))
                await asyncio.sleep(0)
            await socket.send_multipart((who, b"", b"", _END, b""))

    def _answer(self, first: int) -> Iterator[tuple[int, bytes]]:
        self._catch_up()
        first_kept = self._kept[0][0] if self._kept else self._sequence
        if first >= first_kept or self._journal is None:
            return iter([kept for kept in self._kept if kept[0] >= first])
        return self._whole(self._journal, self._sequence - first)

    def _whole(self, journal: KvJournal, most: int) -> Iterator[tuple[int, bytes]]:
        """All there is, in place of the last batches, `most` at most."""
        parts = list(journal.snapshot())
        size = -(-len(parts) // most)
        groups = [parts[i : i + size] for i in range(0, len(parts), size)]
        for sequence, group in enumerate(groups, self._sequence - len(groups)):
            events = [event for part in group for event in part.events]
            yield sequence, self._encode(self._translator.snapshot_batch(group[0].time_s, events))


def _sequence(sequence: int) -> bytes:
    return sequence.to_bytes(8, "big")
