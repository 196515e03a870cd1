"""Requests, engine descriptions and a small in-memory engine for tests of the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import MappingProxyType

from twinjet.engines.base import (
    Component,
    EngineEvent,
    EngineInfo,
    EngineLoad,
    Finish,
    KvCache,
    Limits,
    OutputEvent,
    PromptEvent,
)
from twinjet.errors import RequestAborted
from twinjet.request import EngineRequest, Sampling, SamplingOverrides


def sampling(max_tokens: int = 8, *, n: int = 1, ignore_eos: bool = False) -> Sampling:
    return Sampling(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        logit_bias=MappingProxyType({}),
        seed=0,
        n=n,
        max_tokens=max_tokens,
        min_tokens=0,
        stop=(),
        stop_token_ids=(),
        include_stop=False,
        ignore_eos=ignore_eos,
        bad_words=(),
        allowed_token_ids=(),
        logprobs=None,
        prompt_logprobs=None,
        skip_special_tokens=True,
        constraint=None,
    )


def make_request(
    request_id: str,
    *,
    prompt: int | tuple[int, ...] = 4,
    max_tokens: int = 8,
    n: int = 1,
    tenant: str = "",
    client: str = "",
    priority: int = 0,
    deadline: float | None = None,
    ignore_eos: bool = False,
    cache_salt: str = "",
) -> EngineRequest:
    """prompt: token ids, or how many; then ids that no other request has."""
    if isinstance(prompt, int):
        first = hash(request_id) % 1_000_000_000
        prompt = tuple(range(first, first + prompt))
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=sampling(max_tokens, n=n, ignore_eos=ignore_eos),
        tenant=tenant,
        client_address=client,
        priority=priority,
        deadline=deadline,
        cache_salt=cache_salt,
    )


def make_info(
    *, max_num_seqs: int = 4, num_blocks: int | None = None, block_size: int = 16, prefix_cache: bool = True
) -> EngineInfo:
    return EngineInfo(
        name="fake",
        version="0",
        device="cpu",
        source="memory",
        limits=Limits(131072, 2**31 - 1, 64, 20, max_num_seqs),
        capabilities=frozenset({"generate", "prefix_cache"} if prefix_cache else {"generate"}),
        default_sampling=SamplingOverrides(),
        eos_token_ids=(0,),
        sampler=Component("engine"),
        block_manager=Component("engine"),
        kv_cache=None if num_blocks is None else KvCache(num_blocks, block_size),
    )


class StepEngine:
    """Gives each running request one token each time step() is called, as many as its max_tokens.

    Records what a test wants to know: started ids in order, aborted ids, and those running.
    """

    def __init__(self) -> None:
        self.started: list[str] = []
        self.aborted: list[str] = []
        self.running: dict[str, asyncio.Queue[bool]] = {}
        self.failure: Exception | None = None
        self.tokenizer = None

    async def start(self, report: object) -> None:
        return None

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineEvent]:
        key = request.request_id
        self.started.append(key)
        steps: asyncio.Queue[bool] = asyncio.Queue()
        self.running[key] = steps
        finished = False
        try:
            yield PromptEvent(0)
            for i in range(request.sampling.max_tokens):
                if not await steps.get():
                    raise RequestAborted(key)
                if self.failure is not None:
                    raise self.failure
                last = i == request.sampling.max_tokens - 1
                for index in range(request.sampling.n):
                    yield OutputEvent(index, "x", (1000 + i,), finish=Finish("length") if last else None)
            finished = True
        finally:
            del self.running[key]
            if not finished:
                self.aborted.append(key)

    async def step(self, count: int = 1) -> None:
        """Advance every running request and let the streams take what came."""
        for _ in range(count):
            for steps in list(self.running.values()):
                steps.put_nowait(True)
            await settle()

    async def abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.running[request_id].put_nowait(False)

    async def load(self) -> EngineLoad:
        return EngineLoad(running=len(self.running))

    def describe(self) -> EngineInfo:
        return make_info()

    async def wait_dead(self) -> str:
        return await asyncio.get_running_loop().create_future()

    async def stop(self) -> None:
        return None


async def settle() -> None:
    """Let every callback that is ready run, and those that they make ready."""
    for _ in range(20):
        await asyncio.sleep(0)
