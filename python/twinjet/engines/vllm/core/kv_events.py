"""Tells the front end what the native block manager's prefix cache holds.

The scheduler's thread only writes into the manager's log, which is native; a thread of its own empties it now and then.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from twinjet.engines.vllm import kv_wire

if TYPE_CHECKING:
    from twinjet._core import BlockManager

logger = init_logger(__name__)

MAX_EVENTS = 1 << 16
"""Events that wait for the thread; a block of 16 tokens takes 136 bytes."""
INTERVAL_S = 0.02
"""Between two looks at the log: short beside a prefill, long beside a look, which takes microseconds."""
EVENTS_A_FRAME = 2048


def are_wanted() -> bool:
    """Whether the front end listens for events."""
    return bool(os.environ.get(kv_wire.ADDRESS_ENV))


class KvEventSender:
    """Sends the events of a block manager to the socket at an address. Used by the scheduler's thread but for _run()."""

    def __init__(self, manager: BlockManager, address: str) -> None:
        self._manager = manager
        self._tags = Tags()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(address)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, manager: BlockManager) -> KvEventSender | None:
        """Make one if the front end listens for events."""
        return cls(manager, os.environ[kv_wire.ADDRESS_ENV]) if are_wanted() else None

    def begin(self, sequence: int, request: Any) -> None:
        """A sequence was opened for a request: note with whom its blocks are shared."""
        adapter = "" if request.lora_request is None else request.lora_request.lora_name
        if request.cache_salt or adapter:
            self._manager.set_tag(sequence, self._tags.take(sequence, (request.cache_salt or "", adapter)))

    def end(self, sequence: int) -> None:
        """A sequence stores no block any more."""
        self._tags.give_back(sequence)

    def stop(self) -> None:
        """Send what there is and end; for tests."""
        self._stopped.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(INTERVAL_S):
                self._send()
            self._send()
        except OSError as error:
            # The front end is gone, and this process with it before long.
            logger.info("KV events are not sent any more: %s", error)

    def _send(self) -> None:
        # Tags that no sequence has now were last used by events that are in the log already.
        unused = self._tags.unused()
        while data := self._manager.drain_events(EVENTS_A_FRAME):
            # And those of the drained events were made before.
            if made := self._tags.made():
                self._socket.sendall(kv_wire.facts_frame(made))
            self._socket.sendall(kv_wire.frame(kv_wire.EVENTS, data))
        if told := self._tags.drop(unused):
            self._socket.sendall(kv_wire.forget_frame(told))


class Tags:
    """Numbers for what tells blocks of equal tokens apart: salt and adapter. A number is never used again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[tuple[str, str], int] = {}
        self._num_users: dict[int, int] = {}
        self._by_sequence: dict[int, tuple[str, str]] = {}
        self._made: dict[int, tuple[str, str]] = {}
        self._unused: list[int] = []
        self._next = 1

    def take(self, sequence: int, key: tuple[str, str]) -> int:
        """Give the number for a sequence."""
        with self._lock:
            number = self._numbers.get(key)
            if number is None:
                number = self._numbers[key] = self._next
                self._next += 1
                self._num_users[number] = 0
                self._made[number] = key
            self._num_users[number] += 1
            self._by_sequence[sequence] = key
            return number

    def give_back(self, sequence: int) -> None:
        """The sequence needs its number no more; nothing if it has none."""
        if sequence not in self._by_sequence:
            return
        with self._lock:
            key = self._by_sequence.pop(sequence)
            number = self._numbers[key]
            self._num_users[number] -= 1
            if not self._num_users[number]:
                del self._num_users[number], self._numbers[key]
                self._unused.append(number)

    def made(self) -> dict[int, tuple[str, str]]:
        """Numbers made since the last call, and what they mean."""
        with self._lock:
            made, self._made = self._made, {}
            return made

    def unused(self) -> list[int]:
        """Numbers that went out of use since the last call; each is to be dropped."""
        with self._lock:
            unused, self._unused = self._unused, []
            return unused

    def drop(self, numbers: list[int]) -> list[int]:
        """Forget numbers that no event names any more; gives those of them that made() has told of."""
        with self._lock:
            return [number for number in numbers if self._made.pop(number, None) is None]
