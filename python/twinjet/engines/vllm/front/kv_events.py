"""Takes the KV events of an engine core into a journal; the other end is core/kv_events.py."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from twinjet.engines.base import KvCleared, KvEvent, KvRemoved
from twinjet.engines.kv_journal import KvJournal
from twinjet.engines.vllm import kv_wire
from twinjet.private_folder import PrivateFolder

logger = logging.getLogger(__name__)


class KvEventReceiver:
    """Listens on a socket of its own that only this user reaches. Used on the engine's loop."""

    def __init__(self) -> None:
        self.journal = KvJournal()
        self._folder = PrivateFolder("kv")
        self._server: asyncio.Server | None = None
        self._reading: set[asyncio.Task[None]] = set()
        self._has_lost = False

    @property
    def address(self) -> str:
        """The socket's path."""
        return str(self._folder.path / "events")

    async def listen(self) -> None:
        self._server = await asyncio.start_unix_server(self._accept, self.address)

    def close(self) -> None:
        """End every watch and stop listening. Idempotent."""
        self.journal.close()
        if self._server is not None:
            self._server.close()
        for task in self._reading:
            task.cancel()
        self._folder.remove()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._reading.add(task)
        decoder = kv_wire.Decoder()
        try:
            # Ends with the engine core, whose death others notice.
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while True:
                    kind, size = kv_wire.HEADER.unpack(await reader.readexactly(kv_wire.HEADER.size))
                    self._take(decoder.decode(kind, await reader.readexactly(size)))
        finally:
            self._reading.discard(task)
            writer.close()

    def _take(self, decoded: list[KvEvent | kv_wire.Lost]) -> None:
        events: list[KvEvent] = []
        for event in decoded:
            match event:
                case kv_wire.Lost():
                    logger.warning("%d KV events were lost; the journal begins anew", event.num_events)
                    self._has_lost = True
                    events.append(KvCleared())
                case KvRemoved() if self._has_lost:
                    # Of blocks that nobody was told of nobody is told that they are gone.
                    self.journal.put(events)
                    events = []
                    if known := [h for h in event.block_hashes if h in self.journal]:
                        events.append(KvRemoved(known))
                case _:
                    events.append(event)
        self.journal.put(events)
