"""Our client of vLLM's engine core: its ZeroMQ sockets and msgpack messages, without vLLM in this process.

Requests are encoded here (wire.py). The two sockets that the engine core connects to speak ZeroMQ's protocol without
libzmq, which has the handshake alone. The event loop that watch() names asks (zmtp.py). A native thread reads what is
answered and puts it into the pumps of the requests that it concerns (csrc/vllm/core_reader.h), and tells the loop of
what has happened. Where the vocabulary is a function of Python, the loop reads too, a bounded number of messages a turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import zmq

from twinjet import _core
from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front import wire
from twinjet.engines.vllm.front.core_params import CoreParams
from twinjet.engines.vllm.front.link import Adapter
from twinjet.engines.vllm.front.outputs import TOLD_TO_END, failure
from twinjet.engines.vllm.front.zmtp import Connection, Listener
from twinjet.errors import EngineDied, Unsupported
from twinjet.private_folder import PrivateFolder
from twinjet.sampling.bad_text import BadTextSettings

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from twinjet.engines.base import Outlet, Run
    from twinjet.engines.vllm.front.load import LoadReader
    from twinjet.models.tokenizer import HfTokenizer
    from twinjet.request import EngineRequest

logger = logging.getLogger(__name__)

_FINISHES: dict[int, Literal["no_token", "error", "abort"]] = {1: "no_token", 3: "abort", 4: "error"}
"""What an irregular end was; numbers as in csrc/stream/step_outputs.h: EngineFinish."""
_REFUSED_AT_THE_END = "Server shutting down"
"""What an engine core that was told to end answers to calls."""


class Endpoints:
    """The sockets at which an engine core finds us, in a folder that only we may enter."""

    def __init__(self) -> None:
        self._folder = PrivateFolder("core")
        self._context = zmq.Context()
        self._handshake = self._context.socket(zmq.ROUTER)
        self._handshake.setsockopt(zmq.LINGER, 0)
        self._handshake.bind(self.address("handshake"))
        # vLLM's ends are a DEALER for what it is asked and a PUSH for what it answers.
        self._listeners = {
            "input": Listener(self._folder.path / "input", "ROUTER", "DEALER"),
            "output": Listener(self._folder.path / "output", "PULL", "PUSH"),
        }
        self._connections: dict[str, Connection] = {}

    def address(self, name: str) -> str:
        return f"ipc://{self._folder.path}/{name}"

    @property
    def input(self) -> Connection:
        """What the engine core is asked through; after shake_hands()."""
        return self._connections["input"]

    @property
    def output(self) -> Connection:
        """What the engine core answers through; after shake_hands()."""
        return self._connections["output"]

    def shake_hands(self, process: BaseProcess) -> dict[str, Any]:
        """Wait until the engine has started; gives its EngineCoreReadyResponse.

        Blocks. Raises EngineDied if its process ends before, or is no engine core.
        """
        ready: dict[str, Any] | None = None
        is_started = False
        while ready is None or not is_started or not self._is_connected():
            events = self._wait(process)
            for name, listener in self._listeners.items():
                if listener in events:
                    self._connections[name] = listener.accept()
            try:
                for connection in self._connections.values():
                    if connection in events:
                        connection.fill()
                message = self.input.take() if ready is None and "input" in self._connections else None
            except ConnectionError as error:
                raise EngineDied(f"the engine did not start: {error}") from None
            if message is not None:
                ready = msgspec.msgpack.decode(message[0])
            if self._handshake in events:
                identity, payload = self._handshake.recv_multipart()
                if msgspec.msgpack.decode(payload)["status"] == "HELLO":
                    self._handshake.send_multipart([identity, wire.encode(self._metadata())])
                else:
                    is_started = True
            if process.sentinel in events:
                raise EngineDied(f"the engine did not start: its process ended with code {process.exitcode}")
        return ready

    def _wait(self, process: BaseProcess) -> set[Any]:
        """Give who has something to say."""
        poller = zmq.Poller()
        poller.register(self._handshake, zmq.POLLIN)
        poller.register(process.sentinel, zmq.POLLIN)
        waiting: dict[int, Any] = {}
        for name, listener in self._listeners.items():
            end = self._connections.get(name, listener)
            waiting[end.fileno()] = end
            poller.register(end.fileno(), zmq.POLLIN)
        return {waiting.get(found, found) for found, _ in poller.poll()}

    def _is_connected(self) -> bool:
        return len(self._connections) == len(self._listeners) and all(
            connection.is_ready for connection in self._connections.values()
        )

    def _metadata(self) -> dict[str, Any]:
        """Give vLLM's EngineHandshakeMetadata."""
        addresses = {
            "inputs": [self.address("input")], "outputs": [self.address("output")], "coordinator_input": None,
            "coordinator_output": None, "frontend_stats_publish_address": None,
        }  # fmt: skip
        return {"addresses": addresses, "parallel_config": {}}

    def close(self) -> None:
        """Close the sockets; idempotent."""
        for listener in self._listeners.values():
            listener.close()
        for connection in self._connections.values():
            connection.close()
        self._context.destroy(linger=0)
        self._folder.remove()


class _Request:
    """A request in the engine. keys: of its outputs, as the engine core's rows carry them."""

    __slots__ = ("bad_text", "keys", "request", "run")

    def __init__(
        self, request: EngineRequest, run: Run, keys: range, bad_text: BadTextSettings | None
    ) -> None:
        self.request = request
        self.bad_text = bad_text
        self.run = run
        self.keys = keys

    def engine_id(self, key: int) -> str:
        return f"{self.request.request_id}-{key:x}"


class CoreLink:
    """Implements Link. facts: with what is known since the start."""

    def __init__(
        self,
        endpoints: Endpoints,
        facts: Facts,
        tokenizer: HfTokenizer,
        stats: LoadReader,
    ) -> None:
        self._endpoints = endpoints
        self._params = CoreParams(facts)
        self._tokenizer = tokenizer
        self._stats = stats
        self._reader = _core.CoreReader(endpoints.output.fileno(), endpoints.output.detach())
        self._requests: dict[str, _Request] = {}
        self._by_key: dict[int, _Request] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_key = 1
        self._call_numbers = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_death: Callable[[str], None] | None = None
        self._is_dead = False
        self._is_broken = False
        self._outbox: list[tuple[bytes, bytes]] = []
        self._is_behind = False
        self._is_reading = False

    def watch(self, loop: asyncio.AbstractEventLoop, on_death: Callable[[str], None]) -> None:
        self._loop, self._on_death = loop, on_death
        loop.add_reader(self._reader.fileno(), self._on_news)
        if self._tokenizer.vocabulary.is_native:
            self._reader.start()
        else:
            loop.add_reader(self._endpoints.output.fileno(), self._on_readable)
            # What was read already is not announced again.
            self._on_readable()

    def submit(
        self,
        request: EngineRequest,
        run: Run,
        adapter: Adapter | None,
        *,
        native: bool,
        bad_text: BadTextSettings | None,
    ) -> None:
        if self._loop is None:
            raise EngineDied("the engine is not running")
        keys = range(self._next_key, self._next_key + request.sampling.n)
        self._next_key = keys.stop
        entry = _Request(request, run, keys, bad_text)
        self._send_request(entry, adapter, native=native)
        self._requests[request.request_id] = entry

    def _send_request(self, entry: _Request, adapter: Adapter | None, *, native: bool) -> None:
        request, run = entry.request, entry.run
        sampling = request.sampling
        for index, key in enumerate(entry.keys):
            params = self._params.of(
                sampling, index, native=native, grammar=request.grammar, bad_text=entry.bad_text
            )
            message = wire.add_request(
                entry.engine_id(key), request.request_id, request.prompt_token_ids, params,
                adapter=adapter, cache_salt=request.cache_salt, priority=-request.priority,
            )  # fmt: skip
            self._send(wire.ADD, message)
            self._reader.open(
                key, run.outlet, run.key + index, num_logprobs=sampling.logprobs or 0,
                num_prompt_logprobs=sampling.prompt_logprobs or 0, first=entry.keys.start if index else 0,
            )  # fmt: skip
            self._by_key[key] = entry

    def cancel(self, request_id: str, output_index: int | None = None) -> None:
        entry = self._requests.get(request_id)
        if entry is None:
            return
        keys: Sequence[int] = entry.keys
        if output_index is None:
            del self._requests[request_id]
            for key in keys:
                self._by_key.pop(key, None)
        else:
            keys = (entry.keys[output_index],)
        running = [entry.engine_id(key) for key in keys if self._reader.close(key)]
        if running and self._loop is not None and not self._is_dead:
            # If it is gone, its death is noticed elsewhere, and there is nothing to stop.
            with contextlib.suppress(EngineDied):
                self._send(wire.ABORT, wire.encode(running))

    async def call(self, method: str, *arguments: Any) -> Any:
        assert self._loop is not None
        number = next(self._call_numbers)
        future = self._calls[number] = self._loop.create_future()
        try:
            self._send(wire.UTILITY, wire.encode((0, number, method, arguments)))
            return await future
        finally:
            del self._calls[number]

    async def add_adapter(self, adapter: Adapter) -> None:
        await self.call("add_lora", wire.adapter_fields(adapter))

    async def reset_prefix_cache(self) -> bool:
        return bool(await self.call("reset_prefix_cache", False, False))

    async def embed(
        self, request_id: str, prompt_token_ids: Sequence[int], dimensions: int | None
    ) -> Sequence[float]:
        raise Unsupported("embed")

    def shutdown(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            closed = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
            closed.result()
        else:
            self._reader.stop()
            self._endpoints.close()

    async def _close(self) -> None:
        """Close the sockets where they are read."""
        assert self._loop is not None
        self._loop.remove_reader(self._reader.fileno())
        self._loop.remove_reader(self._endpoints.output.fileno())
        self._loop.remove_writer(self._endpoints.input.fileno())
        self._loop = None
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDied("the engine was stopped"))
        self._reader.stop()
        self._endpoints.close()

    def _send(self, kind: bytes, payload: bytes) -> None:
        """Send with what else comes in this turn of the loop, in one system call."""
        if self._loop is None:
            raise EngineDied("the engine is not running")
        if self._is_broken:
            raise EngineDied("the engine does not take messages")
        if not self._outbox:
            self._loop.call_soon(self.flush)
        self._outbox.append((kind, payload))

    def flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if self._loop is None or not outbox:
            return
        try:
            self._endpoints.input.send(outbox)
        except ConnectionError as error:
            self._break(error)
        else:
            self._follow_unsent()

    def _on_writable(self) -> None:
        try:
            self._endpoints.input.flush()
        except ConnectionError as error:
            self._break(error)
        self._follow_unsent()

    def _follow_unsent(self) -> None:
        """Wait for room in the socket while something is left for it."""
        connection = self._endpoints.input
        is_behind = connection.has_unsent and not self._is_broken
        if self._loop is None or is_behind == self._is_behind:
            return
        self._is_behind = is_behind
        if is_behind:
            self._loop.add_writer(connection.fileno(), self._on_writable)
        else:
            self._loop.remove_writer(connection.fileno())

    def _break(self, error: ConnectionError) -> None:
        self._is_broken = True
        self._tell_death(f"it does not take messages: {error}")

    def _on_readable(self) -> None:
        """Read where the loop runs, once a turn."""
        if self._loop is not None and not self._is_reading:
            self._is_reading = True
            self._loop.call_soon(self._read_some)

    def _read_some(self) -> None:
        self._is_reading = False
        if self._loop is None or self._is_dead:
            return
        if self._reader.read():
            self._on_readable()
        self._on_news()

    def _on_news(self) -> None:
        """Act on what was read."""
        if self._loop is None:
            return
        outlets, irregular, stats, num_preemptions, utilities, end = self._reader.take()
        # Nobody asked for these: all of its requests end so, and new ones do.
        if any(_FINISHES[finish] == "abort" for _, finish, _ in irregular):
            self._tell_death(TOLD_TO_END)
        try:
            self._deliver(outlets, irregular)
            if stats is not None:
                self._stats.update(*stats)
            self._stats.add_preemptions(num_preemptions)
            for message in utilities:
                self._answer(msgspec.msgpack.decode(message)[4])
        except Exception as error:
            # Whatever it is, streams and callers would wait for ever for what was in it.
            logger.exception("a message of the engine was not delivered")
            end = f"its message was not delivered: {error!r}"
        if end is None:
            return
        self._loop.remove_reader(self._endpoints.output.fileno())
        # A process that has only gone is told of by whoever watches it.
        if end:
            self._tell_death(end)

    def _tell_death(self, reason: str) -> None:
        assert self._on_death is not None
        self._is_dead = True
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDied(f"the engine died: {reason}"))
        self._on_death(reason)

    def _deliver(self, outlets: Sequence[Outlet], irregular: Sequence[tuple[int, int, int]]) -> None:
        """Tell of the rows that were put into pumps, and of those that were not."""
        for key, finish, num_tokens in irregular:
            entry = self._by_key.get(key)
            if entry is not None:
                is_constrained = entry.request.sampling.constraint is not None
                entry.run.fail(
                    failure(_FINISHES[finish], is_constrained=is_constrained, has_new_tokens=num_tokens > 0)
                )
        for outlet in outlets:
            outlet.collect()

    def _answer(self, utility: Sequence[Any]) -> None:
        number, failure, result = utility
        future = self._calls.get(number)
        if future is None or future.done():
            return
        if failure == _REFUSED_AT_THE_END:
            future.set_exception(EngineDied(f"the engine died: {TOLD_TO_END}"))
        elif failure is not None:
            future.set_exception(Exception(failure))
        else:
            # Beside the value stand the names of its types, which plain values do not need.
            future.set_result(result[1])
