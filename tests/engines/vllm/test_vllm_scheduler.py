"""The native scheduler's pieces: stops, aborts, fall-backs, switch, status, version guard."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the vllm extra is not installed")

from scheduler_harness import EOS, Engine, Prompt, Setup, make_engines, make_native, make_stock
from vllm.v1.engine import FinishReason
from vllm.v1.engine import core as engine_core

from twinjet.engines.vllm import compat, status
from twinjet.engines.vllm.core.scheduler import make_scheduler

SETUP = Setup(num_blocks=200, max_num_seqs=8)


def run_to_end(engine: Engine, max_steps: int = 300) -> list[Any]:
    """All outputs until nothing is left."""
    outputs = []
    for _ in range(max_steps):
        _, result = engine.step()
        for made in (result or {}).values():
            outputs += made.outputs
        if not engine.scheduler.requests and not engine.queue:
            return outputs
    raise AssertionError("not done")


def native_engine(setup: Setup = SETUP) -> Engine:
    return make_engines(setup)[1]


def tokens_of(outputs: list[Any], request_id: str) -> list[int]:
    return [token for row in outputs if row.request_id == request_id for token in row.new_token_ids]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("options", "reason", "stop_reason", "length"),
    [
        ({"max_tokens": 5, "ignore_eos": True}, FinishReason.LENGTH, None, 5),
        ({"max_tokens": 400, "ignore_eos": True}, FinishReason.LENGTH, None, 512 - 3),
        ({"max_tokens": 400}, FinishReason.STOP, None, 9),
        ({"max_tokens": 400, "stop_token_ids": (77,)}, FinishReason.STOP, 77, 6),
    ],
    ids=["max_tokens", "max_model_len", "eos", "stop_token"],
)
def test_stops(
    is_async: bool, options: dict[str, Any], reason: FinishReason, stop_reason: int | None, length: int
) -> None:
    prompt_tokens = (5, 6, 7)
    limit = {"max_tokens": options["max_tokens"]}
    if length > 400:
        limit["max_tokens"] = 5000
    engine = native_engine(replace(SETUP, is_async=is_async))
    special = {3 + 8: EOS, 3 + 5: 77}  # by position
    engine.runner.token = lambda request_id, position: special.get(position, 100)  # type: ignore[method-assign]
    engine.add(Prompt("a", prompt_tokens, **{**options, **limit}), 0.0)

    outputs = run_to_end(engine, 600)

    assert outputs[-1].finish_reason == reason
    assert outputs[-1].stop_reason == stop_reason
    assert len(tokens_of(outputs, "a")) == length
    assert all(row.finish_reason is None for row in outputs[:-1])
    assert engine.scheduler.scheduler_status().counters["rows_updated"] >= length - 2


def test_outputs_go_to_their_clients() -> None:
    engine = native_engine(replace(SETUP, num_clients=2))
    for i in range(4):
        engine.add(Prompt(f"r#{i}", (5, 6, 7 + i), 6, client=i % 2, ignore_eos=True), 0.0)
    seen: dict[int, set[str]] = {}
    finished: dict[int, set[str]] = {}
    for _ in range(8):
        _, result = engine.step()
        for client, made in (result or {}).items():
            seen.setdefault(client, set()).update(row.request_id for row in made.outputs)
            finished.setdefault(client, set()).update(made.finished_requests or ())

    assert seen == finished == {0: {"r#0", "r#2"}, 1: {"r#1", "r#3"}}


@pytest.mark.parametrize("is_async", [False, True])
def test_an_aborted_decode_frees_its_blocks(is_async: bool) -> None:
    engine = native_engine(replace(SETUP, is_async=is_async))
    for i in range(3):
        engine.add(Prompt(f"r#{i}", tuple(range(3, 40)), 100, ignore_eos=True), 0.0)
    for _ in range(6):
        engine.step()
    assert engine.scheduler.decode_path.batch.num_rows == 3

    engine.abort(["r#1", "unknown"])
    assert engine.scheduler.decode_path.batch.num_rows == 2
    outputs = run_to_end(engine)

    assert not tokens_of(outputs, "r#1")
    assert engine.scheduler.kv_cache_manager.manager.num_used_blocks == 0


def test_a_request_is_written_back_on_demand() -> None:
    engine = native_engine()
    engine.add(Prompt("a", (5, 6, 7), 50, ignore_eos=True), 0.0)
    for _ in range(10):
        engine.step()
    request = engine.scheduler.requests["a"]
    assert request.num_output_tokens < 10  # the object lags behind while the request is resident

    engine.scheduler.decode_path.evict(["a"])

    assert request.num_output_tokens == 10
    assert request.num_tokens == 13
    assert request.num_computed_tokens == 12
    assert request.num_in_flight_tokens == 0


def test_logprobs_come_with_native_rows() -> None:
    engine = native_engine()
    engine.add(Prompt("with", (5, 6, 7), 6, logprobs=1, ignore_eos=True), 0.0)
    engine.add(Prompt("without", (8, 9, 10), 6, ignore_eos=True), 0.0)

    outputs = run_to_end(engine)

    for row in outputs:
        if row.request_id == "without":
            assert row.new_logprobs is None
        else:
            assert row.new_logprobs.logprob_token_ids[0][0] == row.new_token_ids[0]


def test_events_and_prefill_statistics_are_sent_once() -> None:
    engine = native_engine(replace(SETUP, is_async=True))
    engine.add(Prompt("a", tuple(range(3, 40)), 8, ignore_eos=True), 0.0)

    outputs = run_to_end(engine)

    assert [row.prefill_stats is not None for row in outputs] == [True] + [False] * 7
    assert outputs[0].events is not None
    assert all(row.events is None for row in outputs[1:])


@pytest.mark.parametrize("setting", ["off", "manager", "on"])
def test_the_switch(setting: str) -> None:
    scheduler = make_native(replace(SETUP, native=setting))

    found = scheduler.scheduler_status()

    assert found.block_manager.is_native == (setting != "off")
    assert found.decode_path.is_native == (setting == "on")
    assert found.prefix_hash.is_native == (setting != "off")
    assert found.decode_path.reason == {"off": "off", "manager": "manager_only", "on": ""}[setting]
    engine_core.get_request_block_hasher(16, lambda value: b"")  # takes what install() left


def test_the_switch_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from scheduler_harness import scheduler_arguments

    monkeypatch.setenv("TWINJET_VLLM_NATIVE", "off")
    arguments = scheduler_arguments(SETUP)
    arguments["vllm_config"].additional_config = {}
    assert not make_scheduler(**arguments).scheduler_status().block_manager.is_native

    monkeypatch.setenv("TWINJET_VLLM_NATIVE", "maybe")
    arguments = scheduler_arguments(SETUP)
    arguments["vllm_config"].additional_config = {}
    with pytest.raises(ValueError, match="'maybe', but must be one of on, manager, off"):
        make_scheduler(**arguments)


def test_status_crosses_the_process_boundary_as_plain_data() -> None:
    scheduler = make_native(SETUP)
    engine_core.get_request_block_hasher(16, lambda value: b"")
    core = type("Core", (), {"scheduler": scheduler})()

    data = getattr(engine_core.EngineCore, status.STATUS_METHOD)(core)

    assert isinstance(data, dict)
    assert status.SchedulerStatus.from_dict(data) == scheduler.scheduler_status()


@pytest.mark.parametrize(
    ("attribute", "value", "layer", "reason"),
    [
        ("enable_kv_cache_events", True, "block_manager", "kv_events"),
        ("connector", object(), "block_manager", "kv_connector"),
        ("kv_metrics_collector", object(), "block_manager", "kv_metrics"),
        ("dcp_world_size", 2, "block_manager", "context_parallel"),
        ("num_spec_tokens", 2, "decode_path", "speculative"),
        ("use_pp", True, "decode_path", "pipeline_parallel"),
        ("num_sampled_tokens_per_step", 0, "decode_path", "pooling"),
        ("aux_output_connector", object(), "decode_path", "aux_output"),
        ("return_sampling_mask", True, "decode_path", "sampling_mask"),
        ("defer_block_free", True, "decode_path", "deferred_free"),
        ("adaptive_long_prefill_threshold", True, "decode_path", "adaptive_prefill"),
    ],
)
def test_what_is_left_to_vllm_says_why(attribute: str, value: Any, layer: str, reason: str) -> None:
    from twinjet.engines.vllm.core import conditions

    scheduler = make_stock(SETUP)
    judge = {"block_manager": conditions.judge_manager, "decode_path": conditions.judge_decode_path}[layer]
    assert judge(scheduler).is_native

    setattr(scheduler, attribute, value)

    found = judge(scheduler)
    assert not found.is_native
    assert found.reason == reason


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (replace(SETUP, block_size=24), "block_size"),
        (replace(SETUP, prefix_caching=False), "no_prefix_cache"),
    ],
)
def test_configurations_that_are_left_to_vllm(setup: Setup, reason: str) -> None:
    scheduler = make_native(setup)

    found = scheduler.scheduler_status()

    assert reason in (found.block_manager.reason, found.prefix_hash.reason)


def test_an_untested_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.33.0")
    scheduler = make_native(SETUP)

    found = scheduler.scheduler_status()

    assert not found.block_manager.is_native
    assert found.block_manager.reason == found.decode_path.reason == "untested_vllm"
    assert type(scheduler.kv_cache_manager).__module__.startswith("vllm.")


def test_changed_scheduler_sources_leave_the_manager_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "DECODE_FINGERPRINT", "0" * 32)
    scheduler = make_native(SETUP)
    engine_core.get_request_block_hasher(16, lambda value: b"")

    found = scheduler.scheduler_status()

    assert found.block_manager.is_native
    assert not found.decode_path.is_native
    assert found.decode_path.reason == "untested_vllm"


def test_a_fingerprint_sees_any_change_of_source() -> None:
    with pytest.raises(compat.UntestedVllmError, match="cannot be read"):
        compat._fingerprint(("vllm.v1.core.sched.scheduler:Missing",))
    parts = compat._DECODE_PARTS
    assert compat._fingerprint(parts) == compat.DECODE_FINGERPRINT
    assert compat._fingerprint(parts[1:]) != compat.DECODE_FINGERPRINT


def test_the_hasher_is_taken_by_one_engine_only() -> None:
    original = engine_core.get_request_block_hasher
    scheduler = make_native(SETUP)

    assert engine_core.get_request_block_hasher(16, lambda value: b"") is scheduler.native_hasher
    assert engine_core.get_request_block_hasher is original
