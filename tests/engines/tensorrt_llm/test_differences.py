"""Where TensorRT-LLM is not what its documentation or an earlier reading says: one test or more a difference.

Each runs on the stand-in of both versions, with the behaviour in question turned on where a version leaves it open.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.engines.factories import double_installed, make_request
from tests.engines.tensorrt_llm.stand_in import LoopLag, behave, core, deltas, started
from tests.engines.test_contract import collect
from twinjet.engines.base import Finish, KvRemoved, KvStored
from twinjet.engines.tensorrt_llm.front.engine import TrtLlmEngine
from twinjet.errors import EngineDied, RequestFailed, TwinjetError, Unsupported

LOOP_LIMIT_S = 0.05
IMPATIENT = {"no_progress_s": 30.0, "probe_timeout_s": 0.5, "idle_probe_s": 0, "shutdown_timeout_s": 0.3}


async def outcome_of(engine: Any, request_id: str, **sampling: Any) -> Any:
    """Give the outcome, or the error, also where the request is refused before it begins."""
    try:
        return await collect(engine, make_request(engine, request_id=request_id, **sampling))
    except TwinjetError as error:
        return error


# ---- D1 ----


async def test_d1_prompt_logprobs_harm_nobody_else(version: str) -> None:
    async with started() as engine:
        others = [outcome_of(engine, f"other{i}", seed=i, max_tokens=8, ignore_eos=True) for i in range(6)]
        asking = outcome_of(engine, "asking", prompt_logprobs=2, max_tokens=8)
        refused, *outcomes = await asyncio.gather(asking, *others)
        assert [len(o.tokens[0]) for o in outcomes] == [8] * 6
        assert isinstance(refused, Unsupported)
        assert refused.capability == "prompt_logprobs"
        assert "prompt_logprobs" not in engine.describe().capabilities
        assert engine.describe().sampler.counters.get("faults", 0) == 0


async def test_d1_prompt_logprobs_are_exact_or_refused_without_the_hook(version: str) -> None:
    async with started(native_sampler=False) as engine:
        text = "a prompt of more than one block " * 3
        for request_id in ("first", "second"):
            outcome = await outcome_of(engine, request_id, prompt=text, prompt_logprobs=2, max_tokens=4)
            if version == "1.2":
                assert isinstance(outcome, Unsupported)
                continue
            prompt = make_request(engine, text).prompt_token_ids
            assert [e.chosen.token_id for e in outcome.prompt.logprobs] == list(prompt[1:])
            best = [int(core().toy_logits(prompt[: i + 1]).argmax()) for i in range(len(prompt) - 1)]
            assert [e.top[0].token_id for e in outcome.prompt.logprobs] == best


async def test_d1_prompt_logprobs_that_spoil_other_prompts_are_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, prompt_logprobs_top_only=False, context_rows_miscounted=True)
    async with started(native_sampler=False) as engine:
        assert "prompt_logprobs" not in engine.describe().capabilities


# ---- D2 ----


async def test_d2_nothing_blocks_the_loop(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(monkeypatch, iterators_block=True)
    async with started({"kv_cache_config": {"event_buffer_max_size": 256}}) as engine:
        lag = LoopLag()
        with lag.measuring():
            await collect(engine, make_request(engine, "x" * 100, max_tokens=200, ignore_eos=True))
            stalled = asyncio.create_task(collect(engine, make_request(engine, "!stall", "stalled")))
            # Longer than an iterator waits for more: it is opened again while the engine has nothing to give.
            await asyncio.sleep(3.0)
            await engine.abort("stalled")
            await asyncio.gather(stalled, return_exceptions=True)
            await collect(engine, make_request(engine, max_tokens=50, ignore_eos=True))
            await asyncio.sleep(1.0)
        # An iterator's wait is 2 s, and comes again and again.
        assert lag.second_s < LOOP_LIMIT_S
        assert lag.longest_s < 1
        assert engine._stats.num_rows > 200, "and they are read"


async def test_d2_events_of_an_iterator_that_blocks_arrive(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, iterators_block=True)
    async with started({"kv_cache_config": {"event_buffer_max_size": 256}}) as engine:
        events = deltas(engine)
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await collect(engine, make_request(engine, "y" * 100))
        async with asyncio.timeout(10):
            assert isinstance((await first)[0], KvStored)
        await events.aclose()


# ---- D3 ----


async def test_d3_ignore_eos_ignores_every_end(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    behave(monkeypatch, setup_adds_eos=True)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 258, "max_position_embeddings": 4096}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 97]}))
    for native in (True, False):
        engine = TrtLlmEngine("several", str(tmp_path), {}, native_sampler=native)
        try:
            await engine.start(lambda _: None)
            often = {"logit_bias": {97: 100.0}, "max_tokens": 12}
            ignored = await collect(engine, make_request(engine, ignore_eos=True, **often))
            assert ignored.finish[0] == Finish("length")
            assert ignored.tokens[0] == [97] * 12
            heeded = await collect(engine, make_request(engine, **often))
            assert heeded.finish[0] == Finish("stop", 97, is_eos=True)
        finally:
            await engine.stop()


# ---- D4, D5, D6, D7: what the engine's own sampler honours is found by trying ----


async def test_d4_bad_words_are_refused_where_the_engines_sampler_draws(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ignores them, or bans token sequences, which are some of the ways to make a string."""
    for ignored in (True, False):
        behave(monkeypatch, bad_words_ignored=ignored)
        async with started(native_sampler=False) as engine:
            outcome = await outcome_of(engine, "one", bad_words=("a",), ignore_eos=True, max_tokens=12)
            assert isinstance(outcome, Unsupported)
            assert "bad_words" not in engine.describe().capabilities


async def test_d5_min_tokens_hold_or_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for miscounts in (True, False):
        behave(monkeypatch, min_tokens_counts_prompt=miscounts)
        async with started(native_sampler=False) as engine:
            sampling = {"min_tokens": 5, "logit_bias": {256: 100.0}, "max_tokens": 9}
            outcome = await outcome_of(engine, "r", **sampling)
            if miscounts:
                assert isinstance(outcome, Unsupported)
            else:
                assert outcome.tokens[0].index(256) == 5
                # The engine holds back its end token alone, the contract every token that ends the output.
                assert isinstance(
                    await outcome_of(engine, "s", stop_token_ids=(97,), **sampling), Unsupported
                )


async def test_d6_penalties_work_or_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for ignored in (True, False):
        behave(monkeypatch, penalties_ignored=ignored)
        async with started(native_sampler=False) as engine:
            outcome = await outcome_of(
                engine, "r", repetition_penalty=50.0, temperature=0.0, max_tokens=16, ignore_eos=True
            )
            if ignored:
                assert isinstance(outcome, Unsupported)
            else:
                assert len(set(outcome.tokens[0])) == 16


async def test_d7_logprobs_name_the_drawn_token_or_are_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for top_only in (True, False):
        behave(monkeypatch, logprobs_top_only=top_only)
        async with started(native_sampler=False) as engine:
            outcome = await outcome_of(
                engine, "r", logprobs=1, max_tokens=30, temperature=1.8, ignore_eos=True
            )
            if top_only:
                assert isinstance(outcome, Unsupported)
            else:
                assert [e.chosen.token_id for e in outcome.logprobs[0]] == outcome.tokens[0]


async def test_d7_logprobs_are_refused_on_a_prebuilt_engine(version: str, tmp_path: Path) -> None:
    (tmp_path / "rank0.engine").write_bytes(b"")
    (tmp_path / "config.json").write_text(
        '{"pretrained_config": {"vocab_size": 258}, "build_config": {"max_seq_len": 512, "max_batch_size": 8}}'
    )
    engine = TrtLlmEngine("built", str(tmp_path), {})
    try:
        await engine.start(lambda _: None)
        outcome = await outcome_of(engine, "r", logprobs=1, stop=("a",), logit_bias={97: 50.0}, max_tokens=9)
        assert isinstance(outcome, Unsupported)
        assert (await collect(engine, make_request(engine, max_tokens=3))).finish, "and the engine lives"
    finally:
        await engine.stop()


# ---- D8, D9, D12: death ----


@pytest.mark.parametrize("recorded", ["1.2", "1.3"])
async def test_d8_an_engine_dead_error_is_a_death_at_once(recorded: str) -> None:
    with double_installed(recorded, "engine_dead_error=on"), pytest.MonkeyPatch.context() as patch:
        # The other signs of a death are taken away: the error alone must do.
        patch.setattr(core().LLM, "_check_health", lambda self: True, raising=False)
        async with started({"twinjet": IMPATIENT}) as engine:
            from tensorrt_llm.executor.utils import EngineDeadError

            waiting = [
                asyncio.create_task(collect(engine, make_request(engine, "!stall", f"w{i}")))
                for i in range(3)
            ]
            while len(engine._handle.llm._active) < 3:
                await asyncio.sleep(0)
            for request in list(engine._handle.llm._active):
                request.result._queue.put_nowait(EngineDeadError(RuntimeError("a worker is gone")))
            for task in waiting:
                with pytest.raises(EngineDied, match="a worker is gone"):
                    await task
            assert engine._watchdog.num_probes == 0, "nobody had to ask"
            assert "a worker is gone" in await engine.wait_dead()


async def test_d9_a_lost_worker_is_a_death_and_nothing_is_joined_on_the_loop(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, background_error_joins=True, engine_dead_error=False)
    lag = LoopLag()
    async with started({"twinjet": IMPATIENT}) as engine:
        executor = engine._handle.llm._executor
        with lag.measuring():
            other = asyncio.create_task(collect(engine, make_request(engine, "!stall", "other")))
            with pytest.raises(EngineDied):
                await collect(engine, make_request(engine, "!lose:3", "bad"))
            with pytest.raises(EngineDied):
                await other
            assert await engine.wait_dead()
            await engine.stop()
        assert threading.get_ident() not in executor.joined_in
        assert lag.longest_s < 0.2
        executor.workers_gone.set()


async def test_d9_a_lost_worker_is_seen_before_a_submission(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, background_error_joins=True, engine_dead_error=False)
    async with started({"twinjet": IMPATIENT}) as engine:
        executor = engine._handle.llm._executor
        executor.workers_gone.clear()
        executor._error_queue.put(RuntimeError("rank 1 is gone"))
        with pytest.raises(EngineDied, match="rank 1 is gone"):
            await collect(engine, make_request(engine))
        assert "rank 1 is gone" in await engine.wait_dead()
        assert threading.get_ident() not in executor.joined_in
        executor.workers_gone.set()


async def test_d12_requests_that_fail_one_after_another_lead_to_a_death(version: str) -> None:
    async with started({"twinjet": IMPATIENT}) as engine:
        with pytest.raises(RequestFailed):
            await collect(engine, make_request(engine, "!cuda:3", "first"))
        errors = [await outcome_of(engine, f"r{i}") for i in range(4)]
        assert any(isinstance(error, EngineDied) for error in errors)
        async with asyncio.timeout(5):
            assert "illegal memory access" in await engine.wait_dead()


async def test_d12_one_bad_request_among_good_ones_is_no_death(version: str) -> None:
    async with started({"twinjet": IMPATIENT}) as engine:
        for i in range(6):
            with pytest.raises(RequestFailed):
                await collect(engine, make_request(engine, "!fail", f"bad{i}"))
        assert (await collect(engine, make_request(engine))).finish
        assert engine._watchdog.num_probes <= 3


# ---- D10, D11: the cache ----


async def test_d10_blocks_in_host_memory_are_not_the_gpus(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, host_blocks_counted=True)
    cache = {"host_cache_size": 64 << 20, "tokens_per_block": 32}
    async with started({"kv_cache_config": {**cache, "max_tokens": 2048}}) as engine:
        kv_cache = engine.describe().kv_cache
        assert kv_cache is not None
        assert kv_cache.num_blocks == 64
    async with started({"kv_cache_config": cache}) as engine:
        kv_cache = engine.describe().kv_cache
        if version == "1.2":
            assert kv_cache is None, "not known is better than wrong"
        else:
            assert kv_cache is not None
            assert kv_cache.num_blocks == 2048
    async with started({"kv_cache_config": {**cache, "event_buffer_max_size": 64}}) as engine:
        async with asyncio.timeout(10):
            while engine.describe().kv_cache is None:
                await asyncio.sleep(0.01)
        assert engine.describe().kv_cache.num_blocks == 2048, "the events tell it apart"


async def test_d11_hashes_may_be_strings(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(monkeypatch, string_hashes=True)
    async with started({"kv_cache_config": {"event_buffer_max_size": 64}}) as engine:
        events = deltas(engine)
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await collect(engine, make_request(engine, "y" * 100))
        async with asyncio.timeout(10):
            one, two = (await first)[0], (await anext(events))[0]
        assert len(one.block_hashes[0]) == 32
        assert two.parent_hash == one.block_hashes[0]
        await events.aclose()


async def test_d11_several_windows_and_ranks_are_one_cache(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core().LLM, "attention_windows", (128, 4096))
    monkeypatch.setattr(core().LLM, "num_dp_ranks", 2)
    async with started({"kv_cache_config": {"event_buffer_max_size": 64}}) as engine:
        seen: list[Any] = []

        async def read_until(last_token: int) -> None:
            async for batch in events:
                seen.extend(batch)
                if isinstance(batch[-1], KvStored) and batch[-1].token_ids[-1] == last_token:
                    return

        events = deltas(engine)
        reading = asyncio.create_task(read_until(ord("w")))
        await asyncio.sleep(0)
        await collect(engine, make_request(engine, "z" * 40))
        llm = engine._handle.llm
        key = next(key for key in llm._prefixes if key[2][-1] == ord("z"))
        for rank in (0, 1):
            llm._event_log.stored(None, key, key[2], rank)
        llm._event_log.removed(key, 0, window=128)
        llm._event_log.removed(key, 0)
        llm._event_log.removed(key, 1)
        await collect(engine, make_request(engine, "w" * 40, "later"))
        async with asyncio.timeout(20):
            await reading
        stored = [e for e in seen if isinstance(e, KvStored) and e.token_ids[-1] == ord("z")]
        assert len(stored) == 1, "stored once, whatever windows and ranks"
        removed = [e for e in seen if isinstance(e, KvRemoved)]
        assert [list(e.block_hashes) for e in removed] == [list(stored[0].block_hashes)], (
            "gone once, when the last rank has dropped it"
        )
        await events.aclose()


# ---- D13 ----


@pytest.mark.parametrize("policy", ["FCFS", "PRIORITY"])
async def test_d13_priority_goes_to_the_engine_only_where_it_counts(
    version: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"scheduler_config": {"waiting_queue_policy": policy}} if version == "1.3" else {}
    async with started(options) as engine:
        seen: list[dict[str, Any]] = []
        real = engine._handle.llm.generate_async
        monkeypatch.setattr(
            engine._handle.llm, "generate_async", lambda *a, **k: seen.append(k) or real(*a, **k)
        )
        await collect(engine, make_request(engine, priority=50))
        assert seen[0].get("priority") == (0.75 if (version, policy) == ("1.3", "PRIORITY") else None)
