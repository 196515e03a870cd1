"""Replicas that die and that are restarted, behind Envoy: what is touched, and what is not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from tests.scale_out.conftest import StartEnvoy
from tests.scale_out.replicas import Replica, replicas
from twinjet.v1 import generation_pb2, service_pb2_grpc

NUM_STREAMS = 200


class Stream:
    """One stream: which replica took it, the tokens it got, and what it failed with."""

    def __init__(self, stub: Any, num_tokens: int) -> None:
        self.replica = ""
        self.num_tokens = 0
        self.is_whole = False
        self.error: grpc.aio.AioRpcError | None = None
        self._call = stub.Generate(
            generation_pb2.GenerateRequest(text="x", sampling={"max_tokens": num_tokens, "ignore_eos": True})
        )

    async def run(self) -> Stream:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self.replica = message.started.deployment or self.replica
                self.num_tokens += len(message.delta.token_ids)
                self.is_whole = message.HasField("summary")
        except grpc.aio.AioRpcError as error:
            self.error = error
        return self


async def test_a_killed_replica_takes_its_own_streams_with_it_and_gets_no_more(
    envoy: StartEnvoy, tmp_path: Path
) -> None:
    async with replicas(tmp_path, 4, "step_s = 0.05, max_num_seqs = 128") as servers:
        proxy = await envoy([s.address for s in servers])
        async with proxy.channel() as channel:
            stub = service_pb2_grpc.InferenceServiceStub(channel)
            streams = [Stream(stub, 150) for _ in range(NUM_STREAMS)]
            tasks = [asyncio.create_task(stream.run()) for stream in streams]
            await _until(lambda: all(stream.num_tokens for stream in streams))
            at = Counter(stream.replica for stream in streams)
            assert len(at) == 4 and min(at.values()) > NUM_STREAMS // 8

            servers[1].kill()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            tried = proxy.requests()[servers[1].address]
            later = await asyncio.gather(*(Stream(stub, 1).run() for _ in range(100)))
            assert [s.error for s in later if s.error] == []
            assert "r1" not in {s.replica for s in later}
            still = proxy.requests()[servers[1].address]
            for counter in ("rq_total", "cx_connect_fail", "cx_total"):
                assert still[counter] == tried[counter], counter

            await asyncio.gather(*tasks)
        failed = [stream for stream in streams if stream.error is not None]
        assert {stream.replica for stream in failed} == {"r1"}
        assert len(failed) == at["r1"]
        # The headers are out, so Envoy can only break the stream; INTERNAL is what gRPC makes of that.
        assert {s.error.code() for s in failed if s.error} <= {
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNAVAILABLE,
        }
        assert all(s.is_whole and s.num_tokens == 150 for s in streams if s.error is None)

        await servers[1].start()
        await proxy.until_healthy(4)
        async with proxy.channel() as channel:
            stub = service_pb2_grpc.InferenceServiceStub(channel)
            back = [await Stream(stub, 1).run() for _ in range(40)]
        assert "r1" in {s.replica for s in back}
        assert not any(s.error for s in back)


async def test_a_rolling_restart_under_load_fails_no_request(envoy: StartEnvoy, tmp_path: Path) -> None:
    async with replicas(tmp_path, 3, "step_s = 0.01, max_num_seqs = 128") as servers:
        proxy = await envoy([s.address for s in servers])
        done: list[Stream] = []
        stop = asyncio.Event()
        async with proxy.channel() as channel:
            stub = service_pb2_grpc.InferenceServiceStub(channel)

            async def caller() -> None:
                while not stop.is_set():
                    done.append(await Stream(stub, 20).run())

            callers = [asyncio.create_task(caller()) for _ in range(16)]
            for server in servers:
                await _restart(server)
                await proxy.until_healthy(3)
                await _until(_is_back(server, done))
            stop.set()
            await asyncio.gather(*callers)
        assert [s.error for s in done if s.error] == []
        assert all(s.is_whole for s in done)
        assert len(done) > 100


def _is_back(server: Replica, done: list[Stream]) -> Callable[[], bool]:
    before = len(done)
    return lambda: server.name in {stream.replica for stream in done[before:]}


async def _restart(server: Replica) -> None:
    await server.drain_and_stop()
    await server.start()


async def _until(condition: Any, timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)
