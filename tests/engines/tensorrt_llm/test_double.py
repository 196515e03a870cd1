"""The stand-in keeps the recorded contract: what it must refuse, and the habits an adapter must survive."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import threading
import time
from typing import Any, ClassVar

import pytest

from tests.engines.factories import MODEL
from twinjet.engines.tensorrt_llm import surface

CONTRACT = surface.load_contract()


def make_llm(**kwargs: Any) -> Any:
    import tensorrt_llm

    return tensorrt_llm.LLM(model=str(MODEL), **kwargs)


def params(**kwargs: Any) -> Any:
    import tensorrt_llm

    return tensorrt_llm.SamplingParams(**{"temperature": 1.0, "max_tokens": 8, "seed": 3} | kwargs)


def behave(patch: pytest.MonkeyPatch, **behaviours: bool) -> None:
    """Turn recorded behaviours of the installed stand-in on or off."""
    import tensorrt_llm._contract

    for name, value in behaviours.items():
        patch.setitem(tensorrt_llm._contract.BEHAVIOURS, name, value)


def prompt(text: str = "Hello") -> dict[str, list[int]]:
    return {"prompt_token_ids": list(text.encode())}


def test_surface_has_not_drifted_from_the_contract(version: str) -> None:
    assert surface.differences(CONTRACT, version) == []


def test_fields_and_parameters_are_those_recorded(version: str) -> None:
    # Compared without the doctor's code, which could be wrong in the same way as the stand-in's.
    import tensorrt_llm

    expected = [
        f["name"] for f in CONTRACT["classes"]["SamplingParams"]["fields"] if f.get("since", "1.2") <= version
    ]
    assert [f.name for f in dataclasses.fields(tensorrt_llm.SamplingParams)] == expected
    recorded = [p["name"] for p in CONTRACT["functions"]["LLM.generate_async"][version]]
    assert list(inspect.signature(tensorrt_llm.LLM.generate_async).parameters)[1:] == recorded
    assert ("priority" in recorded) == (version == "1.3")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"no_such_argument": 1},
        {"tensor_parallel_size": "two"},
        {"kv_cache_config": {"no_such_field": 1}},
        {"kv_cache_config": {"tokens_per_block": "many"}},
        {"orchestrator_type": 3},
    ],
)
def test_construction_refuses(version: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        make_llm(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"top_k": -1},
        {"temperature": -0.1},
        {"top_p": 1.5},
        {"n": 2, "top_k": 1},
        {"n": 3, "best_of": 2},
        {"max_tokens": "8"},
        {"stop": 5},
        {"no_such_field": 1},
        {"n": True},
    ],
)
def test_sampling_params_refuse(version: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        params(**kwargs)


def test_guides_exclude_each_other(version: str) -> None:
    from tensorrt_llm.llmapi import GuidedDecodingParams

    with pytest.raises(ValueError, match="more than one"):
        GuidedDecodingParams(json="{}", regex="a")


def test_submission_needs_a_running_loop(version: str) -> None:
    with pytest.raises(RuntimeError):
        make_llm().generate_async(prompt(), sampling_params=params())


async def test_submission_refuses_what_is_not_recorded(version: str) -> None:
    llm = make_llm()
    with pytest.raises(TypeError):
        llm.generate_async(prompt(), sampling_params=params(), request_id="mine")
    with pytest.raises(TypeError):
        llm.generate_async(prompt(), sampling_params={"max_tokens": 3})
    with pytest.raises(TypeError):
        llm.generate_async({"prompt_tokens": [1]}, sampling_params=params())
    with pytest.raises(IndexError):
        llm.generate_async({"prompt_token_ids": []}, sampling_params=params())
    if version == "1.2":
        with pytest.raises(TypeError):
            llm.generate_async(prompt(), sampling_params=params(), priority=0.5)
    else:
        with pytest.raises(ValueError, match="priority"):
            llm.generate_async(prompt(), sampling_params=params(), priority=2.0)
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shutting down"):
        llm.generate_async(prompt(), sampling_params=params())


async def test_one_object_is_changed_in_place(version: str) -> None:
    llm = make_llm()
    used = params()
    result = llm.generate_async(prompt(), sampling_params=used, streaming=True)
    assert used.end_id == 256, "submission changes the caller's object"
    lengths = []
    async for step in result:
        assert step is result
        lengths.append(len(step.outputs[0].token_ids))
    assert lengths == list(range(1, 9)), "cumulative"
    assert result.outputs[0].finish_reason == "length"
    llm.shutdown()


async def test_tokens_and_text_shrink_at_a_stop(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(monkeypatch, seed_ignored=False)
    llm = make_llm()
    whole = await llm.generate_async(prompt(), sampling_params=params(max_tokens=20))
    tokens, text = list(whole.outputs[0].token_ids), whole.outputs[0].text
    seen = []
    stop = tokens[9]
    async for step in llm.generate_async(
        prompt(), sampling_params=params(max_tokens=20, stop_token_ids=[stop]), streaming=True
    ):
        seen.append(len(step.outputs[0].token_ids))
    assert seen[-1] == tokens.index(stop), "the stop token is taken away again"
    texts = []
    async for step in llm.generate_async(
        prompt(), sampling_params=params(max_tokens=20, stop=text[5:8]), streaming=True
    ):
        texts.append(step.outputs[0].text)
    assert texts[-1] == text[: text.index(text[5:8])]
    assert len(texts[-2]) > len(texts[-1])
    llm.shutdown()


async def test_diffs_repeat_for_the_output_that_did_not_advance(version: str) -> None:
    llm = make_llm()
    from_diffs: dict[int, list[int]] = {0: [], 1: []}
    result = llm.generate_async(prompt(), sampling_params=params(n=2, detokenize=False), streaming=True)
    async for step in result:
        for output in step.outputs:
            from_diffs[output.index] += output.token_ids_diff
    assert from_diffs[0] != result.outputs[0].token_ids
    llm.shutdown()


async def test_a_stop_string_in_one_output_ends_all(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(monkeypatch, seed_ignored=False)
    llm = make_llm()
    whole = await llm.generate_async(prompt(), sampling_params=params(n=2, max_tokens=30))
    stop = whole.outputs[0].text[4:9]
    result = await llm.generate_async(
        prompt(), sampling_params=params(n=2, max_tokens=30, stop=stop), streaming=True
    )
    assert len(result.outputs[1].token_ids) < 30
    llm.shutdown()


async def test_a_request_error_leaves_the_result_unfinished(version: str) -> None:
    from tensorrt_llm.executor.utils import RequestError

    llm = make_llm()
    result = llm.generate_async(prompt("!fail"), sampling_params=params(), streaming=True)
    with pytest.raises(RequestError):
        await anext(result)
    assert not result.finished
    assert hasattr(result, "error") == (version == "1.3")
    with pytest.raises(AssertionError):
        await anext(result)
    llm.shutdown()


async def test_a_dead_engine_tells_all_who_wait_or_the_first_who_looks(version: str) -> None:
    llm = make_llm()
    other = llm.generate_async(prompt("!stall"), sampling_params=params(), streaming=True)
    dying = llm.generate_async(prompt("!die"), sampling_params=params(), streaming=True)
    if version == "1.3":
        for result in (dying, other):
            with pytest.raises(RuntimeError, match="Engine has died"):
                await anext(result)
        with pytest.raises(RuntimeError, match="Engine has died"):
            llm.generate_async(prompt(), sampling_params=params())
        assert not llm._check_health()
    else:
        async with asyncio.timeout(5):
            while llm._executor._error_queue.empty():
                await asyncio.sleep(0)
        assert not llm._executor.is_shutdown(), "nobody has met the error"
        assert not hasattr(llm, "_check_health")
        with pytest.raises(RuntimeError, match="told to die"):
            await anext(dying)
        assert llm._executor.joined_in == [threading.get_ident()], "the finder has joined the workers"
        assert other._queue.empty(), "the others go on waiting"
    llm.shutdown()


async def test_a_device_that_is_gone_fails_each_request_by_itself(version: str) -> None:
    from tensorrt_llm.executor.utils import RequestError

    llm = make_llm()
    for text in ("!cuda", "Hello"):
        with pytest.raises(RequestError, match="illegal memory access"):
            await llm.generate_async(prompt(text), sampling_params=params())
    assert not llm._executor.is_shutdown()
    llm.shutdown()


async def test_prompt_logprobs_have_an_entry_for_each_token_about_the_next(version: str) -> None:
    llm = make_llm()
    result = await llm.generate_async(prompt("abcd"), sampling_params=params(prompt_logprobs=1, top_k=1))
    entries = result.outputs[0].prompt_logprobs
    assert len(entries) == 4
    assert (ord("b") in entries[0]) == (version == "1.3"), "older ones hold the most probable token only"
    assert result.outputs[0].token_ids[0] in entries[3]
    llm.shutdown()


async def test_prompt_logprobs_give_processors_the_rows_of_others(version: str) -> None:
    llm = make_llm()
    alone = await llm.generate_async(
        prompt("Hello"), sampling_params=params(logits_processor=Only(65), top_k=1)
    )
    asking = llm.generate_async(prompt("abcd"), sampling_params=params(prompt_logprobs=1))
    beside = llm.generate_async(prompt("Hello"), sampling_params=params(logits_processor=Only(65), top_k=1))
    await asyncio.gather(asking.aresult(), beside.aresult())
    assert alone.outputs[0].token_ids[0] == 65
    assert beside.outputs[0].token_ids[0] != 65
    assert beside.outputs[0].token_ids[1] == 65, "the step after it is well"
    llm.shutdown()


async def test_iterators_wait_in_the_callers_thread_where_they_do(version: str) -> None:
    llm = make_llm(enable_iter_perf_stats=True, kv_cache_config={"event_buffer_max_size": 16})
    await llm.generate_async(prompt(), sampling_params=params())
    await llm.generate_async(prompt(), sampling_params=params())
    for open_iterator in (llm.get_stats_async, llm.get_kv_cache_events_async):
        [row async for row in open_iterator(timeout=0.05)]
        began = time.monotonic()
        open_iterator(timeout=0.2)
        assert (time.monotonic() - began >= 0.2) == (version == "1.3")
    llm.shutdown()


async def test_guides_without_a_backend_are_dropped_in_silence(version: str) -> None:
    from tensorrt_llm.llmapi import GuidedDecodingParams

    llm = make_llm()
    guided = params(guided_decoding=GuidedDecodingParams(regex="x"))
    result = await llm.generate_async(prompt(), sampling_params=guided)
    assert result.outputs[0].text != "x"
    llm.shutdown()


async def test_statistics_are_one_destructive_iterator(version: str) -> None:
    llm = make_llm(enable_iter_perf_stats=True)
    assert [row async for row in llm.get_stats_async(timeout=0.05)] == []
    with pytest.raises(AssertionError):
        llm.get_kv_cache_events_async(timeout=0.05)
    await llm.generate_async(prompt(), sampling_params=params())
    first, second = llm.get_stats_async(timeout=0.05), llm.get_stats_async(timeout=0.05)
    assert first is second
    rows = [row async for row in first]
    assert rows
    assert set(rows[0]) == set(CONTRACT["stats"]["iteration"])
    assert set(rows[0]["kvCacheStats"]) == set(CONTRACT["stats"]["kvCacheStats"])
    assert [row async for row in second] == [], "what was read is gone"
    llm.shutdown()


async def test_processors_are_called_for_each_chunk_of_a_prompt(version: str) -> None:
    shown: list[int] = []
    llm = make_llm(enable_chunked_prefill=True, max_num_tokens=16)
    used = params(max_tokens=2, ignore_eos=True, logits_processor=Shown())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shown, "lengths", shown, raising=False)
        await llm.generate_async(prompt("a" * 40), sampling_params=used)
    assert shown[:4] == [40, 40, 40, 40], (
        "two chunks, the first token, and the second one with a list that lags"
    )
    llm.shutdown()


class Only:
    """Leaves one token admissible."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, req_id: Any, logits: Any, token_ids: Any, stream_ptr: Any, client_id: Any) -> None:
        logits.fill_(-math.inf)
        logits[..., self.token] = 0.0


class Shown:
    """Keeps how long the lists were that it was shown."""

    lengths: ClassVar[list[int]]

    def __call__(self, req_id: Any, logits: Any, token_ids: Any, stream_ptr: Any, client_id: Any) -> None:
        self.lengths.append(len(token_ids[0]))
