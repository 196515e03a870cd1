"""What TensorRT-LLM can do beyond the common ground: structural tags, ranks, retention, trace context."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from tests.engines.factories import make_request
from tests.engines.tensorrt_llm.stand_in import core, started
from tests.engines.test_contract import collect
from twinjet.errors import InvalidRequest, Unsupported
from twinjet.request import Constraint, KvRetention

TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag", "begin": "<n>", "content": {"type": "json_schema", "json_schema": {"enum": [7]}}, "end": "</n>",
    },
}  # fmt: skip
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


def submissions(engine: Any, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keep the keywords of every submission from now on."""
    seen: list[dict[str, Any]] = []
    real = engine._handle.llm.generate_async
    patch.setattr(engine._handle.llm, "generate_async", lambda *a, **k: seen.append(k) or real(*a, **k))
    return seen


@pytest.mark.parametrize("native", [True, False])
async def test_a_structural_tag_is_kept(version: str, native: bool) -> None:
    options = {} if native else {"guided_decoding_backend": "xgrammar"}
    async with started(options, native_sampler=native) as engine:
        assert "structural_tag" in engine.describe().capabilities
        tag = Constraint("structural_tag", json.dumps(TAG))
        outcome = await collect(engine, make_request(engine, constraint=tag, max_tokens=30))
        assert outcome.text[0] == "<n>7</n>"
        assert outcome.finish[0].is_eos


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("text", ["no json", "{}", '{"type": "structural_tag", "format": {"type": "novel"}}'])
async def test_a_wrong_structural_tag_is_the_callers_mistake(version: str, native: bool, text: str) -> None:
    options = {} if native else {"guided_decoding_backend": "xgrammar"}
    async with started(options, native_sampler=native) as engine:
        with pytest.raises(InvalidRequest):
            await collect(engine, make_request(engine, constraint=Constraint("structural_tag", text)))


async def test_a_structural_tag_is_refused_where_the_backend_knows_none(version: str) -> None:
    async with started({"guided_decoding_backend": "llguidance"}, native_sampler=False) as engine:
        with pytest.raises(Unsupported, match="structural_tag"):
            make_request(engine, constraint=Constraint("structural_tag", json.dumps(TAG)))


async def test_a_rank_is_a_hint_in_its_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started({"enable_attention_dp": True, "tensor_parallel_size": 2}) as engine:
        assert "data_parallel_rank" in engine.describe().capabilities
        seen = submissions(engine, monkeypatch)
        await collect(engine, replace(make_request(engine), data_parallel_rank=1))
        params = seen[0]["scheduling_params"]
        assert (params.attention_dp_rank, params.attention_dp_relax) == (1, True)
        await collect(engine, make_request(engine))
        assert "scheduling_params" not in seen[1]
        with pytest.raises(InvalidRequest, match="2 is out of range; allowed: 0 to 1"):
            await collect(engine, replace(make_request(engine), data_parallel_rank=2))
    async with started({"tensor_parallel_size": 2}) as engine:
        assert "data_parallel_rank" not in engine.describe().capabilities
        with pytest.raises(Unsupported):
            await collect(engine, replace(make_request(engine), data_parallel_rank=0))


async def test_blocks_are_kept_by_priority(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started() as engine:
        assert "kv_retention" in engine.describe().capabilities
        seen = submissions(engine, monkeypatch)
        kept: list[int] = []
        log = engine._handle.llm._event_log
        real = log.stored
        monkeypatch.setattr(
            log, "stored", lambda *a, priority, **k: kept.append(priority) or real(*a, priority=priority)
        )
        retention = KvRetention(prompt_priority=90, output_priority=5, duration_s=60.0)
        await collect(engine, replace(make_request(engine, "p" * 100), kv_retention=retention))
        config = seen[0]["kv_cache_retention_config"]
        assert kept == [90, 90, 90]
        assert config.decode_retention_priority == 5
        assert config.decode_duration_ms.total_seconds() == 60
        await collect(engine, replace(make_request(engine, "q" * 40), kv_retention=KvRetention()))
        assert kept[3:] == [35], "unset is the engine's own"
    async with started({"kv_cache_config": {"enable_block_reuse": False}}) as engine:
        assert "kv_retention" not in engine.describe().capabilities
        with pytest.raises(Unsupported):
            await collect(engine, replace(make_request(engine), kv_retention=KvRetention()))


async def test_the_trace_context_reaches_the_engine_where_it_takes_one(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started() as engine:
        assert ("trace_context" in engine.describe().capabilities) == (version == "1.3")
        seen = submissions(engine, monkeypatch)
        await collect(engine, replace(make_request(engine), trace_headers=TRACE))
        assert seen[0].get("trace_headers") == (TRACE if version == "1.3" else None)
        await collect(engine, make_request(engine))
        assert "trace_headers" not in seen[1]


async def test_the_stand_in_waits_for_no_rank_that_is_not_there(version: str) -> None:
    from tensorrt_llm.scheduling_params import SchedulingParams

    async with started() as engine:
        with pytest.raises(AssertionError, match="wait for ever"):
            engine._handle.llm.generate_async(
                {"prompt_token_ids": [1]}, scheduling_params=SchedulingParams(attention_dp_rank=0)
            )
        await asyncio.sleep(0)
        assert not engine._handle.llm._active
        assert core().LLM is type(engine._handle.llm)
