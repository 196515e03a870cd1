"""The engine on the stand-in: start-up, fall-backs, refusals, death, cache and adapters."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines.factories import double_installed, make_request, make_trt
from tests.engines.tensorrt_llm.fake_device import fake_device
from tests.engines.tensorrt_llm.stand_in import core, deltas, started
from tests.engines.test_contract import collect
from twinjet.config import Config
from twinjet.engines.base import KvStored, LoadProgress, OutputEvent
from twinjet.engines.tensorrt_llm.front.engine import TrtLlmEngine
from twinjet.errors import (
    AlreadyExists,
    ConfigError,
    EngineDied,
    InvalidRequest,
    NotFound,
    RequestAborted,
    RequestFailed,
    Unsupported,
)
from twinjet.grammar.compilation import perform
from twinjet.grammar.job import Job
from twinjet.grammar.room import CompiledGrammar
from twinjet.request import Constraint
from twinjet.sampling import cpu_target

# ---- construction ----


def test_without_the_package_construction_says_what_to_install() -> None:
    with pytest.raises(ConfigError) as caught:
        make_trt()
    for word in ("pip install 'twinjet[tensorrt-llm]'", "NVIDIA GPU", "nvcr.io", "docs/tensorrt-llm.md"):
        assert word in str(caught.value)


def test_the_factory_gives_the_same_error() -> None:
    from twinjet.engines.factory import make_engine

    tree = {"deployments": {"llama": {"engine": "tensorrt_llm", "model": "/models/llama"}}}
    with pytest.raises(ConfigError, match=r"deployments\.llama: .*not installed"):
        make_engine("llama", Config.model_validate(tree).deployments["llama"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"twinjet": {"probe_timeout": 1}}, "twinjet.probe_timeout"),
        ({"twinjet": {"probe_timeout_s": 0}}, "twinjet.probe_timeout_s"),
        ({"scheduler_config": {"capacity_scheduler_policy": "greedy"}}, "allowed: guaranteed_no_evict"),
        ({"max_beam_width": 4}, "no beam search"),
        ({"skip_tokenizer_init": True}, "cannot be set"),
        ({"batched_logits_processor": "x"}, "does not call it"),
        ({"enable_chunked_prefill": True}, "enable_chunked_prefill and native_sampler exclude each other"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(
    double: None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trt(options)


@pytest.mark.parametrize(
    "options",
    [{"no_such_argument": 1}, {"kv_cache_config": {"no_such_field": 1}}, {"tensor_parallel_size": "two"}],
)
async def test_what_the_package_refuses_is_a_configuration_error(
    version: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        async with started(options):
            pass


async def test_a_version_without_the_essentials_points_to_the_doctor() -> None:
    engine_of = started()
    with (
        double_installed("1.2", "-SamplingParams.logits_processor"),
        pytest.raises(ConfigError, match=r"logits_processor.*twinjet doctor"),
    ):
        async with engine_of:
            pass


async def test_progress_never_goes_back(version: str) -> None:
    seen: list[LoadProgress] = []
    engine = make_trt()
    await engine.start(seen.append)
    await engine.stop()
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1] == LoadProgress("ready", 1.0)


# ---- who draws ----


async def test_our_sampler_is_used_and_counted(version: str) -> None:
    async with started() as engine:
        await collect(engine, make_request(engine, max_tokens=5, ignore_eos=True))
        sampler = engine.describe().sampler
        assert (sampler.implementation, sampler.reason) == ("twinjet", "")
        assert sampler.counters["tokens_twinjet"] == 5
        assert sampler.counters["requests_twinjet"] == 1


async def test_the_sampler_names_what_really_draws(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started() as engine:
        assert engine.describe().sampler.target == cpu_target()
    fake_device(monkeypatch)
    async with started() as engine:
        assert engine.describe().sampler.target == "cuda"
        outcome = await collect(engine, make_request(engine, logprobs=2, max_tokens=6, ignore_eos=True))
        assert len(outcome.logprobs[0]) == 6
        assert engine.describe().sampler.counters["outputs_copied_to_cpu"] == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scheduler_config": {"capacity_scheduler_policy": "max_utilization"}}, "max_utilization"),
    ],
)
async def test_where_the_hook_sees_rows_that_are_no_token_the_engine_draws(
    version: str, options: dict[str, Any], word: str
) -> None:
    async with started(options) as engine:
        assert word in engine.describe().sampler.reason
        outcome = await collect(engine, make_request(engine, "a" * 40, max_tokens=6, ignore_eos=True))
        assert len(outcome.tokens[0]) == 6
        assert engine.describe().sampler.counters["requests_engine"] == 1


async def test_an_engine_that_ignores_the_hook_falls_back(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core(), "_shipped", lambda params: [])
    async with started({"twinjet": {"probe_timeout_s": 0.2}}) as engine:
        info = engine.describe()
        assert info.sampler.implementation == "engine"
        assert "does not work" in info.sampler.reason
        assert not {"allowed_token_ids", "json_schema"} & info.capabilities
        assert ("penalties" in info.capabilities) == (version == "1.3"), (
            "what its own sampler was seen to honour"
        )
        outcome = await collect(engine, make_request(engine, max_tokens=6, ignore_eos=True))
        assert len(outcome.tokens[0]) == 6
        assert engine.describe().sampler.counters["requests_engine"] == 1


async def test_an_engine_that_overrides_the_token_falls_back(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core(), "_sample", lambda *_: 97)
    async with started() as engine:
        assert engine.describe().sampler.implementation == "engine"


async def test_an_override_later_on_is_found_out(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started() as engine:
        real = core()._sample
        monkeypatch.setattr(core(), "_sample", lambda *args: (real(*args) + 1) % 97)
        with pytest.raises(RequestFailed):
            await collect(engine, make_request(engine, max_tokens=9, ignore_eos=True))


async def test_a_fault_of_the_sampler_fails_the_request_alone(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started() as engine:
        real = core().toy_logits
        with monkeypatch.context() as patch:
            patch.setattr(core(), "toy_logits", lambda tokens: real(tokens) * float("nan"))
            with pytest.raises(RequestFailed, match="no token to draw"):
                await collect(engine, make_request(engine))
        assert (await collect(engine, make_request(engine))).finish
        assert engine.describe().sampler.counters["faults"] == 1


async def test_without_ours_what_the_engine_would_ignore_is_refused(version: str) -> None:
    async with started(native_sampler=False) as engine:
        older = [{"repetition_penalty": 1.5}, {"bad_words": ("a",)}, {"logprobs": 2}, {"prompt_logprobs": 2}]
        for wrong in (
            {"allowed_token_ids": (97,)},
            {"constraint": Constraint("regex", "a")},
            *(older if version == "1.2" else []),
        ):
            with pytest.raises(Unsupported):
                make_request(engine, **wrong)
        reason = engine.describe().sampler.reason
        assert ("it does not honour logprobs, min_tokens, penalties" in reason) == (version == "1.2")
        asked = {"logprobs": 2} if version == "1.3" else {}
        outcome = await collect(engine, make_request(engine, n=2, max_tokens=8, ignore_eos=True, **asked))
        assert [len(entry) for entry in outcome.tokens.values()] == [8, 8]
        assert [len(entry) for entry in outcome.logprobs.values()] == [8 * len(asked)] * 2
        assert outcome.tokens[0] != outcome.tokens[1]


@pytest.mark.parametrize(
    ("constraint", "check"),
    [
        (Constraint("json_schema", '{"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}'), "["),
        (Constraint("json_object"), "{"),
        (Constraint("regex", "(ab)+c"), "ab"),
        (Constraint("ebnf", 'root ::= "x" root | "y"'), ("x", "y")),
    ],
)
async def test_grammars_run_inside_our_sampler(
    version: str, constraint: Constraint, check: str | tuple[str, ...]
) -> None:
    async with started() as engine:
        request = make_request(
            engine, constraint=constraint, max_tokens=80, logit_bias={10: -100.0, 32: -100.0}
        )
        outcome = await collect(engine, request)
        assert outcome.text[0].startswith(check)
        if outcome.finish[0].reason == "stop":
            assert outcome.finish[0].is_eos


async def test_a_grammar_that_does_not_compile_is_the_callers_mistake(version: str) -> None:
    async with started() as engine:
        request = make_request(engine, constraint=Constraint("ebnf", "root ::= ("))
        with pytest.raises(InvalidRequest):
            await collect(engine, request)


async def test_without_xgrammar_constraints_are_refused_with_a_reason(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core()  # whose own guided decoding keeps its xgrammar
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    async with started() as engine:
        info = engine.describe()
        assert info.sampler.implementation == "twinjet"
        assert "xgrammar cannot be imported" in info.sampler.reason
        assert "json_schema" not in info.capabilities
    async with started({"guided_decoding_backend": "llguidance"}) as engine:
        assert "json_schema" in engine.describe().capabilities
        request = make_request(engine, constraint=Constraint("regex", "a"))
        assert (await collect(engine, request)).finish, "the engine's own guided decoding takes it"
        assert engine.describe().sampler.counters["requests_engine"] == 1


async def test_a_prebuilt_engine_is_recognised_and_draws_itself(version: str, tmp_path: Path) -> None:
    (tmp_path / "rank0.engine").write_bytes(b"")
    (tmp_path / "config.json").write_text(
        '{"pretrained_config": {"vocab_size": 258}, "build_config": {"max_seq_len": 512, "max_batch_size": 8}}'
    )
    engine = TrtLlmEngine("built", str(tmp_path), {})
    try:
        await engine.start(lambda _: None)
        info = engine.describe()
        assert info.limits.max_context_tokens == 512
        assert "prebuilt" in info.sampler.reason
        assert "penalties" in info.capabilities, "its C++ sampler has them"
        outcome = await collect(
            engine, make_request(engine, repetition_penalty=1.2, max_tokens=5, ignore_eos=True)
        )
        assert len(outcome.tokens[0]) == 5
    finally:
        await engine.stop()


async def test_speculative_decoding_leaves_the_draw_to_the_engine(version: str) -> None:
    async with started({"speculative_config": {"decoding_type": "NGram"}}) as engine:
        assert "speculative" in engine.describe().sampler.reason


# ---- requests ----


async def test_a_slow_reader_gets_fewer_larger_deltas(version: str) -> None:
    async with started() as engine:
        events = engine.generate(make_request(engine, max_tokens=60, ignore_eos=True, logprobs=1))
        await anext(events)
        async with asyncio.timeout(10):
            while engine.describe().sampler.counters.get("tokens_twinjet", 0) < 60:
                await asyncio.sleep(0.002)
        rest = [event async for event in events]
        assert len(rest) <= 3
        assert sum(len(event.token_ids) for event in rest) == sum(len(event.logprobs) for event in rest) == 60


async def test_a_request_id_may_run_once_at_a_time(version: str) -> None:
    async with started() as engine:
        events = engine.generate(make_request(engine, "!stall"))
        pending = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        with pytest.raises(AlreadyExists):
            await anext(engine.generate(make_request(engine)))
        await engine.abort("r")
        with pytest.raises(Exception, match="aborted"):
            await pending


async def test_an_abort_while_the_grammar_compiles_is_heard(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started() as engine:
        compiling, release = threading.Event(), threading.Event()
        real = engine._drawing._compiler.compile

        def slow(constraint: Constraint) -> Any:
            compiling.set()
            release.wait(10)
            return real(constraint)

        monkeypatch.setattr(engine._drawing._compiler, "compile", slow)
        request = make_request(engine, constraint=Constraint("regex", "a+"))
        pending = asyncio.create_task(collect(engine, request))
        await asyncio.to_thread(compiling.wait, 10)
        await engine.abort("r")
        release.set()
        with pytest.raises(RequestAborted):
            await pending


async def test_an_error_that_is_only_written_down_is_read(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started() as engine:
        step = core().RequestOutput._step

        async def quiet(self: Any) -> None:
            await step(self)
            self.error = "Guided decoding error: bad" if "guided" in marks else "bad"

        marks: set[str] = set()
        with monkeypatch.context() as patch:
            patch.setattr(core().RequestOutput, "_step", quiet)
            with pytest.raises(RequestFailed):
                await collect(engine, make_request(engine))
            marks.add("guided")
            with pytest.raises(InvalidRequest, match="Guided decoding error"):
                await collect(engine, make_request(engine))
        assert (await collect(engine, make_request(engine))).finish, "the engine is well"


async def test_a_prompt_beyond_one_prefill_is_refused(version: str) -> None:
    async with started({"max_num_tokens": 16}) as engine:
        with pytest.raises(InvalidRequest, match="at most 16"):
            await collect(engine, make_request(engine, "a" * 20))
    chunked = {"max_num_tokens": 16, "enable_chunked_prefill": True}
    async with started(chunked, native_sampler=False) as engine:
        assert (await collect(engine, make_request(engine, "a" * 20))).finish


async def test_salts_keep_cached_prefixes_apart(version: str) -> None:
    async with started() as engine:
        text = "a prompt of several blocks, each of thirty-two tokens, so that some are cached" * 2

        async def cached(request_id: str, **extra: Any) -> int | None:
            return (
                await collect(engine, make_request(engine, text, request_id, **extra))
            ).prompt.num_cached_tokens

        assert await cached("a") == 0
        assert (await cached("b") or 0) > 0
        assert await cached("c", cache_salt="tenant") == 0
        assert (await cached("d", cache_salt="tenant") or 0) > 0
        assert await engine.reset_prefix_cache()
        assert await cached("e") == 0
        assert (await cached("f") or 0) > 0


async def test_every_output_gets_params_of_its_own(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started() as engine:
        seen: list[Any] = []
        real = engine._handle.llm.generate_async
        monkeypatch.setattr(
            engine._handle.llm,
            "generate_async",
            lambda *a, **k: seen.append(k["sampling_params"]) or real(*a, **k),
        )
        await collect(engine, make_request(engine, n=3))
        assert len({id(params) for params in seen}) == 3
        assert all((params.n, params.best_of) == (1, 1) for params in seen)


async def test_an_adapter_above_the_engines_rank_is_refused(version: str, tmp_path: Path) -> None:
    async with started({"enable_lora": True, "lora_config": {"max_lora_rank": 8}}) as engine:
        for text, message in (('{"r": 16}', "rank is 16; allowed: at most 8"), ("no json", "cannot be read")):
            (tmp_path / "adapter_config.json").write_text(text)
            with pytest.raises(InvalidRequest, match=message):
                await engine.load_adapter("large", str(tmp_path))
        (tmp_path / "adapter_config.json").write_text('{"r": 8}')
        assert await engine.load_adapter("fits", str(tmp_path)) is False


async def test_a_wrong_schema_does_not_reach_an_engine_that_draws_itself(version: str) -> None:
    async with started({"guided_decoding_backend": "xgrammar"}, native_sampler=False) as engine:
        submitted = engine._handle.llm._ids.__reduce__()[1]
        for wrong in (Constraint("json_schema", '{"type": 5}'), Constraint("ebnf", "root ::= (")):
            with pytest.raises(InvalidRequest):
                await collect(engine, make_request(engine, constraint=wrong))
        assert engine._handle.llm._ids.__reduce__()[1] == submitted
        assert (await collect(engine, make_request(engine, constraint=Constraint("regex", "a")))).finish


async def test_an_argument_of_another_version_is_named(version: str) -> None:
    with pytest.raises(ConfigError, match=r"options\.max_num_token: .*did you mean max_num_tokens"):
        async with started({"max_num_token": 5}):
            pass


async def test_a_prebuilt_engine_without_its_build_config_is_refused(double: None, tmp_path: Path) -> None:
    (tmp_path / "rank0.engine").write_bytes(b"")
    for text in (None, '{"pretrained_config": {}}'):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="without its build config"):
            TrtLlmEngine("built", str(tmp_path), {})


async def test_adapters_come_and_go(version: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    async with started({"enable_lora": True}) as engine:
        assert "adapters" in engine.describe().capabilities
        assert await engine.load_adapter("style", str(tmp_path)) is False
        assert await engine.load_adapter("style", str(tmp_path)) is True
        with pytest.raises(AlreadyExists):
            await engine.load_adapter("style", "/elsewhere")
        with pytest.raises(InvalidRequest):
            await engine.load_adapter("other", "/nowhere")
        assert dict(engine.adapters()) == {"style": str(tmp_path)}
        assert (await collect(engine, make_request(engine, adapter="style"))).finish
        await engine.unload_adapter("style")
        with pytest.raises(NotFound):
            await collect(engine, make_request(engine, adapter="style"))
        with pytest.raises(NotFound):
            await engine.unload_adapter("style")


# ---- load, events, ledger ----


@pytest.mark.parametrize(
    ("policy", "reserves"), [("GUARANTEED_NO_EVICT", True), ("max_utilization", False), (None, True)]
)
async def test_the_ledger_is_sized_from_statistics(version: str, policy: str | None, reserves: bool) -> None:
    options: dict[str, Any] = {"kv_cache_config": {"max_tokens": 1024, "tokens_per_block": 16}}
    if policy is not None:
        options["scheduler_config"] = {"capacity_scheduler_policy": policy}
    async with started(options) as engine:
        info = engine.describe()
        assert info.kv_cache is not None
        assert (info.kv_cache.num_blocks, info.kv_cache.block_size) == (64, 16)
        assert info.kv_cache.reserves_output is reserves
        assert info.limits.max_context_tokens == 1024, "a request must fit the cache"
        load = await engine.load()
        assert (load.kv_blocks_total, load.kv_blocks_used, load.running) == (64, 0, 0)


async def test_load_follows_the_statistics_while_running(version: str) -> None:
    async with started() as engine:
        events = engine.generate(make_request(engine, "x" * 100, max_tokens=3000, ignore_eos=True))
        async with asyncio.timeout(10):
            while ((await engine.load()).kv_blocks_used or 0) < 3:
                await anext(events)
        assert (await engine.load()).running == 1
        await events.aclose()


async def test_kv_events_reach_two_subscribers(version: str) -> None:
    async with started({"kv_cache_config": {"event_buffer_max_size": 64}}) as engine:
        assert "kv_events" in engine.describe().capabilities
        streams = [deltas(engine), deltas(engine)]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        request = make_request(engine, "y" * 100)
        await collect(engine, request)
        async with asyncio.timeout(10):
            first, second = await asyncio.gather(*waiting)
            while first[0].token_ids[0] != request.prompt_token_ids[0]:
                # What start-up has tried is in the cache, too.
                first, second = await asyncio.gather(*(anext(stream) for stream in streams))
        assert first == second
        assert isinstance(first[0], KvStored)
        assert tuple(first[0].token_ids) == request.prompt_token_ids[:32]
        assert first[0].parent_hash == b""
        for stream in streams:
            await stream.aclose()


# ---- death ----

IMPATIENT = {"twinjet": {"no_progress_s": 0.2, "probe_timeout_s": 0.2, "idle_probe_s": 0}}


async def test_a_silent_engine_is_found_dead_by_the_probe(version: str) -> None:
    async with started(IMPATIENT) as engine:
        waiting = asyncio.create_task(collect(engine, make_request(engine, "!stall", "waiting")))
        hung = asyncio.create_task(collect(engine, make_request(engine, "!hang:3", "hung")))
        for task in (waiting, hung):
            with pytest.raises(EngineDied):
                await task
        assert "no token within" in await engine.wait_dead()


async def test_an_idle_engine_that_died_is_found_too(version: str) -> None:
    async with started({"twinjet": {"idle_probe_s": 0.2, "probe_timeout_s": 0.2}}) as engine:
        engine._handle.llm.crash(None)
        async with asyncio.timeout(10):
            assert await engine.wait_dead()


async def test_a_stalled_request_alone_is_no_death(version: str) -> None:
    async with started(IMPATIENT) as engine:
        stalled = asyncio.create_task(collect(engine, make_request(engine, "!stall", "stalled")))
        async with asyncio.timeout(10):
            while not engine._watchdog.num_probes:
                await asyncio.sleep(0.01)
        assert (await collect(engine, make_request(engine, request_id="other"))).finish
        await engine.abort("stalled")
        with pytest.raises(Exception, match="aborted"):
            await stalled


async def test_a_fresh_engine_serves_after_a_death(version: str) -> None:
    async with started() as engine:
        with pytest.raises(EngineDied):
            await collect(engine, make_request(engine, "!die"))
    async with started() as engine:
        assert (await collect(engine, make_request(engine))).finish


async def test_stopping_ends_running_requests(version: str) -> None:
    async with started() as engine:
        events = engine.generate(make_request(engine, max_tokens=4000, ignore_eos=True))
        async for event in events:
            if isinstance(event, OutputEvent):
                break
        stopping = asyncio.create_task(engine.stop())
        with pytest.raises(EngineDied):
            async for _ in events:
                pass
        await stopping
        assert engine._handle.llm is None


async def test_stopping_leaves_no_file_behind(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with started():
        assert os.listdir(tmp_path)
    assert not os.listdir(tmp_path)


async def test_a_shutdown_that_hangs_is_bounded(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    async with started({"twinjet": {"shutdown_timeout_s": 0.1}}) as engine:
        real = engine._handle.llm.shutdown
        monkeypatch.setattr(engine._handle.llm, "shutdown", lambda: (release.wait(30), real()))
        async with asyncio.timeout(10):
            await engine.stop()
    release.set()


@pytest.mark.parametrize("phase", ["importing", "loading weights", "drawing", "trying"])
async def test_a_start_given_up_half_way_is_cleaned_up(version: str, phase: str) -> None:
    engine = make_trt()
    built: list[Any] = []

    def report(progress: LoadProgress) -> None:
        if progress.phase.startswith(phase):
            starting.cancel()
        built.append(engine._handle.llm)

    starting = asyncio.create_task(engine.start(report))
    with pytest.raises(asyncio.CancelledError):
        await starting
    await engine.stop()
    assert engine._handle.llm is None
    assert all(llm._is_down for llm in built if llm is not None)


async def test_a_stop_string_ends_its_outputs_work_and_no_others(version: str) -> None:
    async with started() as engine:
        plain = await collect(engine, make_request(engine, n=2, max_tokens=40, ignore_eos=True))
        stop = next(
            text for at in range(30) if (text := plain.text[0][at : at + 3]) and text not in plain.text[1]
        )
        request = make_request(engine, n=2, max_tokens=400, ignore_eos=True, stop=(stop,))
        running: list[int] = []
        llm, finish = engine._handle.llm, {}
        async with asyncio.timeout(30):
            async for event in engine.generate(request):
                if isinstance(event, OutputEvent):
                    finish[event.output_index] = event.finish
                    if finish.get(0) is not None and finish.get(1) is None:
                        running.append(len(llm._active))
        assert finish[0].stopped_by == stop and finish[1] is not None
        assert 1 in running, "what has ended for the reader has ended in the engine"
        assert not llm._active


@pytest.mark.parametrize("native", [True, False])
async def test_a_grammar_that_the_room_has_compiled_is_not_compiled_again(
    version: str, native: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {} if native else {"guided_decoding_backend": "xgrammar"}
    async with started(options, native_sampler=native) as engine:
        vocabulary = await engine.vocabulary(tmp_path)
        monkeypatch.setattr(engine._drawing._compiler, "compile", lambda _: pytest.fail("compiled again"))
        for number, (constraint, text) in enumerate(
            (
                (Constraint("choice", choices=("yes",)), "yes"),
                (Constraint("json_schema", '{"const": 7}'), "7"),
                (Constraint("regex", "ab"), "ab"),
            )
        ):
            target = str(tmp_path / f"{number}.json")
            # What a worker of the room does.
            size = perform(
                Job(constraint.kind, constraint.value, constraint.choices, vocabulary.path, target)
            )["num_bytes"]
            grammar = CompiledGrammar(target, vocabulary, size)
            outcome = await collect(
                engine, replace(make_request(engine, constraint=constraint), grammar=grammar)
            )
            assert outcome.text[0] == text
