"""Our client of vLLM's engine core: its ZeroMQ sockets and msgpack messages, without vLLM in this process.

Requests are encoded here (wire.py); each message that comes is decoded by one native call without the GIL.
Messages are taken on the event loop that watch() names, a bounded number a turn.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from twinjet import _core
from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front import wire
from twinjet.engines.vllm.front.core_stream import CoreStream
from twinjet.engines.vllm.front.grammar_check import GrammarCheck
from twinjet.engines.vllm.front.link import Adapter
from twinjet.engines.vllm.front.params import sampling_fields
from twinjet.errors import EngineDied, Unsupported

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from twinjet.engines.vllm.front.load import LoadReader
    from twinjet.models.tokenizer import HfTokenizer
    from twinjet.request import EngineRequest

logger = logging.getLogger(__name__)

_ENGINE = b"\x00\x00"
"""The identity of the only engine: its rank in two bytes."""

_DEAD = b"ENGINE_CORE_DEAD"
_MESSAGES_A_TURN = 16


class Endpoints:
    """The sockets at which an engine core finds us, in a folder that only we may enter."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="twinjet-"))
        self._context = zmq.Context()
        self.handshake = self._bind(zmq.ROUTER, "handshake")
        self.input = self._bind(zmq.ROUTER, "input")
        self.output = self._bind(zmq.PULL, "output")
        # A message for an engine that is gone raises, instead of being dropped.
        self.input.setsockopt(zmq.ROUTER_MANDATORY, 1)

    def address(self, name: str) -> str:
        return f"ipc://{self._folder}/{name}"

    def _bind(self, kind: int, name: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            socket.setsockopt(option, 0)
        socket.bind(self.address(name))
        return socket

    def shake_hands(self, process: BaseProcess) -> dict[str, Any]:
        """Wait until the engine has started; gives its EngineCoreReadyResponse.

        Blocks. Raises EngineDied if its process ends before.
        """
        poller = zmq.Poller()
        poller.register(self.handshake, zmq.POLLIN)
        poller.register(self.input, zmq.POLLIN)
        poller.register(process.sentinel, zmq.POLLIN)
        ready: dict[str, Any] | None = None
        is_started = False
        while ready is None or not is_started:
            events = dict(poller.poll())
            if self.handshake in events:
                identity, payload = self.handshake.recv_multipart()
                if msgspec.msgpack.decode(payload)["status"] == "HELLO":
                    self.handshake.send_multipart([identity, wire.encode(self._metadata())])
                else:
                    is_started = True
            if self.input in events:
                _, payload = self.input.recv_multipart()
                ready = msgspec.msgpack.decode(payload)
            if process.sentinel in events:
                raise EngineDied(f"the engine did not start: its process ended with code {process.exitcode}")
        return ready

    def _metadata(self) -> dict[str, Any]:
        """Give vLLM's EngineHandshakeMetadata."""
        addresses = {
            "inputs": [self.address("input")], "outputs": [self.address("output")], "coordinator_input": None,
            "coordinator_output": None, "frontend_stats_publish_address": None,
        }  # fmt: skip
        return {"addresses": addresses, "parallel_config": {}}

    def close(self) -> None:
        """Close the sockets; idempotent."""
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)


class CoreLink:
    """Implements Link. facts: with what is known since the start."""

    def __init__(
        self,
        endpoints: Endpoints,
        facts: Facts,
        tokenizer: HfTokenizer,
        stats: LoadReader,
        grammar_check: GrammarCheck,
    ) -> None:
        self._endpoints = endpoints
        self._facts = facts
        self._tokenizer = tokenizer
        self._stats = stats
        self._grammar_check = grammar_check
        self._outputs = _core.CoreOutputs()
        self._streams: dict[int, CoreStream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._keys = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_death: Callable[[str], None] | None = None

    def watch(self, loop: asyncio.AbstractEventLoop, on_death: Callable[[str], None]) -> None:
        self._loop, self._on_death = loop, on_death
        loop.add_reader(self._endpoints.output.fileno(), self._on_readable)
        # What came before is not announced again.
        loop.call_soon(self._on_readable)

    async def submit(
        self, request: EngineRequest, output_index: int, adapter: Adapter | None, *, native: bool
    ) -> CoreStream:
        fields = sampling_fields(request.sampling, output_index, native=native)
        if fields["structured_outputs"] is not None:
            assert request.sampling.constraint is not None
            fields["structured_outputs"] = await self._grammar_check.check(
                request.sampling.constraint, fields["structured_outputs"]
            )
        params = wire.core_params(fields, self._facts, self._tokenizer, native=native)
        key = next(self._keys)
        stream = CoreStream(key, f"{request.request_id}-{key:x}", request.sampling, output_index)
        message = wire.add_request(
            stream.request_id, request.request_id, request.prompt_token_ids, params,
            adapter=adapter, cache_salt=request.cache_salt, priority=-request.priority,
        )  # fmt: skip
        self._send(wire.ADD, message)
        self._streams[key] = stream
        return stream

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(int(request_id.rpartition("-")[2], 16), None)
        self._send(wire.ABORT, wire.encode(request_ids))

    async def call(self, method: str, *arguments: Any) -> Any:
        assert self._loop is not None
        number = next(self._keys)
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
            self._endpoints.close()
        self._grammar_check.stop()

    async def _close(self) -> None:
        """Close the sockets where they are read."""
        assert self._loop is not None
        self._loop.remove_reader(self._endpoints.output.fileno())
        self._loop = None
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDied("the engine was stopped"))
        self._endpoints.close()

    def _send(self, kind: bytes, payload: bytes) -> None:
        if self._loop is None:
            raise EngineDied("the engine is not running")
        try:
            self._endpoints.input.send_multipart([_ENGINE, kind, payload], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDied(f"the engine does not take messages: {error}") from error

    def _on_readable(self) -> None:
        if self._loop is None:
            return
        for _ in range(_MESSAGES_A_TURN):
            try:
                frames = self._endpoints.output.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if frames == [_DEAD]:
                self._tell_death("its engine core failed (EngineDeadError); its log says why")
                return
            try:
                self._outputs.decode(frames)
                self._take(frames[0])
            except _core.WireError as error:
                self._tell_death(f"it sent a message that cannot be read: {error}")
                return
            except Exception as error:
                # Whatever it is, streams would wait for ever for what was in the message.
                logger.exception("a message of the engine was not delivered")
                self._tell_death(f"its message was not delivered: {error!r}")
                return
        # The socket announces only what is new, so what is left is fetched after others had their turn.
        self._loop.call_soon(self._on_readable)

    def _tell_death(self, reason: str) -> None:
        assert self._on_death is not None
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDied(f"the engine died: {reason}"))
        self._on_death(reason)

    def _take(self, frame: bytes) -> None:
        outputs, streams = self._outputs, self._streams
        for key, token_ids, rest in outputs.rows():
            stream = streams.get(key)
            if stream is not None and stream.take(token_ids, rest):
                del streams[key]
        if outputs.stats is not None:
            self._stats.update(*outputs.stats)
        self._stats.add_preemptions(outputs.num_preemptions)
        if outputs.has_utility:
            self._answer(msgspec.msgpack.decode(frame)[4])

    def _answer(self, utility: Sequence[Any]) -> None:
        number, failure, result = utility
        future = self._calls.get(number)
        if future is None or future.done():
            return
        if failure is not None:
            future.set_exception(Exception(failure))
        else:
            # Beside the value stand the names of its types, which plain values do not need.
            future.set_result(result[1])
