"""Prefill on one engine, decode on another: the same output as in one place, and nothing unsealed reaches an engine."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines.factories import make_request
from tests.engines.tensorrt_llm.stand_in import started
from tests.engines.test_contract import Outcome, collect
from twinjet.engines.base import HandoffEvent, OutputEvent, PromptEvent
from twinjet.engines.tensorrt_llm.front.handoff import Handoffs, carried, read_key
from twinjet.errors import ConfigError, InvalidRequest, RequestFailed, Unsupported
from twinjet.request import Constraint, EngineRequest

TRANSCEIVER = {"cache_transceiver_config": {"backend": "DEFAULT"}}
NO_OVERLAP = TRANSCEIVER | {"disable_overlap_scheduler": True}


@contextlib.asynccontextmanager
async def pair(**kwargs: Any) -> AsyncIterator[tuple[Any, Any]]:
    """An engine for prompts and one for outputs."""
    async with started(NO_OVERLAP, **kwargs) as first, started(TRANSCEIVER, **kwargs) as second:
        yield first, second


async def prefill(engine: Any, request: EngineRequest) -> bytes:
    events = [e async for e in engine.generate(replace(request, request_id="p", prefill_only=True))]
    assert isinstance(events[0], PromptEvent)
    assert isinstance(events[1], HandoffEvent) and len(events) == 2
    return events[1].state


async def in_two(first: Any, second: Any, request: EngineRequest) -> Outcome:
    return await collect(second, replace(request, handoff=await prefill(first, request)))


def held(engine: Any) -> int:
    """Prompts whose blocks wait to be fetched."""
    return len(engine._handle.llm.transceiver.held)


REQUESTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.9, "top_k": 40, "min_p": 0.01, "ignore_eos": True},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {101: 2.0}},
    {"logprobs": 3, "max_tokens": 6},
    {"min_tokens": 12, "stop_token_ids": (101, 102)},
    {"bad_words": ("e", "a")},
    {"constraint": Constraint("regex", "[a-z]{3,9}!")},
    {"constraint": Constraint("choice", choices=("yes, it is", "no"))},
    {"max_tokens": 2, "ignore_eos": True},
]  # fmt: skip


async def test_two_engines_say_what_one_says(version: str) -> None:
    async with pair() as (first, second):
        for sampling in REQUESTS:
            request = make_request(first, **sampling)
            whole = await collect(first, request)
            parts = await in_two(first, second, request)
            assert parts.tokens == whole.tokens, sampling
            assert (parts.text, parts.finish) == (whole.text, whole.finish)
            assert parts.logprobs == whole.logprobs
            assert held(first) == 0


async def test_with_the_engines_own_sampler_too(version: str) -> None:
    options = {"guided_decoding_backend": "xgrammar"}
    async with (
        started(NO_OVERLAP | options, native_sampler=False) as first,
        started(TRANSCEIVER | options, native_sampler=False) as second,
    ):
        for sampling in ({}, {"stop_token_ids": (101,)}, {"constraint": Constraint("regex", "[a-z]{3,9}!")}):
            request = make_request(first, temperature=0.0, **sampling)
            whole = await collect(first, request)
            assert (await in_two(first, second, request)).tokens == whole.tokens
        if "logprobs" in first.describe().capabilities:
            asking = make_request(first, logprobs=2)
            for engine, request in ((first, replace(asking, prefill_only=True)),):
                with pytest.raises(Unsupported, match="logprobs"):
                    await collect(engine, request)


async def test_a_stop_string_may_begin_with_what_was_handed_over(version: str) -> None:
    async with pair() as (first, second):
        text = (await collect(first, make_request(first, ignore_eos=True))).text[0]
        for stop in (text[:1], text[:2]):
            outcome = await in_two(first, second, make_request(first, ignore_eos=True, stop=(stop,)))
            assert (outcome.text[0], outcome.finish[0].stopped_by) == ("", stop)


async def test_a_first_token_that_ends_the_output_leaves_nothing_to_hand_over(version: str) -> None:
    async with pair() as (first, _):
        for sampling in (
            {"logit_bias": {256: 100.0}},
            {"max_tokens": 1},
            {"stop_token_ids": tuple(range(64))},
        ):
            if "stop_token_ids" in sampling:
                sampling["logit_bias"] = dict.fromkeys(range(64), 100.0)
            request = make_request(first, **sampling)
            events = [e async for e in first.generate(replace(request, prefill_only=True))]
            assert not any(isinstance(event, HandoffEvent) for event in events)
            last = events[-1]
            assert isinstance(last, OutputEvent) and last.finish is not None and len(last.token_ids) == 1


async def test_what_can_be_had_is_told(version: str) -> None:
    async with started(TRANSCEIVER) as engine:
        capabilities = engine.describe().capabilities
        assert "handoff" in capabilities
        assert ("prefill_only" in capabilities) == (version == "1.3")
        if version == "1.2":
            with pytest.raises(Unsupported, match="disable_overlap_scheduler"):
                await collect(engine, replace(make_request(engine), prefill_only=True))
    async with started(NO_OVERLAP) as engine:
        assert {"handoff", "prefill_only"} <= engine.describe().capabilities
    async with started() as engine:
        assert not {"handoff", "prefill_only"} & engine.describe().capabilities
        for changes in ({"prefill_only": True}, {"handoff": b"x" * 40}):
            with pytest.raises(Unsupported, match=next(iter(changes))):
                await collect(engine, replace(make_request(engine), **changes))


async def test_nothing_that_was_not_sealed_for_this_request_reaches_the_engine(version: str) -> None:
    async with pair() as (first, second):
        request = make_request(first)
        state = await prefill(first, request)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                second._handle.llm, "generate_async", lambda *_, **__: pytest.fail("it reached the engine")
            )
            other = make_request(first, "Another prompt")
            for wrong, why in (
                (replace(request, handoff=b"x"), "was not made by this server"),
                (replace(request, handoff=state[:-2] + b"5}"), "was not made by this server"),
                (replace(request, handoff=bytes([state[0] ^ 1]) + state[1:]), "was not made by this server"),
                (replace(other, handoff=state), "belongs to another request"),
                (replace(make_request(first, seed=8), handoff=state), "belongs to another request"),
                (replace(make_request(first, top_k=3), handoff=state), "belongs to another request"),
                (replace(request, cache_salt="x", handoff=state), "belongs to another request"),
            ):
                with pytest.raises(InvalidRequest, match=why) as caught:
                    await collect(second, wrong)
                assert caught.value.violations[0].field == "options.handoff"
        assert (await collect(second, replace(request, handoff=state))).finish
        with pytest.raises(InvalidRequest, match="has been used"):
            await collect(second, replace(request, handoff=state))


async def test_a_handoff_has_a_lifetime_and_a_key(version: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    short = {"twinjet": {"handoff_lifetime_s": 1e-6}}
    async with started(NO_OVERLAP | short) as first, started(TRANSCEIVER) as second:
        request = make_request(first)
        with pytest.raises(InvalidRequest, match="prefill again"):
            await in_two(first, second, request)
    shared = {"twinjet": {"handoff_key_file": str(key)}}
    async with (
        started(NO_OVERLAP | shared) as first,
        started(TRANSCEIVER) as stranger,
        started(TRANSCEIVER | shared) as second,
    ):
        state = await prefill(first, request)
        with pytest.raises(InvalidRequest, match="handoff_key_file"):
            await collect(stranger, replace(request, handoff=state))
        assert (await collect(second, replace(request, handoff=state))).finish


def test_a_key_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="handoff_key_file"):
        read_key(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"k" * 31)
    with pytest.raises(ConfigError, match="31 bytes; at least 32"):
        read_key(tmp_path / "short")


async def test_a_token_that_no_sampler_drew_is_not_handed_over(version: str) -> None:
    async with pair() as (first, _):
        # A grammar that wants another first byte than the only one that is allowed.
        request = make_request(first, constraint=Constraint("regex", "x"), allowed_token_ids=(97,))
        with pytest.raises(RequestFailed, match="no token"):
            await prefill(first, request)


async def test_an_engine_that_tells_of_no_blocks_fails_the_request(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair() as (first, _):
        monkeypatch.setattr(first._handle.llm.transceiver, "hold", lambda *_: None)
        with pytest.raises(RequestFailed, match="does not say"):
            await prefill(first, make_request(first))


async def test_the_stand_in_stops_for_blocks_that_never_come(version: str) -> None:
    """What a forged handoff would do: nobody else gets a token any more."""
    params = importlib.import_module("tensorrt_llm.llmapi").DisaggregatedParams
    async with started(TRANSCEIVER) as engine:
        llm = engine._handle.llm
        forged = params(
            request_type="generation_only",
            first_gen_tokens=[97],
            ctx_request_id=1,
            opaque_state=b'{"address": "x"}',
        )
        llm.generate_async({"prompt_token_ids": [1, 2]}, disaggregated_params=forged)
        later = llm.generate_async({"prompt_token_ids": [1, 2]})
        for _ in range(50):
            await importlib.import_module("asyncio").sleep(0)
        assert not later.finished and llm._task.cancelled()


async def test_without_a_transceiver_the_stand_in_refuses(version: str) -> None:
    llmapi = importlib.import_module("tensorrt_llm.llmapi")
    errors = importlib.import_module("tensorrt_llm.executor.utils")
    async with started() as engine:
        params = llmapi.DisaggregatedParams(request_type="context_only")
        result = engine._handle.llm.generate_async({"prompt_token_ids": [1]}, disaggregated_params=params)
        with pytest.raises(errors.RequestError, match="transceiver is disabled"):
            await result.aresult()


def test_what_is_sealed_is_what_the_engine_said() -> None:
    class Params:
        first_gen_tokens = [5]  # noqa: RUF012
        ctx_request_id = 7
        opaque_state = bytes(range(256))
        draft_tokens = None

    request = EngineRequest(request_id="r", prompt_token_ids=(1, 2), sampling=make_sampling())
    handoffs = Handoffs(b"k" * 32, 60.0, clock=lambda: 1000.0)
    told = carried(Params)
    assert told is not None
    row = ([5, 6], [-0.5, -1.25], 1)
    opened = handoffs.open(replace(request, handoff=handoffs.seal(request, told, [row])))
    assert opened.params == {"first_gen_tokens": [5], "ctx_request_id": 7, "opaque_state": bytes(range(256))}
    assert opened.first_tokens == (5,) and opened.logprobs == [row]
    assert carried(None) is None
    for lacking in ("ctx_request_id", "first_gen_tokens", "opaque_state"):
        assert carried(type("Params", (Params,), {lacking: None})) is None


def make_sampling() -> Any:
    from tests.engines.tensorrt_llm.test_outputs import NEUTRAL
    from twinjet.request import Sampling

    return Sampling(**NEUTRAL)


def test_what_was_used_is_forgotten_when_it_is_of_no_use_any_more() -> None:
    now = [1000.0]
    request = EngineRequest(request_id="r", prompt_token_ids=(1, 2), sampling=make_sampling())
    handoffs = Handoffs(b"k" * 32, 60.0, clock=lambda: now[0])
    params = {"first_gen_tokens": [5], "ctx_request_id": 7}
    first = replace(request, handoff=handoffs.seal(request, params, []))
    handoffs.open(first)
    now[0] += 30
    second = replace(request, handoff=handoffs.seal(request, params, []))
    handoffs.open(second)
    for spent in (first, second):
        with pytest.raises(InvalidRequest, match="has been used"):
            handoffs.open(spent)
    now[0] += 59
    handoffs.open(replace(request, handoff=handoffs.seal(request, params, [])))
    with pytest.raises(InvalidRequest, match="prefill again"):
        handoffs.open(first)
    with pytest.raises(InvalidRequest, match="has been used"):
        handoffs.open(second)
    assert len(handoffs._used) == 2
